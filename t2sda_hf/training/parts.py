"""What learns in a run, and so what a checkpoint holds."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.models.segformer.modeling_segformer import (
    SegformerLayer,
    SegformerOverlapPatchEmbeddings,
    SegformerSequenceReduction,
)

from ..config import RunConfig
from ..evaluation.watch import Watch
from ..methods import ClassMemory, Networks, make_networks
from ..models import T2SDAForSemanticSegmentation
from ..models.heads import AllMLPHead
from ..teacher import averaged
from ..translate import TranslationEngine
from .attention import attend_in_groups
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


class HalfWeights:
    """bfloat16 copies of the weights of convolutions and linear layers, made once for an update.

    Autocast casts every weight in every forward, and its gradient in every backward: as many kernels as a third of the
    networks'. The copies stand in the layers meanwhile, and the gradients of one backward are cast and added together.
    What several layers of an attention read is cast once for all of them, too. The losses are autocast's, bit by bit,
    but for two layers of a Mix Transformer, in which a cast before and one after would do more than the layer: patch
    embeddings convolve in float32 (TF32), and the norm of the shortened keys is bfloat16 in itself.

    Args:
        networks: whose layers use their weights in nothing but their own forward, which autocast surrounds. Only the
            all-MLP head multiplies its weights with each other: they stay what they are.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        layers: list[nn.Module] = []
        left: set[nn.Module] = set()
        for module in (module for network in networks for module in network.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                layers.append(module)
            if isinstance(module, AllMLPHead):
                left |= set(module.modules())
            if isinstance(module, SegformerLayer):
                module.layernorm_before.register_forward_hook(_halved)
            if isinstance(module, SegformerSequenceReduction):
                _keep_type(module.layer_norm)
                layers.append(module.layer_norm)
            if isinstance(module, SegformerOverlapPatchEmbeddings):
                _keep_type(module.proj)
                left.add(module.proj)
        layers = [module for module in layers if module not in left]
        own = [(m._parameters, name, p) for m in layers for name, p in m._parameters.items() if p is not None]
        self._places = [(held, name) for held, name, _ in own]
        self._weights: list[Tensor] = [parameter for _, _, parameter in own]
        self._copies: list[Tensor] = [
            nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), p.requires_grad) for p in self._weights
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the layers have the copies, and their own weights again afterwards."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._weights)
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(self._weights)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Add the gradients of the copies to those of the weights; to be called after every backward."""
        learned = [pair for pair in zip(self._weights, self._copies, strict=True) if pair[1].grad is not None]
        halves = [copy.grad for _, copy in learned if copy.grad is not None]
        if not halves:
            return
        cast = [torch.empty_like(weight) for weight, _ in learned]
        torch._foreach_copy_(cast, halves)
        old = [(w.grad, new) for (w, _), new in zip(learned, cast, strict=True) if w.grad is not None]
        if old:
            torch._foreach_add_([grad for grad, _ in old], [new for _, new in old])
        for (weight, copy), new in zip(learned, cast, strict=True):
            weight.grad = new if weight.grad is None else weight.grad
            copy.grad = None

    def _put(self, values: Iterable[Any]) -> None:
        for (held, name), value in zip(self._places, values, strict=True):
            held[name] = value


def _halved(module: nn.Module, given: object, made: Tensor) -> Tensor:
    return made.bfloat16() if torch.is_autocast_enabled(made.device.type) else made


def _keep_type(layer: nn.Module) -> None:
    layer.forward = MethodType(_in_own_type, layer)


def _in_own_type(layer: nn.Module, given: Tensor) -> Tensor:
    """Of input and weights, where these are one; elsewhere as autocast has it."""
    made: Tensor
    if given.dtype != layer.weight.dtype:
        made = type(layer).forward(layer, given)
    else:
        with torch.autocast(given.device.type, enabled=False):
            made = type(layer).forward(layer, given)
    return made


def half_weights(cfg: RunConfig, networks: Networks) -> HalfWeights | None:
    """Of the networks that an update of a run calls; None for a run that compares the weights themselves.

    source_free reads the rows of its classifier, so that only encoders have them there.
    """
    if cfg.loss_weights.anchor:
        return None
    called: list[Any] = [networks.student] if cfg.supervised else [networks.student, networks.teacher]
    if cfg.method == "source_free":
        called = [network.encoder for network in called]
    return HalfWeights([*called, *([] if networks.imagenet is None else [networks.imagenet])])


@dataclass(frozen=True)
class Parts:
    """Networks and optimiser are the same on every process; class memory and watch are its own."""

    networks: Networks
    memory: ClassMemory
    optimizer: torch.optim.Optimizer
    watch: Watch | None = None  # proxies; see `loop.observe`
    halves: HalfWeights | None = None  # where networks compute in bfloat16

    # Found once: to walk through all modules takes longer than to use what is found. Not while `halves` are in place.
    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """Parameters of the student, in its order."""
        return [parameter for parameter in self.networks.student.parameters() if parameter.requires_grad]

    @cached_property
    def averaged(self) -> list[nn.Parameter]:
        """Parameters of the teacher that follow those `trained`."""
        return averaged(self.networks.teacher, self.networks.student)

    @cached_property
    def statistics(self) -> list[Tensor]:
        """Running statistics of the student's batch norm."""
        norms = [module for module in self.networks.student.modules() if isinstance(module, _BatchNorm)]
        found = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        return [statistic for statistic in found if statistic is not None]

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
    finished: T2SDAForSemanticSegmentation | None = None,
) -> Parts:
    """The parts of a run at its start, on the device of the process, or in pieces on all of them. Collective.

    Args:
        cfg: the run.
        student: with its initial weights, equal on every process; not copied.
        translate: the translation engine.
        accelerator: of this process.
        watch: of the run; None watches nothing.
        finished: what the student is distilled from, if it is.
    """

    def prepared(_: str, network: nn.Module) -> nn.Module:
        # "evaluation_mode" only means: no DDP wrapper. Autocast goes inside forward, losses stay float32.
        network = accelerator.prepare_model(network, evaluation_mode=True)
        if shards(accelerator):
            shard(network, accelerator)
        return network

    attend_in_groups(student)
    networks = make_networks(cfg, student, translate, finished).each(prepared)
    memory = ClassMemory(len(cfg.classes), cfg.projector.dim).to(accelerator.device)
    halves = half_weights(cfg, networks) if accelerator.mixed_precision == "bf16" and not shards(accelerator) else None
    return Parts(networks, memory, make_optimizer(student.pretrained_encoder, student, cfg.optim), watch, halves)
