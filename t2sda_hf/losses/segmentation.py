"""Pixel-wise cross-entropy with DAFormer's denominator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import integers
from ..labels import IGNORE_INDEX


def segmentation_loss(logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy, divided by the number of *all* pixels (method 2.3).

    Ignored and zero-weight pixels count in the denominator, as in DAFormer's loss (mean over an unreduced map).
    PyTorch's own mean divides by the valid pixels: with many ignored ones the two train differently.

    Args:
        logits: (B,K,h,w), upsampled bilinearly to the labels' size.
        labels: (B,H,W) int64 in [0,K) or 255; or (B,K,H,W) probabilities, all 0 where a pixel is ignored.
        pixel_weights: (B,H,W) >= 0; None weighs every pixel 1.

    Returns:
        () float32 >= 0. All pixels ignored: 0 with a zero gradient.
    """
    if logits.shape[-2:] != labels.shape[-2:]:
        # In this format the backward of the upsampling is four times as fast, and every pixel's scores are one run.
        logits = logits.contiguous(memory_format=torch.channels_last)
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    scores = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).float()
    if labels.dim() == 4:
        loss = F.cross_entropy(scores, labels.permute(0, 2, 3, 1).reshape(scores.shape), reduction="none")
    else:
        loss = F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return (loss if pixel_weights is None else loss * pixel_weights.flatten()).mean()


def as_probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """(B,H,W) int64 in [0,K) or 255 -> (B,K,H,W) float32: 1 for the label, all 0 where it is 255."""
    classes = integers(num_classes, labels.dtype, labels.device)
    return (labels[:, None] == classes[:, None, None]).float()


def soft_label_loss(logits: Tensor, others: Tensor) -> Tensor:
    """KL(p‖q) of the classes q that a network sees from those p of another one, mean over pixels (arXiv 1503.02531).

    Args:
        logits: (B,K,h,w) of the network that learns, brought bilinearly to the size of `others`.
        others: (B,K,H,W) logits without a gradient.

    Returns:
        () float32 >= 0, 0 where both see the same.
    """
    if logits.shape[-2:] != others.shape[-2:]:
        logits = F.interpolate(logits.float(), size=others.shape[-2:], mode="bilinear", align_corners=False)
    wanted = others.float().log_softmax(dim=1)
    return (wanted.exp() * (wanted - logits.float().log_softmax(dim=1))).sum(dim=1).mean()
