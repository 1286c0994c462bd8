"""What travels through an objective, and what comes back from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..batch import UdaBatch, normalize
from ..config import RunConfig
from ..device import constant
from ..losses.pull import class_counts
from ..models import T2SDAForSemanticSegmentation
from ..teacher import make_teacher
from ..translate import TranslationEngine
from .drop_path import drop_paths_at_once


class ClassMemory(nn.Module):
    """Running class statistics for the choices that remember: prototypes, confidences, and how often classes occur.

    Buffers only, so it is saved and loaded like a model. All start at 0; a class is remembered once it was seen.
    """

    prototypes: Tensor  # (K,D) float32
    seen: Tensor  # (K,) bool
    confidences: Tensor  # (K,) float64
    labelled_pixels: Tensor  # (K,) float64, so far

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("confidences", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("labelled_pixels", torch.zeros(num_classes, dtype=torch.float64))

    def remember_prototypes(self, prototypes: Tensor, present: Tensor, momentum: float) -> Tensor:
        """momentum·old + (1-momentum)·new for present classes, the new one at first sight; returns all, (K,D)."""
        old_share = momentum * self.seen.float()
        blended = old_share[:, None] * self.prototypes + (1 - old_share)[:, None] * prototypes
        self.prototypes.copy_(torch.where(present[:, None], blended, self.prototypes))
        self.seen |= present
        return self.prototypes

    def class_weights(self, cap: float) -> Tensor:
        """(K,) float32: share of the labelled pixels so far ^-1/2, of mean 1 over these pixels, then capped."""
        shares = (self.labelled_pixels / self.labelled_pixels.sum().clamp(min=1)).clamp(min=1e-12)
        return (shares.rsqrt() / shares.sqrt().sum()).clamp(max=cap).float()

    def remember_confidences(self, confidences: Tensor, present: Tensor, momentum: float = 0.99) -> None:
        blended = momentum * self.confidences + (1 - momentum) * confidences
        self.confidences.copy_(torch.where(present, blended, self.confidences))


@dataclass(frozen=True)
class Networks:
    """The networks of a run, and its translation engine, which may be one, too. Only the student is trained."""

    student: nn.Module
    teacher: nn.Module
    imagenet: nn.Module | None  # frozen encoder of the feature distance; None if nobody asks for it
    translate: TranslationEngine
    start: nn.Module | None = None  # frozen: the student as it started, or what it is taught by; None: not asked for

    def each(self, change: Callable[[str, nn.Module], nn.Module]) -> "Networks":
        """The same with each network replaced by what `change` makes of its name and it."""
        imagenet = None if self.imagenet is None else change("imagenet", self.imagenet)
        start = None if self.start is None else change("start", self.start)
        student, teacher = change("student", self.student), change("teacher", self.teacher)
        return Networks(student, teacher, imagenet, self.translate, start)


def make_networks(
    cfg: RunConfig,
    student: T2SDAForSemanticSegmentation,
    translate: TranslationEngine,
    finished: T2SDAForSemanticSegmentation | None = None,
) -> Networks:
    """A run's networks out of its student, which is not copied, and of the finished model that it is distilled from.

    The frozen encoder is what the student's is now: before the training, so that it is the pretrained one itself.
    """
    drop_paths_at_once(student)
    anchored = not cfg.supervised and cfg.loss_weights.feature_distance > 0
    imagenet = make_teacher(student.encoder).eval() if anchored else None
    start: nn.Module | None = make_teacher(student).eval() if cfg.loss_weights.anchor else None
    if finished is not None:
        start = finished.requires_grad_(False).eval()
    return Networks(student, make_teacher(student), imagenet, translate, start)


@dataclass(frozen=True)
class Step:
    """One batch on its way through an objective, with all that may be asked on the way.

    Attributes:
        batch: on the device, images in [0,1].
        networks: of the run.
        cfg: the run.
        memory: of the run; the only thing here that an objective changes.
        generator: of the CPU, for what the host must know, and for a few numbers that it sends.
        device_generator: of the device, for many numbers: the samples of the pull.
        sum_over_processes: sums a tensor of statistics over all processes. A collective: every process calls it the
            same number of times, whatever its batch shows.
        index: of the running update, from 0.
    """

    batch: UdaBatch
    networks: Networks
    cfg: RunConfig
    memory: ClassMemory
    generator: Generator
    device_generator: Generator
    sum_over_processes: Callable[[Tensor], Tensor]
    index: int

    @property
    def pulls(self) -> bool:
        """Whether there is an L_pull in this update."""
        return self.cfg.loss_weights.pull > 0 and self.index >= self.cfg.full_from

    @property
    def adapts(self) -> bool:
        """Whether there is a loss on the target in this update, or it is still one of those on the source alone."""
        return self.index >= self.cfg.adapts_from

    @property
    def source_ce_on(self) -> str:
        """What L_source sees in this update: "source" or "ptarget"."""
        on = self.cfg.uda.source_ce_on
        return ("source", "ptarget")[self.index % 2] if on == "both" else on

    @property
    def translates(self) -> bool:
        """Whether this update needs pseudo-target images."""
        return self.cfg.translates and (self.adapts or self.source_ce_on == "ptarget")

    def weigh_labelled(self) -> Tensor | None:
        """(B,H,W) weights of the labelled pixels in a cross-entropy; None if all weigh 1.

        To be called once per step, because it counts them. A collective, see `sum_over_processes`.
        """
        balance, labels = self.cfg.balance, self.batch.source_labels
        if balance.labelled == "none" and not balance.doubt:
            return None
        counts = self.sum_over_processes(class_counts(labels, len(self.cfg.classes)).double())
        self.memory.labelled_pixels += counts
        if balance.labelled == "none":
            return None
        weights = self.memory.class_weights(balance.cap)
        return torch.cat([weights, weights.new_zeros(256 - len(weights))])[labels]

    def normalized(self, images: Tensor) -> Tensor:
        """`normalize`, and only once of the source's images, which several networks see."""
        return self._source_pixels if images is self.batch.source_images else normalize(images)

    @cached_property
    def _source_pixels(self) -> Tensor:
        return normalize(self.batch.source_images)

    @property
    def num_members(self) -> int:
        """C, the number of classes of the benchmark."""
        return len(self.cfg.pull.class_set or self.cfg.classes)

    @property
    def members(self) -> Tensor:
        """(K,) bool on the device, the classes of the benchmark."""
        wanted = self.cfg.pull.class_set or self.cfg.classes
        device = self.batch.source_labels.device
        return constant(tuple(name in wanted for name in self.cfg.classes), device, torch.bool)


@dataclass(frozen=True)
class Graph:
    """The losses of one autograd graph, and what the objective looked at on the way to them.

    Attributes:
        losses: unweighted, by the names of `LossWeights`: () float32 with a gradient.
        seen: by name. References: nothing is computed for it, and nothing in it has a gradient. What an objective does
            not look at is not there.

            source_images, pseudo_target_images, target_images, mixed_images: (B,3,H,W) in [0,1]
            source_labels, pseudo_labels, mixed_labels: (B,H,W)
            source_logits, teacher_logits, mixed_logits: (B,K,h,w)
            confidence, pixel_weights: (B,H,W) of the pseudo-labels
            mixed_weights, from_source: (B,H,W) of the mixed image
            trust: (), the mean weight of the pseudo-labels in the target loss
            samples, prototypes, class_weights: what the queries are compared with: `PullSamples`, (K,D), (K,)
    """

    losses: dict[str, Tensor]
    seen: Mapping[str, Any]

    @property
    def logged(self) -> dict[str, Tensor]:
        """What the log says of it, detached: the losses, and the trust if pseudo-labels were learned."""
        numbers = self.losses | ({"trust": self.seen["trust"]} if "trust" in self.seen else {})
        return {name: value.detach() for name, value in numbers.items()}
