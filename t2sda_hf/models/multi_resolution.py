"""HRDA: one network at two scales (Hoyer et al. 2022; method 1.5).

The *context* is the whole image at half its size, the *detail* a crop at full size, or overlapping crops that cover it.
A box of a crop is (top, left, height, width). It is handed in and handed out, never kept.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .heads import upsample

Box = tuple[int, int, int, int]
Size = tuple[int, int]


def context_images(images: Tensor) -> Tensor:
    """The images at half their size, bilinear without antialiasing: (B,C,H,W) -> (B,C,H/2,W/2), rounded down.

    For even sides this is the mean of two by two pixels.
    """
    return F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)


def draw_detail_box(size: Size, crop_size: Size, grid: int, generator: Generator) -> Box:
    """A crop in an image, at a multiple of `grid` pixels from its top left corner.

    As in the public code the crop never touches the far border, unless it is as large as the image: 512 in 1024
    pixels has the offsets 0, 8, ..., 504.

    Args:
        size: (height, width) of the image.
        crop_size: (height, width). A side that the image does not have is the image's.
        grid: pixels per cell of the context's logits: twice their stride.
        generator: of the CPU; two numbers are drawn.
    """

    def offset(side: int, crop: int) -> int:
        return grid * int(torch.randint(max((side - crop + 1) // grid, 1), (), generator=generator))

    top, left = (offset(side, crop) for side, crop in zip(size, crop_size, strict=True))
    return top, left, min(crop_size[0], size[0]), min(crop_size[1], size[1])


def slide_boxes(size: Size, crop_size: Size) -> list[Box]:
    """Crops half overlapping that cover an image, row by row; the last of a row or column lies flush with the border.

    512x512 in 1024x1024 are nine.
    """

    def starts(side: int, crop: int) -> list[int]:
        last = max(side - crop, 0)
        return [*range(0, last, crop // 2), last]

    height, width = min(crop_size[0], size[0]), min(crop_size[1], size[1])
    return [
        (top, left, height, width) for top in starts(size[0], crop_size[0]) for left in starts(size[1], crop_size[1])
    ]


def cut(maps: Tensor, box: Box) -> Tensor:
    """The pixels of `box`: (...,H,W) -> (...,height,width), a view."""
    top, left, height, width = box
    return maps[..., top : top + height, left : left + width]


def scaled(box: Box, stride: int) -> Box:
    """A box in pixels -> the same in cells of `stride` pixels."""
    top, left, height, width = (side // stride for side in box)
    return top, left, height, width


def pad_to_grid(images: Tensor, grid: int, smallest: int) -> Tensor:
    """Zeros (of normalised images: the mean colour) below and to the right, up to a multiple of `grid`."""
    height, width = (max(-side % grid + side, smallest) - side for side in images.shape[-2:])
    return F.pad(images, (0, width, 0, height)) if height or width else images


def mean_of_crops(crops: Sequence[Tensor], boxes: Sequence[Box], size: Size) -> Tensor:
    """Put overlapping crops back: every cell is the mean of the crops that saw it.

    Args:
        crops: (B,K,height,width) each.
        boxes: where they lie, in cells; together they cover everything.
        size: (h,w) of the whole.

    Returns:
        (B,K,h,w).
    """
    total = crops[0].new_zeros(*crops[0].shape[:2], *size)
    count = crops[0].new_zeros(size)
    for crop, box in zip(crops, boxes, strict=True):
        cut(total, box).add_(crop)
        cut(count, box).add_(1)
    return total / count


def fuse(context_logits: Tensor, detail_logits: Tensor, attention: Tensor, box: Box | None = None) -> Tensor:
    """z = ζ(a)·z_detail + ζ((1-a)·z_context), ζ bilinear to twice the size, classes apart (HRDA's equation 9 and 10).

    Args:
        context_logits: (B,K,h,w).
        detail_logits: (B,K,2h,2w), or those of a crop.
        attention: (B,K,h,w) in [0,1], the weight of the detail.
        box: of the crop, in cells of the *detail* logits, all even. Outside of it the attention is 0. None: no crop.

    Returns:
        (B,K,2h,2w).
    """
    height, width = context_logits.shape[-2:]
    size = (2 * height, 2 * width)
    if box is not None:
        mask = torch.zeros_like(attention)
        cut(mask, scaled(box, 2)).fill_(1)
        attention = attention * mask
        top, left, *_ = box
        below, right = size[0] - top - box[2], size[1] - left - box[3]
        detail_logits = F.pad(detail_logits, (left, right, top, below))
    return upsample(attention, size) * detail_logits + upsample((1 - attention) * context_logits, size)
