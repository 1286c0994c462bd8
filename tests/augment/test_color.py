"""Colour: HSV against the standard library, the jitter and the blur pixel by pixel, and the distributions."""

import colorsys

import pytest
import reference.mixing as slow
import torch
from torch import Generator, Tensor

from t2sda_hf.augment.color import (
    ColorSteps,
    StrongAugmentation,
    blur_kernel_size,
    change_colors,
    color_step,
    draw_jitter,
    gaussian_blur,
    hsv_to_rgb,
    joined,
    photometric_distortion,
    rgb_to_hsv,
    strong_augment,
)


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def corners_and_noise() -> Tensor:
    """All corners and greys of the colour cube, equal pairs of channels, and random colours: (1,3,1,N)."""
    steps = [0.0, 0.25, 0.5, 1.0]
    cube = torch.tensor([[r, g, b] for r in steps for g in steps for b in steps])
    return torch.cat([cube, torch.rand(200, 3, generator=random())]).T.view(3, 1, -1)[None]


# ------------------------------------------------------------------------------------------------------------- HSV


def test_hsv_is_that_of_the_standard_library():
    images = corners_and_noise()
    expected = torch.tensor([colorsys.rgb_to_hsv(*rgb) for rgb in images[0, :, 0].double().T.tolist()])
    hsv = rgb_to_hsv(images)[0, :, 0].T
    turn = (hsv[:, 0] - expected[:, 0] + 0.5) % 1 - 0.5  # 0 and 1 are one hue
    assert turn.abs().max() < 1e-5
    torch.testing.assert_close(hsv[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-6)


def test_rgb_is_that_of_the_standard_library():
    hsv = corners_and_noise()
    expected = torch.tensor([colorsys.hsv_to_rgb(*values) for values in hsv[0, :, 0].double().T.tolist()])
    torch.testing.assert_close(hsv_to_rgb(hsv)[0, :, 0].T, expected, rtol=1e-5, atol=1e-5)


def test_there_and_back_is_the_same_color():
    images = corners_and_noise()
    torch.testing.assert_close(hsv_to_rgb(rgb_to_hsv(images)), images, rtol=1e-5, atol=1e-6)


def test_full_turns_change_nothing():
    hsv = rgb_to_hsv(corners_and_noise())
    turned = hsv + torch.tensor([3.0, 0, 0]).view(1, 3, 1, 1)
    torch.testing.assert_close(hsv_to_rgb(turned), hsv_to_rgb(hsv), rtol=1e-4, atol=1e-5)
    turned = hsv - torch.tensor([2.0, 0, 0]).view(1, 3, 1, 1)
    torch.testing.assert_close(hsv_to_rgb(turned), hsv_to_rgb(hsv), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "turn", [0.0, 1 / 12, 1 / 6, 0.2, 1 / 3, 0.4, 0.5, 0.61, 2 / 3, 0.75, 5 / 6, 0.93, 1.0, -0.2, 3.1]
)
@pytest.mark.parametrize("factor", [None, 0.0, 0.5, 1.0, 1.7, 40.0])
def test_colors_are_changed_as_in_the_standard_library(turn, factor):
    """Of every corner of the cube, where channels are equal and nothing has a hue, and of both sides of every sixth."""
    images = corners_and_noise()
    scale = 1.0 if factor is None else factor
    step = color_step(torch.tensor([turn]), torch.tensor([scale]))
    changed = change_colors(images, ColorSteps(None, (step,)))
    pixels = (colorsys.rgb_to_hsv(*rgb) for rgb in images[0, :, 0].double().T.tolist())
    expected = [colorsys.hsv_to_rgb((h + turn) % 1, min(s * scale, 1), v) for h, s, v in pixels]
    torch.testing.assert_close(changed[0, :, 0].T, torch.tensor(expected), rtol=0, atol=1e-5)
    assert 0 <= changed.min() <= changed.max() <= 1


def test_every_image_is_turned_by_its_own_share():
    images, turns = torch.rand(3, 3, 4, 5, generator=random()), torch.tensor([0.1, -0.4, 0.0])

    def turned(images: Tensor, turns: Tensor) -> Tensor:
        return change_colors(images, ColorSteps(None, (color_step(turns, torch.ones(len(turns))),)))

    together = turned(images, turns)
    for index in range(3):
        alone = turned(images[index, None], turns[index, None])
        torch.testing.assert_close(together[index, None], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(together[2], images[2], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- jitter


def color_jitter(images: Tensor, strength: float, generator: Generator) -> Tensor:
    return change_colors(images, draw_jitter(len(images), strength, generator))


@pytest.mark.parametrize("seed", range(12))
def test_jitter_equals_the_pixel_by_pixel_recipe(seed):
    images = torch.rand(2, 3, 3, 4, generator=random(100 + seed), dtype=torch.float32)
    strength = 0.2 if seed % 2 else 0.5
    jittered = color_jitter(images, strength, random(seed))

    draws = random(seed)  # the four factors of every image, then one order for the batch
    unit = [torch.rand(2, generator=draws) for _ in range(4)]
    order = torch.randperm(4, generator=draws).tolist()
    for index in range(2):
        shift = [float(u[index]) * 2 * strength - strength for u in unit]
        factors = (shift[0], 1 + shift[1], 1 + shift[2], shift[3])
        for i in range(3):
            for j in range(4):
                expected = slow.jitter_pixel(images[index, :, i, j].tolist(), *factors, order)
                assert jittered[index, :, i, j].tolist() == pytest.approx(expected, abs=1e-5)


def test_jitter_of_black_is_additive_and_not_around_a_mean():
    """Brightness alone moves black: contrast scales it, as kornia 0.5.8 does and torchvision does not."""
    images = torch.ones(1, 3, 2, 2)
    images[..., 0] = 0
    blacks = torch.stack([color_jitter(images, 0.2, random(seed))[0, :, :, 0] for seed in range(200)])
    assert (blacks == blacks[:, :1, :1]).all()
    assert 0.4 < (blacks == 0).float().mean() < 0.6  # a negative shift
    assert 0.2 < blacks.max() <= 0.2 * 1.2 + 1e-6


def test_jitter_stays_in_range_and_leaves_its_input_alone():
    images = corners_and_noise().expand(3, -1, -1, -1).contiguous()
    before = images.clone()
    for seed in range(20):
        jittered = color_jitter(images, 1.0, random(seed))
        assert 0 <= jittered.min() <= jittered.max() <= 1
    assert torch.equal(images, before)


def test_jitter_of_strength_zero_changes_nothing():
    images = corners_and_noise()
    torch.testing.assert_close(color_jitter(images, 0.0, random()), images, rtol=0, atol=1e-5)


def test_equal_images_are_jittered_by_factors_of_their_own():
    jittered = color_jitter(torch.rand(1, 3, 4, 4, generator=random()).expand(3, -1, -1, -1), 0.2, random())
    assert not torch.allclose(jittered[0], jittered[1])
    assert not torch.allclose(jittered[1], jittered[2])


# ------------------------------------------------------------------------------------------------------------ blur


@pytest.mark.parametrize(
    ("side", "size"), [(512, 51), (1024, 103), (320, 31), (300, 29), (32, 3), (11, 1), (10, 1), (1, 1)]
)
def test_kernel_size_of_daformer(side, size):
    assert blur_kernel_size(side) == size


def test_kernel_sizes_are_the_largest_odd_number_up_to_a_tenth_rounded_up():
    for side in range(1, 2049):
        tenth = -(-side // 10)
        assert blur_kernel_size(side) in (tenth - 1, tenth)
        assert blur_kernel_size(side) % 2 == 1


@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 3), (1, 5), (1, 1)])
def test_blur_equals_the_two_dimensional_sum(kernel_size):
    images = torch.rand(2, 3, 6, 7, generator=random(), dtype=torch.float64)
    sigmas = torch.tensor([0.4, 1.1], dtype=torch.float64)
    blurred = gaussian_blur(images, sigmas, kernel_size)
    for index in range(2):
        for channel in range(3):
            expected = slow.blur(images[index, channel], float(sigmas[index]), kernel_size)
            torch.testing.assert_close(blurred[index, channel], expected, rtol=1e-10, atol=1e-10)


def test_blur_commutes_with_normalisation():
    images = torch.rand(2, 3, 9, 9, generator=random(), dtype=torch.float64)
    sigmas = torch.tensor([0.3, 1.0])
    normalised = gaussian_blur((images - 0.4) / 0.2, sigmas, (5, 5))
    torch.testing.assert_close(normalised, (gaussian_blur(images, sigmas, (5, 5)) - 0.4) / 0.2)


# -------------------------------------------------------------------------------------------- strong augmentation


def augmented(images: Tensor, jitter: float, blur: float, generator: Generator) -> Tensor:
    return strong_augment([images], [StrongAugmentation.draw(len(images), jitter, 0.2, blur, generator)])[0]


def test_strong_augmentation_with_probability_zero_is_the_image():
    images = torch.rand(2, 3, 16, 16, generator=random())
    assert torch.equal(augmented(images, 0.0, 0.0, random()), images)


@pytest.mark.parametrize("seed", range(5))
def test_strong_augmentation_is_jitter_then_blur(seed):
    images = torch.rand(2, 3, 64, 96, generator=random(9))
    draws = random(seed)
    torch.rand(2, generator=draws)  # whether
    expected = color_jitter(images, 0.2, draws)
    sigmas = torch.rand(2, generator=draws) + 0.15  # U(0.15, 1.15)
    expected = gaussian_blur(expected, sigmas, (7, 9))
    assert torch.equal(augmented(images, 1.0, 1.0, random(seed)), expected)


@pytest.mark.parametrize(("jitter", "blur"), [(0.8, 0.0), (0.0, 0.5), (0.3, 0.0), (0.0, 1.0)])
def test_strong_augmentation_happens_with_its_probability_to_the_whole_batch(jitter, blur):
    images = torch.rand(2, 3, 32, 32, generator=random())
    changed = []
    for seed in range(400):
        made = augmented(images, jitter, blur, random(seed))
        each = [not torch.equal(made[index], images[index]) for index in range(2)]
        assert each[0] == each[1]
        changed.append(each[0])
    assert sum(changed) / 400 == pytest.approx(jitter + blur, abs=0.06)


@pytest.mark.parametrize("seed", range(24))
def test_two_batches_at_once_are_what_they_are_alone(seed):
    """Each in an order of its own, so that steps of one stand beside none of the other; some values are outside."""
    batches = [torch.rand(num, 3, 32, 48, generator=random(seed + num)) * 1.2 - 0.1 for num in (2, 3)]
    drawn = [StrongAugmentation.draw(len(batch), 0.7, 0.5, 0.7, random(9 * seed + len(batch))) for batch in batches]
    before = [batch.clone() for batch in batches]
    together = strong_augment(batches, drawn)
    for made, batch, own, kept in zip(together, batches, drawn, before, strict=True):
        torch.testing.assert_close(made, strong_augment([batch], [own])[0], rtol=0, atol=2e-6)
        assert torch.equal(batch, kept)


def test_all_orders_fit_into_steps_of_one_batch():
    """24 images, each jittered in another order; the largest has as many steps as one alone may have."""
    images = torch.rand(24, 3, 2, 3, generator=random(1)) * 1.2 - 0.1
    found = {}
    for seed in range(400):
        draws = random(seed)
        torch.rand(4, generator=draws)
        found.setdefault(tuple(torch.randperm(4, generator=draws).tolist()), seed)
    assert len(found) == 24
    drawn = [draw_jitter(1, 0.5, random(seed)) for seed in found.values()]
    steps = joined(drawn)
    assert steps.first is not None
    assert len(steps.others) == 2
    together = change_colors(images, steps)
    for image, own, made in zip(images.split(1), drawn, together.split(1), strict=True):
        torch.testing.assert_close(made, change_colors(image, own), rtol=0, atol=2e-6)


# ----------------------------------------------------------------------------------------- photometric distortion


def distorted(rgb: tuple[float, float, float], num: int = 8192) -> Tensor:
    """Many images of one pixel: every image draws for itself, so one call shows the distribution. (num,3)."""
    images = torch.tensor(rgb).view(1, 3, 1, 1).expand(num, -1, -1, -1).contiguous()
    result = photometric_distortion(images, random())
    assert torch.equal(images, torch.tensor(rgb).view(1, 3, 1, 1).expand(num, -1, -1, -1))
    return result[:, :, 0, 0]


def test_grey_is_shifted_and_scaled_each_half_of_the_time():
    """Grey 0.25 stays grey: 0.25 + U(-32,32)/255 with probability 1/2, times U(0.5,1.5) with probability 1/2."""
    values = distorted((0.25, 0.25, 0.25))
    assert torch.allclose(values, values[:, :1], atol=1e-6)
    ratio = values[:, 0] / 0.25
    low, high = 1 - 32 / 255 / 0.25, 1 + 32 / 255 / 0.25
    assert 0.5 * low - 1e-5 <= ratio.min() < 0.3
    assert 2.1 < ratio.max() <= 1.5 * high + 1e-5
    assert (ratio == 1).float().mean().item() == pytest.approx(1 / 4, abs=0.02)
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)


