"""FDA by the full Fourier transform (paper eq. 6-8)."""

import numpy as np


def fda(source: np.ndarray, target: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, float]:
    """One image (3,H,W) in float64 with the target's amplitude on |u| <= rows, |v| <= columns.

    Returns:
        The image, and the largest imaginary part that the inverse transform left.
    """
    result, residue = np.empty_like(source), 0.0
    _, height, width = source.shape
    for channel in range(3):
        spectrum_s, spectrum_t = np.fft.fft2(source[channel]), np.fft.fft2(target[channel])
        amplitude, phase = np.abs(spectrum_s), np.angle(spectrum_s)
        for u in range(-rows, rows + 1):
            for v in range(-columns, columns + 1):
                amplitude[u % height, v % width] = np.abs(spectrum_t[u % height, v % width])
        back = np.fft.ifft2(amplitude * np.exp(1j * phase))
        result[channel], residue = back.real, max(residue, float(np.abs(back.imag).max()))
    return result, residue


def fda_by_real_transform(source: np.ndarray, target: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The same with the half spectrum of real images: rows {0..b, H-b..H-1}, columns {0..b}."""
    height, width = source.shape[1:]
    spectrum_s, spectrum_t = np.fft.rfft2(source), np.fft.rfft2(target)
    amplitude, phase = np.abs(spectrum_s), np.angle(spectrum_s)
    swapped = [*range(rows + 1), *range(height - rows, height)]
    for u in swapped:
        amplitude[:, u, : columns + 1] = np.abs(spectrum_t[:, u, : columns + 1])
    return np.fft.irfft2(amplitude * np.exp(1j * phase), s=(height, width))
