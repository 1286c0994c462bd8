"""Cross-entropy, pseudo-label weights and feature distance, pixel by pixel (paper section 3.1; method 2.3 to 2.5)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def interpolation(length: int, new_length: int) -> Tensor:
    """(new,old) weights along one side, pixel centres at half numbers (align_corners=False)."""
    weights = torch.zeros(new_length, length)
    for i in range(new_length):
        place = max((i + 0.5) * length / new_length - 0.5, 0)
        low = int(place)
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, length - 1)] += place - low
    return weights


def bilinear(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(K,h,w) -> (K,H,W)."""
    rows, columns = interpolation(logits.shape[1], size[0]), interpolation(logits.shape[2], size[1])
    return torch.einsum("ih,khw,jw->kij", rows.to(logits), logits, columns.to(logits))


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> float:
    """Logits (B,K,H,W) at the size of the labels; the mean is over all pixels."""
    total = 0.0
    batch, height, width = labels.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                label = int(labels[b, i, j])
                if label != 255:
                    scores = [float(v) for v in logits[b, :, i, j]]
                    loss = math.log(sum(math.exp(v) for v in scores)) - scores[label]
                    total += loss * (1.0 if weights is None else float(weights[b, i, j]))
    return total / (batch * height * width)


def pseudo_label_weights(
    confidence: Tensor, threshold: float, per_image: bool, ignore_top: int, ignore_bottom: int
) -> Tensor:
    """Eq. 3: the share of pixels that are sure enough, then 0 in the margins."""
    batch, height, width = confidence.shape
    sure = [[float(v) >= threshold for v in image.flatten()] for image in confidence]
    result = torch.empty(batch, height, width)
    for b in range(batch):
        counted = sure[b] if per_image else [value for image in sure for value in image]
        for i in range(height):
            inside = ignore_top <= i < height - ignore_bottom
            result[b, i] = sum(counted) / len(counted) if inside else 0.0
    return result


def cell_class(cell: Tensor, min_ratio: float) -> int:
    """The class that covers at least `min_ratio` of a block of labels; 255 for none, and for a mostly ignored block."""
    values = [int(v) for v in cell.flatten()]
    winner = max(set(values), key=values.count)
    return winner if values.count(winner) / len(values) >= min_ratio else 255


def feature_distance(
    features: Tensor, frozen: Tensor, labels: Tensor, classes: Sequence[int], min_ratio: float
) -> float:
    """Mean Euclidean distance over the cells of `classes`; 0 if there are none."""
    batch, channels, rows, columns = features.shape
    height, width = labels.shape[1] // rows, labels.shape[2] // columns
    distances = []
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                cell = labels[b, i * height : (i + 1) * height, j * width : (j + 1) * width]
                if cell_class(cell, min_ratio) in classes:
                    squares = [float(features[b, c, i, j] - frozen[b, c, i, j]) ** 2 for c in range(channels)]
                    distances.append(math.sqrt(sum(squares)))
    return sum(distances) / len(distances) if distances else 0.0
