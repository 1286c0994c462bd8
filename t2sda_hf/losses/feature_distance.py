"""Distance of the student's features to those of the frozen ImageNet encoder (DAFormer; method 2.4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import constant
from ..labels import IGNORE_INDEX


def downscale_labels_by_share(labels: Tensor, size: tuple[int, int], num_classes: int, min_ratio: float) -> Tensor:
    """The class that covers at least `min_ratio` of each cell, otherwise 255.

    Args:
        labels: (B,H,W) int64 in [0,K) or 255; H and W are multiples of `size`.
        size: (h,w) of the result.
        num_classes: K.
        min_ratio: share in (0,1]; ignored pixels count as a class of their own, which yields 255.

    Returns:
        (B,h,w) int64.

    Raises:
        ValueError: if H or W is not a multiple of h or w. A remainder would shift labels against features.
    """
    height, width = labels.shape[-2:]
    if height % size[0] or width % size[1]:
        raise ValueError(
            f"labels of {height}x{width} do not divide into {size[0]}x{size[1]} cells: crop to multiples of 32."
        )
    one_hot = F.one_hot(labels.masked_fill(labels == IGNORE_INDEX, num_classes), num_classes + 1)
    shares = F.avg_pool2d(one_hot.permute(0, 3, 1, 2).float(), (height // size[0], width // size[1]))
    share, winner = shares.max(dim=1)
    return winner.masked_fill((winner == num_classes) | (share < min_ratio), IGNORE_INDEX)


def feature_distance(
    features: Tensor,
    frozen_features: Tensor,
    labels: Tensor,
    num_classes: int,
    classes: Sequence[int] | None,
    min_ratio: float,
) -> Tensor:
    """Mean L2 distance over the cells that show one of `classes`.

    Args:
        features: (B,C,h,w) last stage of the student on source images, with gradient.
        frozen_features: (B,C,h,w) the same of the ImageNet encoder.
        labels: (B,H,W) int64 source labels.
        num_classes: K.
        classes: class ids that count (DAFormer: things); None takes every cell, ignored ones too.
        min_ratio: share a class must have of a cell.

    Returns:
        () float32 >= 0; 0 with a zero gradient if no cell counts (the public code returns NaN there).
    """
    difference = features.float() - frozen_features.float()
    cells = torch.ones_like(difference[:, 0], dtype=torch.bool)
    if classes is not None:
        small = downscale_labels_by_share(labels, (features.shape[-2], features.shape[-1]), num_classes, min_ratio)
        cells = torch.isin(small, constant(tuple(classes), small.device, small.dtype))
    # Zeroed before the norm, whose gradient at an exact 0 is defined as 0: no indexing, no empty mean.
    distance = torch.linalg.vector_norm(difference * cells[:, None], dim=1)
    return distance.sum() / cells.sum().clamp(min=1)
