"""SimCLR's jitter against torchvision's definitions, one image and one operation at a time."""

import colorsys

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from t2sda_hf.config import ColorJitterConfig, TranslateConfig
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.color_jitter import GREY, simclr_color_jitter


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(num: int = 3) -> Tensor:
    return torch.rand(num, 3, 6, 7, generator=random(5))


def slow(image: np.ndarray, strength: float, generator: Generator) -> np.ndarray:
    """(H,W,3) in [0,1]: what torchvision documents, pixel by pixel."""
    assert float(torch.rand(1, generator=generator)) < 1  # the coin
    draws = [2 * float(u) - 1 for u in torch.rand(4, generator=generator)]
    brightness, contrast, saturation = (max(0.0, 1 + 0.8 * strength * u) for u in draws[:3])
    for operation in torch.randperm(4, generator=generator).tolist():
        grey = image @ np.array(GREY)
        if operation == 0:
            image = image * brightness
        elif operation == 1:
            image = contrast * image + (1 - contrast) * grey.mean()
        elif operation == 2:
            image = saturation * image + (1 - saturation) * grey[..., None]
        else:
            turned = image.copy()
            for position in np.ndindex(*image.shape[:2]):
                h, s, v = colorsys.rgb_to_hsv(*image[position])
                turned[position] = colorsys.hsv_to_rgb((h + 0.2 * strength * draws[3]) % 1, s, v)
            image = turned
        image = image.clip(0, 1)
    return image


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equals_the_slow_twin(seed, strength):
    generator = random(seed)
    expected = [slow(image.permute(1, 2, 0).double().numpy(), strength, generator) for image in images()]
    result = simclr_color_jitter(images(), 1.0, strength, random(seed)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(result.numpy(), np.stack(expected), atol=2e-5)


def test_strength_zero_and_probability_zero_change_nothing():
    torch.testing.assert_close(simclr_color_jitter(images(), 1.0, 0.0, random()), images(), rtol=0, atol=1e-5)
    assert torch.equal(simclr_color_jitter(images(), 0.0, 1.0, random()), images())


def test_the_share_of_changed_images_is_the_probability():
    many = torch.rand(1, 3, 2, 2, generator=random()).expand(2000, -1, -1, -1)
    engine = build_engine(TranslateConfig(engine="color_jitter"))
    changed = (engine(many, None, random()) != many).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.8, abs=0.03)  # SimCLR's; three standard deviations are 0.027


def test_factors_have_the_range_of_simclr():
    """A grey image keeps its colour, and its contrast is none: it shows the brightness alone, 0.2 to 1.8."""
    grey = torch.full((2000, 3, 1, 1), 0.5)
    factors = simclr_color_jitter(grey, 1.0, 1.0, random())[:, 0, 0, 0] / 0.5
    assert factors.min() == pytest.approx(0.2, abs=0.01)
    assert factors.max() == pytest.approx(1.8, abs=0.01)


def test_an_image_that_is_left_alone_does_not_shift_the_draws_of_the_next():
    config = TranslateConfig(engine="color_jitter", color_jitter=ColorJitterConfig(probability=0.5))
    result = build_engine(config)(images(20), None, random(1))
    always = simclr_color_jitter(images(20), 1.0, 1.0, random(1))
    kept = (result == images(20)).flatten(1).all(1)
    assert 3 < kept.sum() < 17
    assert torch.equal(result[~kept], always[~kept])
