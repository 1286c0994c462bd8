"""HRDA written from its paper (sections 3.2 to 3.4) and method.md 1.5, pixel by pixel where it can be."""

from collections.abc import Callable

import torch
from reference.segmentation import bilinear
from torch import Tensor

Maps = Callable[[Tensor], Tensor]


def halved(images: Tensor) -> Tensor:
    """Bilinear at half the size: the middle of an output pixel lies between two by two inputs."""
    batch, channels, height, width = images.shape
    out = torch.empty(batch, channels, height // 2, width // 2, dtype=images.dtype)
    for y in range(height // 2):
        for x in range(width // 2):
            out[..., y, x] = images[..., 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(-2, -1))
    return out


def doubled(maps: Tensor) -> Tensor:
    """ζ"""
    size = (2 * maps.shape[-2], 2 * maps.shape[-1])
    return torch.stack([bilinear(one, size) for one in maps]).to(maps.dtype)


def fused(context: Tensor, detail: Tensor, attention: Tensor, box: tuple[int, int, int, int] | None) -> Tensor:
    """z; `box` (top, left, height, width) in cells of the detail logits."""
    _, _, height, width = context.shape
    attention = attention.clone()
    whole = torch.zeros(*context.shape[:2], 2 * height, 2 * width, dtype=context.dtype)
    if box is None:
        whole[:] = detail
    else:
        top, left, box_height, box_width = box
        for y in range(2 * height):
            for x in range(2 * width):
                if top <= y < top + box_height and left <= x < left + box_width:
                    whole[..., y, x] = detail[..., y - top, x - left]
                else:
                    attention[..., y // 2, x // 2] = 0
    return doubled(attention) * whole + doubled((1 - attention) * context)


def boxes_of_the_slide(height: int, width: int, crop: int) -> list[tuple[int, int, int, int]]:
    """The public code's loop: strides of half a crop, the last one moved back into the image."""
    stride, boxes = crop // 2, []
    for i in range(max(height - crop + stride - 1, 0) // stride + 1):
        for j in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(i * stride + crop, height), min(j * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            boxes.append((top, left, bottom - top, right - left))
    return boxes


def slid(segment: Maps, images: Tensor, crop: int, stride: int, num_classes: int) -> Tensor:
    """Logits of crops one after another, added up and divided by how many saw each cell."""
    batch, _, height, width = images.shape
    total = torch.zeros(batch, num_classes, height // stride, width // stride, dtype=images.dtype)
    count = torch.zeros(height // stride, width // stride, dtype=images.dtype)
    for top, left, box_height, box_width in boxes_of_the_slide(height, width, crop):
        logits = segment(images[..., top : top + box_height, left : left + box_width])
        for y in range(logits.shape[-2]):
            for x in range(logits.shape[-1]):
                total[..., top // stride + y, left // stride + x] += logits[..., y, x]
                count[top // stride + y, left // stride + x] += 1
    return total / count
