"""Training objectives: functions that look at a batch and yield losses."""

from collections.abc import Callable, Iterator

from torch import Generator, Tensor

from ..batch import UdaBatch
from ..config import RunConfig
from .generalization import generalization_losses
from .parts import Parts
from .source_only import source_only_losses
from .t2sda import t2sda_losses

Method = Callable[[UdaBatch, Parts, RunConfig, int, Generator, Callable[[Tensor], Tensor]], Iterator[dict[str, Tensor]]]

METHODS: dict[str, Method] = {
    "t2sda": t2sda_losses,
    "source_only": source_only_losses,
    "generalization": generalization_losses,
}

__all__ = ["METHODS", "Method", "Parts", "generalization_losses", "source_only_losses", "t2sda_losses"]
