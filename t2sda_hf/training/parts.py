"""What learns in a run, and so what a checkpoint holds."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Parts:
    """Networks and optimiser are the same on every process; class memory and watch are its own."""

    networks: Networks
    memory: ClassMemory
    optimizer: torch.optim.Optimizer
    watch: Watch | None = None  # proxies; see `loop.observe`

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
    return Parts(networks, memory, make_optimizer(student.encoder, student, cfg.optim), watch)
