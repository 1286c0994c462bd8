"""SimCLR's blur against a convolution written out."""

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from t2sda_hf.config import GaussianBlurConfig, TranslateConfig
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.gaussian_blur import simclr_blur


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(num: int = 2, height: int = 50, width: int = 21) -> Tensor:
    return torch.rand(num, 3, height, width, generator=random(3))


def slow(image: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """(3,H,W), borders reflected without repeating the edge."""
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    result = np.zeros_like(image)
    for i, a in enumerate(taps):
        for j, b in enumerate(taps):
            result += a * b * padded[:, i : i + image.shape[1], j : j + image.shape[2]]
    return result / sum(taps) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_twin_with_a_kernel_of_a_tenth_of_the_height(seed):
    shares = torch.rand(2, 2, generator=random(seed))[:, 1]  # the first of each pair is the coin
    result = simclr_blur(images(), 1.0, (0.1, 2.0), random(seed))
    for image, blurred, share in zip(images(), result, shares.tolist(), strict=True):
        expected = slow(image.double().numpy(), 0.1 + 1.9 * share, radius=2)  # 50 rows: 5 taps
        np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-6)


def test_half_of_the_images_are_blurred_each_by_its_own_amount():
    same = images(1).expand(400, -1, -1, -1)
    result = build_engine(TranslateConfig(engine="gaussian_blur"))(same, None, random())
    kept = (result == same).flatten(1).all(1)
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.08)
    # σ near 0.1 leaves an image as it is, up to rounding; almost all others differ from each other.
    assert len(torch.unique(result[~kept].flatten(1), dim=0)) > 0.9 * (~kept).sum()


def test_a_wide_kernel_fits_a_narrow_image():
    result = simclr_blur(images(1, height=200, width=4), 1.0, (1.0, 1.0), random())
    assert torch.isfinite(result).all()
    assert result.mean().item() == pytest.approx(images(1, 200, 4).mean().item(), abs=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probability": 1.5}, "gaussian_blur.probability must be in"),
        ({"sigma": (2.0, 1.0)}, "gaussian_blur.sigma must be the lower one and then the higher"),
        ({"sigma": (0.0, 1.0)}, "gaussian_blur.sigma must be positive in every place"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GaussianBlurConfig(**values)
