"""Training objectives: functions that look at a batch and yield losses."""

from collections.abc import Callable, Iterator

from .distil import distil_losses
from .generalization import generalization_losses
from .source_free import source_free_losses
from .source_only import source_only_losses
from .step import ClassMemory, Graph, Networks, Step, make_networks
from .t2sda import t2sda_losses

Method = Callable[[Step], Iterator[Graph]]

METHODS: dict[str, Method] = {
    "t2sda": t2sda_losses,
    "source_only": source_only_losses,
    "target_only": source_only_losses,
    "generalization": generalization_losses,
    "source_free": source_free_losses,
    "distil": distil_losses,
}

__all__ = [
    "METHODS",
    "ClassMemory",
    "Graph",
    "Method",
    "Networks",
    "Step",
    "distil_losses",
    "generalization_losses",
    "make_networks",
    "source_free_losses",
    "source_only_losses",
    "t2sda_losses",
]
