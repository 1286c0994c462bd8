"""FDA against the full Fourier transform of the paper's equations."""

import math

import numpy as np
import pytest
import torch
from reference.fda import fda, fda_by_real_transform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from t2sda_hf.device import allow_tf32
from t2sda_hf.translate.fda import fda_translate, low_amplitude, with_low_amplitude

SIZES = [(16, 32), (17, 32), (16, 31), (17, 31), (40, 23), (5, 64)]


def images(size: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    source, target = (torch.rand(2, 3, *size, generator=random, dtype=dtype) for _ in range(2))
    return source, target**2 + 0.1


def band(size: tuple[int, int], beta: float, window: str) -> tuple[int, int]:
    """b of the square, or of each side."""
    if window == "square":
        return math.floor(min(size) * beta), math.floor(min(size) * beta)
    return math.floor(size[0] * beta), math.floor(size[1] * beta)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("window", ["square", "rect"])
def test_equals_the_full_transform(size, beta, window):
    source, target = images(size)
    result = fda_translate(source, target, beta, window)
    rows, columns = band(size, beta, window)
    for index in range(2):
        expected, residue = fda(source[index].numpy(), target[index].numpy(), rows, columns)
        assert residue < 1e-9  # a symmetric window keeps the image real
        np.testing.assert_allclose(result[index].numpy(), expected, atol=1e-12)
        real = fda_by_real_transform(source[index].numpy(), target[index].numpy(), rows, columns)
        np.testing.assert_allclose(real, expected, atol=1e-12)


@pytest.mark.parametrize(("beta", "b"), [(0.01, 5), (0.05, 25), (0.09, 46)])
def test_window_of_the_specification_at_512_by_1024(beta, b):
    """In float32 and grey levels, where the paper works: within a thousandth of a level."""
    source, target = (255 * image[:1] for image in images((512, 1024), dtype=torch.float32))
    expected = fda_by_real_transform(source[0].double().numpy(), target[0].double().numpy(), b, b)
    result = fda_translate(source, target, beta)
    np.testing.assert_allclose(result[0].numpy(), expected, atol=1e-2)
    assert np.abs(result[0].numpy() - expected).mean() < 1e-4


class Tf32(TorchDispatchMode):
    """Products of float32 as a GPU makes them where it may use TF32: of factors with 10 bits after the point."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.backends.cuda.matmul.allow_tf32 and func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            args = [_rounded(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def _rounded(factor: Tensor) -> Tensor:
    if factor.is_complex():
        return torch.complex(_rounded(factor.real), _rounded(factor.imag))
    bits = factor.contiguous().view(torch.int32)
    return (bits + 0x0FFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def may_be_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32("tf32")
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_and_bfloat16_do_not_reach_it(may_be_tf32):
    """Under TF32 it would be off by up to a tenth of a grey level."""
    source, target = (255 * image[:1] for image in images((256, 512), dtype=torch.float32))
    expected = fda_translate(source.double(), target.double(), 0.02)
    plain = fda_translate(source, target, 0.02)
    with Tf32():
        amplitude = low_amplitude.__wrapped__.__wrapped__(target, 0.02)
        rounded = with_low_amplitude.__wrapped__.__wrapped__(source, amplitude)
        found = fda_translate(source, target, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fda_translate(source, target, 0.02), plain)
    assert (rounded - expected).abs().max() > 0.01
    assert (found - expected).abs().max() < 1e-3
    assert torch.equal(found, plain)


def test_float32_is_within_a_ten_thousandth():
    source, target = images((64, 96))
    result = fda_translate(source.float(), target.float(), 0.1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), fda_translate(source, target, 0.1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.2, 0.5])
def test_an_image_in_its_own_style_is_itself(size, beta):
    source, _ = images(size)
    torch.testing.assert_close(fda_translate(source, source, beta), source, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.2, 0.5])
def test_channel_means_become_those_of_the_target(beta):
    source, target = images((16, 33))
    result = fda_translate(source, target, beta)
    torch.testing.assert_close(result.mean((2, 3)), target.mean((2, 3)), rtol=1e-10, atol=0)


def test_beta_zero_changes_the_means_alone():
    source, target = images((16, 33))
    shift = (target.mean((2, 3)) - source.mean((2, 3)))[..., None, None]
    torch.testing.assert_close(fda_translate(source, target, 0.0), source + shift)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", ["square", "rect"])
def test_amplitude_comes_from_the_target_inside_and_everything_else_from_the_source(size, window):
    source, target = images(size)
    spectrum = torch.fft.fft2(fda_translate(source, target, 0.2, window))
    rows, columns = band(size, 0.2, window)
    u = torch.fft.fftfreq(size[0], 1 / size[0], dtype=torch.float64).round().abs()
    v = torch.fft.fftfreq(size[1], 1 / size[1], dtype=torch.float64).round().abs()
    inside = (u[:, None] <= rows) & (v[None, :] <= columns)
    spectrum_s, spectrum_t = torch.fft.fft2(source), torch.fft.fft2(target)
    torch.testing.assert_close(spectrum.abs()[..., inside], spectrum_t.abs()[..., inside])
    torch.testing.assert_close(spectrum[..., ~inside], spectrum_s[..., ~inside])
    torch.testing.assert_close(torch.cos(spectrum.angle() - spectrum_s.angle()), torch.ones_like(source))


def test_square_and_rectangle_differ_in_the_long_side_only():
    source, target = images((20, 60))
    assert torch.equal(fda_translate(source, target, 0.02, "square"), fda_translate(source, target, 0.0, "square"))
    assert not torch.allclose(fda_translate(source, target, 0.02, "rect"), fda_translate(source, target, 0.0, "rect"))
    square = images((20, 20))
    assert torch.equal(fda_translate(*square, 0.2, "square"), fda_translate(*square, 0.2, "rect"))


@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)])
def test_flipping_both_images_flips_the_result(dims):
    source, target = images((17, 30))
    flipped = fda_translate(source.flip(dims), target.flip(dims), 0.2)
    torch.testing.assert_close(flipped, fda_translate(source, target, 0.2).flip(dims))


def test_the_scale_of_the_values_does_not_matter():
    source, target = images((17, 30))
    torch.testing.assert_close(fda_translate(255 * source, 255 * target, 0.2), 255 * fda_translate(source, target, 0.2))


def test_images_and_channels_do_not_mix():
    source, target = images((17, 30))
    whole = fda_translate(source, target, 0.2)
    torch.testing.assert_close(fda_translate(source[1:], target[1:], 0.2), whole[1:])
    torch.testing.assert_close(fda_translate(source.flip(1), target.flip(1), 0.2), whole.flip(1))


def test_a_black_source_takes_a_phase_of_zero():
    """An amplitude of 0 has no phase; numpy's angle(0) is 0."""
    source, target = torch.zeros(1, 3, 16, 32, dtype=torch.float64), images((16, 32))[1][:1]
    expected, _ = fda(source[0].numpy(), target[0].numpy(), 3, 3)
    np.testing.assert_allclose(fda_translate(source, target, 0.2)[0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (17, 17)])
def test_the_largest_window_leaves_a_real_image_of_finite_values(size):
    source, target = images(size)
    result = fda_translate(source, target, 0.5)
    b = (size[0] - 1) // 2
    expected, _ = fda(source[0].numpy(), target[0].numpy(), b, b)
    np.testing.assert_allclose(result[0].numpy(), expected, atol=1e-12)


def test_input_is_left_alone_and_no_gradient_is_recorded():
    source, target = images((16, 32))
    before = source.clone(), target.clone()
    result = fda_translate(source.requires_grad_(), target.requires_grad_(), 0.2)
    assert not result.requires_grad
    assert torch.equal(source, before[0])
    assert torch.equal(target, before[1])


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"one size, got \(2, 3, 16, 32\) and \(2, 3, 16, 31\)\. Resize"):
        fda_translate(images((16, 32))[0], images((16, 31))[0], 0.1)


