"""ClassMix: paste half of the source's classes into the target (DACS, DAFormer; method 2.6)."""

from typing import Literal

import torch
from torch import Generator, Tensor


def sample_class_mix(labels: Tensor, classes_from: Literal["batch", "image"], generator: Generator) -> Tensor:
    """Where each mixed image shows the source.

    For every image ⌈k/2⌉ of k classes are drawn without replacement; 255 counts as a class. DACS takes the k classes
    of the image. DAFormer's release takes those of the whole batch, so a drawn class may not occur in the image and
    less is pasted; "batch" keeps its numbers comparable.

    Args:
        labels: (B,H,W) int64 source labels.
        classes_from: "batch" or "image".
        generator: of the CPU.

    Returns:
        (B,H,W) bool. A single class is pasted whole.
    """
    whole_batch = labels.unique()
    from_source = torch.empty_like(labels, dtype=torch.bool)
    for index, image_labels in enumerate(labels):
        pool = whole_batch if classes_from == "batch" else image_labels.unique()
        drawn = torch.randperm(len(pool), generator=generator)[: (len(pool) + 1) // 2]
        from_source[index] = torch.isin(image_labels, pool[drawn.to(pool.device)])
    return from_source
