"""What learns in a run, and so what a checkpoint holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import nn

from ..config import RunConfig
from ..evaluation.watch import Watch
from ..methods import ClassMemory, Networks, make_networks
from ..models import T2SDAForSemanticSegmentation
from ..translate import TranslationEngine
from .distributed import shard, shards
from .optim import make_optimizer


class Buffers:
    """The buffers of modules, and a copy of them to go back to.

    Args:
        modules: which write into their buffers and never replace one.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = [buffer for module in modules for buffer in module.buffers()]
        self._kinds = [[b for b in found if b.dtype == kind] for kind in {buffer.dtype: None for buffer in found}]
        self._kept = [[torch.empty_like(buffer) for buffer in buffers] for buffers in self._kinds]

    def keep(self) -> None:
        """Take a copy."""
        for kept, buffers in zip(self._kept, self._kinds, strict=True):
            torch._foreach_copy_(kept, buffers)

    def restore(self) -> None:
        """Make the buffers what they were at the last `keep`."""
        for kept, buffers in zip(self._kept, self._kinds, strict=True):
            torch._foreach_copy_(buffers, kept)


@dataclass(frozen=True)
class Parts:
    """Networks and optimiser are the same on every process; class memory and watch are its own."""

    networks: Networks
    memory: ClassMemory
    optimizer: torch.optim.Optimizer
    watch: Watch | None = None  # proxies; see `loop.observe`

    @cached_property
    def buffers(self) -> Buffers:
        """All that an update may change and that is no parameter."""
        return Buffers([self.networks.student, self.networks.teacher, *self.own.values()])

    @property
    def own(self) -> dict[str, nn.Module]:
        """What only this process has, by its name in a checkpoint; buffers only."""
        return {"memory": self.memory} | ({} if self.watch is None else {"watch": self.watch})


def make_parts(
    cfg: RunConfig,
    student: T2SDAForSemanticSegmentation,
    translate: TranslationEngine,
    accelerator: Accelerator,
    watch: Watch | None = None,
) -> Parts:
    """The parts of a run at its start, on the device of the process, or in pieces on all of them. Collective.

    Args:
        cfg: the run.
        student: with its initial weights, equal on every process; not copied.
        translate: the translation engine.
        accelerator: of this process.
        watch: of the run; None watches nothing.
    """

    def prepared(_: str, network: nn.Module) -> nn.Module:
        # "evaluation_mode" only means: no DDP wrapper. Autocast goes inside forward, losses stay float32.
        network = accelerator.prepare_model(network, evaluation_mode=True)
        if shards(accelerator):
            shard(network, accelerator)
        return network

    networks = make_networks(cfg, student, translate).each(prepared)
    memory = ClassMemory(len(cfg.classes), cfg.projector.dim).to(accelerator.device)
    return Parts(networks, memory, make_optimizer(student.pretrained_encoder, student, cfg.optim), watch)