def test_hue_turns_by_whole_steps_of_two_degrees_half_of_the_time():
    """No value is clipped for this colour, so brightness, contrast and saturation leave its hue alone."""
    hue = rgb_to_hsv(distorted((0.5, 0.25, 0.25))[:, :, None, None])[:, 0, 0, 0]
    steps = (hue * 180 + 90) % 180 - 90  # from the red half turn on both sides
    assert (steps - steps.round()).abs().max() < 0.01
    assert set(steps.round().int().tolist()) == set(range(-18, 18))
    still = (steps.abs() < 0.5).float().mean().item()
    assert still == pytest.approx(1 / 2 + 1 / 72, abs=0.02)


def test_saturation_is_scaled_half_of_the_time():
    """Of a colour whose brightness is not shifted (its largest value then tells the contrast apart)."""
    hsv = rgb_to_hsv(distorted((0.5, 0.4, 0.3))[:, :, None, None])[:, :, 0, 0]
    alone = hsv[(hsv[:, 2] - 0.5).abs() < 1e-6]  # neither brightness nor contrast: a quarter of all
    assert len(alone) / len(hsv) == pytest.approx(1 / 4, abs=0.02)
    ratio = alone[:, 1] / 0.4
    assert 0.5 - 1e-4 <= ratio.min() < 0.52
    assert 1.48 < ratio.max() <= 1.5 + 1e-4
    assert ((ratio - 1).abs() < 1e-5).float().mean().item() == pytest.approx(1 / 2, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_distortion_equals_the_pixel_by_pixel_recipe(seed):
    num = 40
    images = torch.rand(num, 3, 1, 2, generator=random(50 + seed)).clamp(0.05, 0.9)
    result = photometric_distortion(images, random(seed))

    draws = random(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num, generator=draws) * (high - low) + low

    def coin() -> Tensor:
        return torch.rand(num, generator=draws) < 0.5

    brightness = uniform(-32 / 255, 32 / 255) * coin()
    contrast = torch.where(coin(), uniform(0.5, 1.5), 1.0)
    saturation = torch.where(coin(), uniform(0.5, 1.5), 1.0)
    turn = torch.randint(-18, 18, (num,), generator=draws) / 180 * coin()
    first = coin()
    for index in range(num):
        factors = [value[index].item() for value in (brightness, contrast, saturation, turn)]
        order = (0, 1, 2, 3) if first[index] else (0, 2, 3, 1)
        for j in range(2):
            expected = slow.jitter_pixel(images[index, :, 0, j].tolist(), *factors, order)
            assert result[index, :, 0, j].tolist() == pytest.approx(expected, abs=1e-5)


def test_distortion_is_a_function_of_the_generator():
    images = torch.rand(2, 3, 5, 6, generator=random())
    first, again, other = (photometric_distortion(images, random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
