"""ClassMix, colour jitter and blur on single pixels (method 2.6)."""

import colorsys
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def class_mix(
    source: Tensor, target: Tensor, labels: Tensor, pseudo_labels: Tensor, weights: Tensor, drawn: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """One image: paste the drawn classes of the source; the pasted pixels have weight 1."""
    image, mixed_labels, mixed_weights = target.clone(), pseudo_labels.clone(), weights.clone()
    height, width = labels.shape
    for i in range(height):
        for j in range(width):
            if int(labels[i, j]) in drawn:
                image[:, i, j] = source[:, i, j]
                mixed_labels[i, j] = labels[i, j]
                mixed_weights[i, j] = 1.0
    return image, mixed_labels, mixed_weights


def jitter_pixel(
    rgb: Sequence[float], brightness: float, contrast: float, saturation: float, hue: float, order: Sequence[int]
) -> list[float]:
    """kornia 0.5.8: additive brightness, contrast without a centre, saturation and hue in HSV, clamped each time."""

    def clamp(value: float) -> float:
        return min(max(value, 0.0), 1.0)

    for operation in order:
        if operation == 0:
            rgb = [value + brightness for value in rgb]
        elif operation == 1:
            rgb = [value * contrast for value in rgb]
        else:
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            rgb = (
                colorsys.hsv_to_rgb(h, clamp(s * saturation), v)
                if operation == 2
                else colorsys.hsv_to_rgb((h + hue) % 1.0, s, v)
            )
        rgb = [clamp(value) for value in rgb]
    return list(rgb)


def reflected(index: int, length: int) -> int:
    """Position of an index outside [0, length) when the border is a mirror that is not repeated."""
    if index < 0:
        return -index
    return 2 * (length - 1) - index if index >= length else index


def blur(channel: Tensor, sigma: float, kernel_size: tuple[int, int]) -> Tensor:
    """(H,W) with a two-dimensional Gaussian kernel of weights that sum to 1."""
    rows, columns = (side // 2 for side in kernel_size)
    height, width = channel.shape
    taps = {
        (y, x): math.exp(-(y * y + x * x) / (2 * sigma**2))
        for y in range(-rows, rows + 1)
        for x in range(-columns, columns + 1)
    }
    total = sum(taps.values())
    result = torch.zeros_like(channel)
    for i in range(height):
        for j in range(width):
            result[i, j] = sum(
                weight / total * channel[reflected(i + y, height), reflected(j + x, width)]
                for (y, x), weight in taps.items()
            )
    return result
