"""ClassMix: paste half of the source's classes into the target (DACS, DAFormer; method 2.6)."""

from typing import Literal

import torch
from torch import Generator, Tensor

from ..device import sent


def sample_class_mix(
    labels: Tensor, shown: Tensor, classes_from: Literal["batch", "image"], generator: Generator
) -> Tensor:
    """Where each mixed image shows the source.

    For every image ⌈k/2⌉ of k classes are drawn without replacement; 255 counts as a class. DACS takes the k classes
    of the image. DAFormer's release takes those of the whole batch, so a drawn class may not occur in the image and
    less is pasted; "batch" keeps its numbers comparable.

    Args:
        labels: (B,H,W) int64 source labels.
        shown: (B,256) bool, ids in each of them, see `batch.shown_ids`; on the host, where the draw is made.
        classes_from: "batch" or "image".
        generator: of the CPU.

    Returns:
        (B,H,W) bool. A single class is pasted whole.
    """
    pasted = torch.zeros_like(shown)
    for of_image, own in zip(pasted, shown, strict=True):
        pool = (shown.any(dim=0) if classes_from == "batch" else own).nonzero()[:, 0]
        drawn = torch.randperm(len(pool), generator=generator)[: (len(pool) + 1) // 2]
        of_image[pool[drawn]] = True
    return sent(pasted, labels.device).gather(1, labels.flatten(1)).view_as(labels)
