"""Patch masking of masked image consistency (MIC, Hoyer et al. 2023; method 2.8)."""

import torch
from torch import Generator, Tensor

from ..device import sent


def mask_patches(images: Tensor, block_size: int, ratio: float, generator: Generator) -> Tensor:
    """Set squares of the images to 0, drawn per image and square.

    The grid has round(H/block_size) x round(W/block_size) cells, at least one, stretched over the image (nearest);
    with sides that divide, every cell is block_size pixels wide.

    Args:
        images: (B,C,H,W), normalised, so that 0 is the mean colour.
        block_size: in pixels.
        ratio: probability in [0,1] of a cell to be hidden.
        generator: of the CPU.

    Returns:
        (B,C,H,W), a new tensor.
    """
    num, _, height, width = images.shape
    rows, columns = (max(round(side / block_size), 1) for side in (height, width))
    kept = (torch.rand(num, 1, rows, columns, generator=generator) >= ratio).to(images.dtype)
    kept = sent(kept, images.device)
    if height % rows or width % columns:
        return images * torch.nn.functional.interpolate(kept, size=(height, width), mode="nearest")
    cells = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return (cells * kept[:, :, :, None, :, None]).view_as(images)
