"""Patch masks of MIC: shares, blocks and independence (method 2.8; oracle 8)."""

import pytest
import torch
from torch import Generator

from t2sda_hf.augment.patch_mask import mask_patches


def kept(num: int, size: tuple[int, int], block_size: int = 64, ratio: float = 0.7, seed: int = 0) -> torch.Tensor:
    """(num,H,W) of 0 and 1: where images of ones are left."""
    masked = mask_patches(torch.ones(num, 3, *size), block_size, ratio, Generator().manual_seed(seed))
    assert torch.equal(masked[:, 0], masked[:, 1])
    assert torch.equal(masked[:, 0], masked[:, 2])
    return masked[:, 0]


def test_three_of_ten_squares_are_kept():
    """32 images of 1024² have 8192 squares: the share's deviation is 0.005."""
    mask = kept(32, (1024, 1024))
    assert mask.unique().tolist() == [0, 1]
    assert mask.mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("size", "block"), [((128, 192), 32), ((1024, 1024), 64), ((96, 96), 32)])
def test_every_square_is_one_value(size, block):
    mask = kept(3, size, block)
    cells = mask.unflatten(1, (-1, block)).unflatten(3, (-1, block))
    assert torch.equal(cells.amin((2, 4)), cells.amax((2, 4)))
    assert cells.shape[1:5:2] == (size[0] // block, size[1] // block)


def test_images_squares_and_seeds_are_independent():
    mask = kept(4, (512, 512), 32)
    assert len({tuple(one.flatten().tolist()) for one in mask}) == 4
    assert not torch.equal(mask, kept(4, (512, 512), 32, seed=1))
    assert torch.equal(mask, kept(4, (512, 512), 32))
    # Of a fair pair of neighbours, 0.3·0.7·2 = 0.42 differ, in the grid and between images.
    cells = kept(8, (1024, 1024), 32, seed=2)[:, ::32, ::32]
    for pair in ((cells[:, 1:], cells[:, :-1]), (cells[:, :, 1:], cells[:, :, :-1]), (cells[1:], cells[:-1])):
        assert (pair[0] != pair[1]).float().mean().item() == pytest.approx(0.42, abs=0.04)


def test_what_is_kept_keeps_its_value_and_the_input_is_not_changed():
    images = torch.randn(2, 3, 64, 64, generator=Generator().manual_seed(3))
    before = images.clone()
    masked = mask_patches(images, 16, 0.5, Generator().manual_seed(0))
    left = kept(2, (64, 64), 16, 0.5)[:, None].bool().expand_as(images)
    assert torch.equal(masked[left], images[left])
    assert masked[~left].abs().max() == 0
    assert torch.equal(images, before)


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ends_of_the_ratio(ratio, share):
    assert kept(4, (64, 64), 8, ratio).mean() == share


@pytest.mark.parametrize(("side", "cells"), [(96, 2), (95, 1), (161, 3), (20, 1)])
def test_sides_that_do_not_divide_get_the_nearest_number_of_squares(side, cells):
    """round(H/64): 1.5 is rounded to even, as Python and the public code do; at least one."""
    masks = kept(200, (side, 64))[:, :, 0]
    borders = (masks[:, 1:] != masks[:, :-1]).any(0).nonzero().flatten().add(1).tolist()
    assert borders == [-(-side * cell // cells) for cell in range(1, cells)]
