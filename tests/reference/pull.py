"""The pull loss as the paper writes it, pixel by pixel (section 3; numbers of equations are the paper's).

Everything is float64 and Python. A pixel is (b, i, j); maps are (B,D,h,w), labels (B,h,w).
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

Pixel = tuple[int, int, int]


def pixels(maps: Tensor) -> Iterator[Pixel]:
    batch, height, width = maps.shape[0], maps.shape[-2], maps.shape[-1]
    return ((b, i, j) for b in range(batch) for i in range(height) for j in range(width))


def row_of(pixel: Pixel, maps: Tensor) -> int:
    """The row of a pixel in the (N,D) view."""
    b, i, j = pixel
    return (b * maps.shape[-2] + i) * maps.shape[-1] + j


def unit(vector: Tensor) -> Tensor:
    return vector / (vector @ vector).sqrt()


def prototype(keys: Tensor, labels: Tensor, class_id: int) -> Tensor | None:
    """Eq. 10: the mean teacher feature of the source pixels of a class, before its normalisation (eq. 11)."""
    total, count = torch.zeros(keys.shape[1], dtype=torch.float64), 0
    for b, i, j in pixels(labels):
        if labels[b, i, j] == class_id:
            total, count = total + keys[b, :, i, j].double(), count + 1
    return total / count if count else None


def source_negatives(labels: Tensor, class_id: int) -> set[int]:
    """Eq. 12: labelled source pixels of other classes, as rows."""
    return {row_of(p, labels) for p in pixels(labels) if labels[p] not in (class_id, 255)}


def target_negatives(pseudo_labels: Tensor, confidence: Tensor, alpha: float, class_id: int) -> set[int]:
    """Eq. 13-14: target pixels below the α-quantile γ of confidence that are not predicted as the class, as rows."""
    gamma = np.percentile(confidence.double().numpy().flatten(), 100 * alpha)
    return {
        row_of(p, confidence)
        for p in pixels(confidence)
        if float(confidence[p]) < gamma and pseudo_labels[p] != class_id
    }


def cbqs(counts: Sequence[int], num_classes_of_benchmark: int, num_queries: int) -> list[int]:
    """Eq. 16: ⌈C·p̂(c)·n⌉, in fractions."""
    total = sum(counts)
    return [math.ceil(Fraction(num_classes_of_benchmark * num_queries * count, total)) for count in counts]


def mean_confidence(pseudo_labels: Tensor, confidence: Tensor, class_id: int) -> float | None:
    """Eq. 17: mean confidence of the pixels predicted as a class."""
    values = [float(confidence[p]) for p in pixels(confidence) if pseudo_labels[p] == class_id]
    return sum(values) / len(values) if values else None


def drw(confidences: Sequence[float | None], beta: float, members: Sequence[bool] | None = None) -> list[float]:
    """Eq. 18, w* of every class; a class that is predicted nowhere has confidence 0."""
    members = members or [True] * len(confidences)
    doubts = [1 - (value or 0.0) if inside else None for value, inside in zip(confidences, members, strict=True)]
    largest = max(doubt for doubt in doubts if doubt is not None)
    weights = [0.0 if doubt is None else (doubt / largest) ** beta if largest > 0 else 1.0 for doubt in doubts]
    return [weight / sum(weights) for weight in weights]


def info_nce(query: Tensor, positive: Tensor, negatives: Sequence[Tensor], temperature: float) -> Tensor:
    """Eq. 4 for one query, all vectors of unit length."""
    numerator = torch.exp(query @ positive / temperature)
    denominator = numerator
    for negative in negatives:
        denominator = denominator + torch.exp(query @ negative / temperature)
    return -torch.log(numerator / denominator)


def mse(query: Tensor, positive: Tensor) -> Tensor:
    """‖q - k⁺‖², summed over the channels."""
    return ((query - positive) ** 2).sum()


def pull_loss(
    embeddings: Tensor,
    source_keys: Tensor,
    target_keys: Tensor | None,
    prototypes: Tensor,
    queries: dict[int, list[int]],
    negatives: dict[int, list[tuple[list[int], list[int]]]],
    weights: Sequence[float],
    temperature: float,
    objective: str,
    reduction: str,
    num_classes_of_benchmark: int,
) -> Tensor:
    """Eq. 5 over drawn pixels, with a loop over classes and a loop over queries.

    Args:
        queries: class: rows of its queries.
        negatives: class: for each of its queries the rows of its source and of its target negatives.
    """

    def feature(maps: Tensor, row: int) -> Tensor:
        height, width = maps.shape[-2:]
        return unit(maps[row // (height * width), :, row // width % height, row % width].double())

    total = torch.zeros((), dtype=torch.float64)
    for class_id, rows in queries.items():
        losses = []
        for row, (from_source, from_target) in zip(rows, negatives[class_id], strict=True):
            query, positive = feature(embeddings, row), unit(prototypes[class_id].double())
            if objective == "mse":
                losses.append(mse(query, positive))
                continue
            keys = [feature(source_keys, one) for one in from_source]
            if target_keys is not None:
                keys += [feature(target_keys, one) for one in from_target]
            if keys:
                losses.append(info_nce(query, positive, keys, temperature))
        if not losses:
            continue
        summed = torch.stack(losses).sum()
        total = total + weights[class_id] * (summed if reduction == "sum_paper" else summed / len(losses))
    return total if reduction == "mean_w" else total / num_classes_of_benchmark
