"""How well classes stand apart: CCD and PDD (paper equations 19 and 20), and similarity across domains (Fig. 1).

Legend: C classes that have pixels, Ω_i pixels of class i, μ_i their mean feature, x a feature. Everything is summed in
float64 over a stream of chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1e-6  # of a sum of cosines that is divided by
_CHUNK = 16_384  # pixels at a time

Stream = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Centres:
    """First and second moments of the features of every class.

    Attributes:
        counts: (K,) pixels.
        means: (K,D) float64; zeros for a class without pixels.
        scatter: (K,) float64, mean of ‖x-μ‖² over the pixels of a class.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor


def centres(stream: Stream, num_classes: int) -> Centres:
    """One pass over (N,D) features and (N,) labels.

    ‖x-μ‖² is taken as ‖x-a‖² - ‖μ-a‖² with a the first feature seen, so that features far from 0 lose no digits.

    Raises:
        ValueError: if no pixel is labelled.
    """
    counts = torch.zeros(num_classes, dtype=torch.float64)
    squares = torch.zeros(num_classes, dtype=torch.float64)
    sums: Tensor | None = None
    origin: Tensor | None = None
    for features, labels in _chunks(stream):
        if sums is None or origin is None:
            sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
            origin = features[0]
        moved = features - origin
        counts += labels.bincount(minlength=num_classes)
        sums.index_add_(0, labels, moved)
        squares.index_add_(0, labels, moved.square().sum(1))
    if sums is None or origin is None:
        raise ValueError("no pixel is labelled with a class of the model: there is nothing to compare.")
    divisor = counts.clamp(min=1)
    means = sums / divisor[:, None]
    scatter = (squares / divisor - means.square().sum(1)).clamp(min=0)
    return Centres(counts, torch.where(counts[:, None] > 0, means + origin, 0.0), scatter)


def class_center_distance(found: Centres) -> np.ndarray:
    """CCD (eq. 19): scatter of a class over the squared distance to the other centres, their mean. Lower is better.

    Returns:
        (K,) float64; NaN for a class without pixels, or if it is the only one.
    """
    present = found.counts > 0
    between = torch.cdist(found.means, found.means, compute_mode="donot_use_mm_for_euclid_dist").square()
    ratio = found.scatter[:, None] / between
    ratio[:, ~present] = 0
    ratio.fill_diagonal_(0)
    distance = ratio.sum(1) / (present.sum() - 1)
    return _known(distance, present)


def pixel_discrimination_distance(stream: Stream, found: Centres) -> np.ndarray:
    """PDD (eq. 20): 1 - mean over pixels of cos(x,μ_own) / Σ of cos(x,μ_j) over the other classes. Lower is better.

    Args:
        stream: the same features again.
        found: their centres.

    Returns:
        (K,) float64; NaN for a class without pixels, or if it is the only one. The sum in the denominator is at least
        1e-6; with features >= 0 it is never negative.
    """
    present = found.counts > 0
    directions = torch.nn.functional.normalize(found.means, dim=1)
    ratios = torch.zeros_like(found.counts)
    for features, labels in _chunks(stream):
        cosines = torch.nn.functional.normalize(features, dim=1) @ directions.T
        own = cosines.gather(1, labels[:, None])[:, 0]
        others = (cosines[:, present].sum(1) - own).clamp(min=_SMALLEST)
        ratios.index_add_(0, labels, own / others)
    return _known(1 - ratios / found.counts.clamp(min=1), present)


def cross_domain_similarity(source: Centres, target: Centres) -> np.ndarray:
    """S_c = cos(μ_c of source, μ_c of target) (method 6.4): (K,) float64, NaN where a domain lacks the class."""
    both = (source.counts > 0) & (target.counts > 0)
    similarity = torch.nn.functional.cosine_similarity(source.means, target.means, dim=1)
    return np.where(both.numpy(), similarity.numpy(), np.nan)


def _known(values: Tensor, present: Tensor) -> np.ndarray:
    known = present & (present.sum() > 1)
    return np.where(known.numpy(), values.numpy(), np.nan)


def _chunks(stream: Stream) -> Iterable[tuple[Tensor, Tensor]]:
    for features, labels in stream:
        for part, part_labels in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
            if len(part):
                yield part.double(), part_labels
