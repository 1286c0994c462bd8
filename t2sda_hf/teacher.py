"""The mean teacher: how it follows the student, and what it says of the target (paper section 3.1; method 2.1-2.5)."""

import copy
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .device import constant, integers


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student, parameters and buffers, in the mode the teacher keeps for ever.

    Dropout and drop path are off, but batch norm uses the statistics of the batch at hand, as in DAFormer: the
    average covers parameters only, so running statistics would be stale. Parameters that the student does not train
    are the student's own, in the same memory.
    """
    frozen = {id(parameter): parameter for parameter in student.parameters() if not parameter.requires_grad}
    teacher = copy.deepcopy(student, dict(frozen)).requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, _BatchNorm) and id(module.weight) not in frozen:
            module.train()
    return teacher


def ema_momentum(num_updates: int, final: float) -> float:
    """Weight of the old teacher after `num_updates` >= 1 finished optimiser updates.

    min(1 - 1/(num_updates + 1), final): 1 update gives 0.5, 9 give 0.9; 0.999 is reached after 999. DAFormer computes
    the same number one line later, at the start of the next iteration; calling it with the index of the running step
    would copy the student at first.
    """
    return min(1 - 1 / (num_updates + 1), final)


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_t <- a·θ_t + (1-a)·θ_s for every parameter that is trained; buffers (batch norm's running statistics) stay."""
    follow(averaged(teacher, student), [new for new in student.parameters() if new.requires_grad], momentum)


def averaged(teacher: nn.Module, student: nn.Module) -> list[nn.Parameter]:
    """Those parameters of the teacher that follow the student's, in the order of these."""
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    return [old for old, new in pairs if new.requires_grad]


@torch.no_grad()
def follow(averaged: Sequence[Tensor], trained: Sequence[Tensor], momentum: float) -> None:
    """`update_teacher` for who has found the parameters already."""
    torch._foreach_lerp_(tuple(averaged), tuple(trained), 1 - momentum)


def class_probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities of the classes, of which the largest and its class are confidence and pseudo-label.

    Args:
        logits: (B,K,h,w), upsampled bilinearly to `size`.
        size: (H,W).

    Returns:
        (B,K,H,W) float32 softmax over classes.
    """
    logits = logits.float().contiguous()  # softmax and max over classes are twice as slow on channels_last
    return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)


def pseudo_label_weights(
    confidence: Tensor,
    threshold: float,
    scope: Literal["batch", "image"] = "batch",
    ignore_top: int = 0,
    ignore_bottom: int = 0,
) -> Tensor:
    """How far pseudo-labels are trusted: the share of pixels with confidence >= threshold (paper eq. 3; method 2.5).

    Args:
        confidence: (B,H,W) in [0,1].
        threshold: δ_p.
        scope: one share for the batch (the public code) or for each image (the paper's letter).
        ignore_top, ignore_bottom: rows set to 0 afterwards; they still count in the share.

    Returns:
        (B,H,W) float32 in [0,1].
    """
    over = (0, 1, 2) if scope == "batch" else (1, 2)
    share = (confidence >= threshold).mean(dim=over, keepdim=True, dtype=torch.float32)
    return share * trusted_rows(confidence, ignore_top, ignore_bottom)


def surest_of_each_class(
    pseudo_labels: Tensor, confidence: Tensor, inside: Tensor, share: float, threshold: float, num_classes: int
) -> Tensor:
    """Which pseudo-labels are trusted if no class may be left out (class-balanced self-training, arXiv 1810.07911).

    Of the n pixels of a class those are the ⌈share·n⌉ surest, and all that are as sure as the least sure of them; and
    whatever is as sure as the threshold.

    Args:
        pseudo_labels: (B,H,W) int64 in [0,K).
        confidence: (B,H,W) in (0,1], 1/K at least.
        inside: (B,H,W), 0 where nothing is trusted or counted.
        share: in (0,1].
        threshold: δ_p.
        num_classes: K.

    Returns:
        (B,H,W) float32, 1 or 0.
    """
    places = pseudo_labels + (1 - confidence.double())  # class by class, the surest first
    ordered = torch.where(inside > 0, places, num_classes).flatten().sort().values
    starts = torch.searchsorted(ordered, integers(num_classes + 1, torch.float64, places.device))
    counts = starts.diff()
    last = starts[:-1] + ((counts * share - 1e-9).ceil().long() - 1).clamp(min=0)
    limits = ordered[last.clamp(max=len(ordered) - 1)]  # (K,)
    trusted = (places <= limits[pseudo_labels]) | (confidence >= threshold)
    return (trusted & (inside > 0)).float()


def undoubted(probabilities: Tensor, pseudo_labels: Tensor, class_weights: Tensor) -> Tensor:
    """Which pseudo-labels stay the likeliest when probabilities are weighed by class (logit adjustment, arXiv
    2007.07314): with larger weights for rare classes these are the ones that no rarer class comes near.

    Args:
        probabilities: (B,K,H,W).
        pseudo_labels: (B,H,W) int64, the likeliest classes.
        class_weights: (K,) > 0.

    Returns:
        (B,H,W) bool.
    """
    return (probabilities * class_weights[:, None, None]).argmax(dim=1) == pseudo_labels


def trusted_rows(maps: Tensor, ignore_top: int, ignore_bottom: int) -> Tensor:
    """(B,H,W) float32 for maps of this size: 0 in so many rows at the top and at the bottom, 1 between them."""
    inside = tuple(ignore_top <= row < maps.shape[1] - ignore_bottom for row in range(maps.shape[1]))
    return constant(inside, maps.device)[:, None].expand_as(maps)


@torch.no_grad()
def take_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by the average over these batches (AdaBN, arXiv 1603.04779).

    In training every forward normalises by its own batch, and running statistics are those of source, mixed and
    pseudo-target images together. A network that will only see the target is better served by the target's.

    Args:
        network: a whole student, in any mode, which it keeps. Weights stay.
        batches: (B,3,H,W) normalised images of one domain and of one size; at least one.
    """
    modes = [(module, module.training) for module in network.modules()]
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the average of all
    try:
        for images in batches:
            network(images, project=True)  # so that every norm sees them
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


def with_statistics_of(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The teacher as it can be evaluated: its parameters, not copied, with the student's running statistics.

    The average covers parameters only, and in training the teacher normalises by the batch; for single test images
    it needs running statistics, and the student's belong to nearly the same weights.
    """
    copied = copy.deepcopy(teacher, {id(parameter): parameter for parameter in teacher.parameters()})
    for own, given in zip(_norm_buffers(copied), _norm_buffers(student), strict=True):
        own.copy_(given)
    return copied.eval()


def _norm_buffers(network: nn.Module) -> list[Tensor]:
    norms = (module for module in network.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]