@pytest.mark.parametrize("beta", [-0.01, 0.51, math.nan])
def test_beta_must_be_a_share(beta):
    with pytest.raises(ValueError, match="beta must be in"):
        fda_translate(*images((16, 32)), beta)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("window", ["square", "rect"])
def test_the_amplitude_is_all_that_is_taken_from_the_target(size, beta, window):
    source, target = images(size)
    amplitude = low_amplitude(target, beta, window)
    expected = torch.fft.fft2(target).abs()
    rows, columns = amplitude.shape[-2] // 2, amplitude.shape[-1] - 1
    u = torch.arange(-rows, rows + 1) % size[0]
    torch.testing.assert_close(amplitude, expected[..., u, : columns + 1], rtol=1e-9, atol=1e-9)
    assert torch.equal(with_low_amplitude(source, amplitude), fda_translate(source, target, beta, window))


@pytest.mark.parametrize("b", [1, 5, 25, 46])
def test_a_kept_amplitude_is_within_a_thousandth_of_a_grey_level(b):
    """The bound of the performance study, against numpy's full transform in float64, up to b = 46."""
    size = (512, 1024)
    source, target = (255 * image[:1].float() for image in images(size))
    amplitude = low_amplitude(target, (b + 0.5) / 512)
    assert amplitude.shape == (1, 3, 2 * b + 1, b + 1)
    kept = amplitude.numpy().tobytes()  # as somebody would store it
    again = torch.frombuffer(bytearray(kept), dtype=torch.float32).view_as(amplitude)
    expected = fda_by_real_transform(source[0].double().numpy(), target[0].double().numpy(), b, b)
    assert np.abs(with_low_amplitude(source, again)[0].numpy() - expected).max() < 1e-3
