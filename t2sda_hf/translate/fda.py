"""Fourier domain adaptation: the low frequencies of the amplitude come from the target (paper eq. 6-8; method 5.1)."""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..device import exact_products

_FREQUENCIES = 5


@torch.no_grad()
def fda_translate(
    source_images: Tensor, target_images: Tensor, beta: float | None, window: Literal["square", "rect"] = "square"
) -> Tensor:
    """Give source images the low-frequency amplitude of target images and keep their phase.

    Per channel, on integer frequencies |u| <= b, |v| <= b with b = ⌊min(H,W)·β⌋ ("square", FDA's published numpy
    code) or |u| <= ⌊βH⌋, |v| <= ⌊βW⌋ ("rect", paper eq. 7), the source's amplitude is replaced by the target's. The
    window is symmetric, so the result is real; FDA's torch code swaps an asymmetric block and is not followed.

    Args:
        source_images: (B,3,H,W) float, any scale.
        target_images: (B,3,H,W) float, the same scale and size.
        beta: β in [0, 0.5]. 0 replaces the channel means alone; None is `beta_for` the size.
        window: "square" or "rect".

    Returns:
        (B,3,H,W) float, not clipped: it may leave the input's range by a few per cent. No gradient.

    Raises:
        ValueError: if the sizes differ or β is out of range.
    """
    if source_images.shape != target_images.shape:
        raise ValueError(
            f"FDA needs source and target of one size, got {tuple(source_images.shape)} and "
            f"{tuple(target_images.shape)}. Resize the target images to the source window."
        )
    return with_low_amplitude(source_images, low_amplitude(target_images, beta, window))


@torch.no_grad()
@exact_products()
def low_amplitude(images: Tensor, beta: float | None, window: Literal["square", "rect"] = "square") -> Tensor:
    """All that FDA takes from a target image: its amplitude on the swapped frequencies.

    A few numbers per image (0.8 KB of float32 at β 0.01 and 512x1024), so it can be kept where the images cannot.

    Args:
        images: (B,3,H,W) float, at the size of the source images that are to be translated.
        beta, window: as in `fda_translate`.

    Returns:
        (B,3,2r+1,c+1): frequencies u = -r..r and v = 0..c; those with v < 0 mirror them.

    Raises:
        ValueError: if β is out of range.
    """
    if beta is None:
        beta = beta_for(min(images.shape[-2:]))
    if not 0 <= beta <= 0.5:
        raise ValueError(f"beta must be in [0, 0.5], got {beta!r}.")
    height, width = images.shape[-2:]
    if window == "square":
        rows = columns = math.floor(min(height, width) * beta)
    else:
        rows, columns = math.floor(height * beta), math.floor(width * beta)
    # At half the sampling rate a frequency and its negative are the same; a side never swaps beyond it.
    rows, columns = min(rows, (height - 1) // 2), min(columns, (width - 1) // 2)
    return _low_block(images, rows, columns).abs()


def beta_for(side: int) -> float:
    """β with which images of this shorter side in pixels swap as many frequencies as the paper's window of 512x1024.

    That is 0.01, and 5 frequencies in each direction: in 64 pixels, 0.01 would swap none.
    """
    return max(0.01, math.ceil(1e4 * _FREQUENCIES / side) / 1e4)


@torch.no_grad()
@exact_products()
def with_low_amplitude(source_images: Tensor, amplitude: Tensor) -> Tensor:
    """`fda_translate` with `low_amplitude` of the target in place of the target.

    Only the few swapped frequencies are computed: with F = E_h x E_w the low block of the spectrum, the result is
    x + Re(E_h* (|F_t|/|F_s| - 1) F_s E_w*) / HW, two thin matrix products instead of two transforms of the image.

    Args:
        source_images: (B,3,H,W) float.
        amplitude: (B,3,2r+1,c+1), of images of the size (H,W).
    """
    height, width = source_images.shape[-2:]
    rows, columns = amplitude.shape[-2] // 2, amplitude.shape[-1] - 1
    source_low = _low_block(source_images, rows, columns)
    # A frequency the source does not have has phase 0, as numpy's angle(0).
    change = (torch.polar(amplitude.to(source_images), source_low.angle()) - source_low).flatten(0, 1)
    back = _fourier_rows(height, -rows, rows, source_images.device, source_low.dtype).mH.expand(len(change), -1, -1)
    parts = torch.view_as_real(torch.bmm(back, change)).flatten(2).flatten(0, 1)  # (B·3·H,2c+2)
    across = _mirrored_fourier_rows(width, columns, source_images.device, source_low.dtype)
    # x + Re(a·conj(b)) / HW, in one product that reads and writes the image once: memory is what this costs.
    image_rows = source_images.reshape(-1, width)
    return torch.addmm(image_rows, parts, across, alpha=1 / (height * width)).view(source_images.shape)


@lru_cache(maxsize=8)
def _fourier_rows(length: int, first: int, last: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows e^{-2πi·u·x/length} of the frequencies first..last; angles in float64, reduced before rounding to `dtype`.

    Kept for the next call: in a run they never change, and nobody writes into them.
    """
    products = (torch.arange(first, last + 1)[:, None] * torch.arange(length)) % length
    angles = -2 * math.pi * products.double() / length
    return torch.polar(torch.ones_like(angles), angles).to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
def _real_fourier_rows(length: int, last: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rows 0..last of `_fourier_rows`, real parts above imaginary ones."""
    rows = _fourier_rows(length, 0, last, device, dtype)
    return torch.cat([rows.real, rows.imag])


@lru_cache(maxsize=8)
def _mirrored_fourier_rows(length: int, last: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same, every real part before its imaginary one; twice those above 0, because those below 0 mirror them."""
    rows = torch.stack(_real_fourier_rows(length, last, device, dtype).chunk(2), dim=1)
    rows[1:] *= 2
    return rows.flatten(0, 1)


def _low_block(images: Tensor, rows: int, columns: int) -> Tensor:
    """Spectrum on the chosen frequencies, (B,3,H,W) -> (B,3,2r+1,c+1). Real product first: the images are real."""
    height, width = images.shape[-2:]
    dtype = torch.complex128 if images.dtype == torch.float64 else torch.complex64
    down = _fourier_rows(height, -rows, rows, images.device, dtype)
    across = _real_fourier_rows(width, columns, images.device, dtype)
    real, imaginary = (across @ images.reshape(-1, width).T).view(len(across), *images.shape[:-1]).chunk(2)
    return (torch.complex(real, imaginary) @ down.T).permute(1, 2, 3, 0)
