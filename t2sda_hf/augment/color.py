"""Colour: the strong augmentation of mixed images, and the photometric distortion of supervised training.

Hue, saturation and value follow the usual hexagon: hue in [0,1) of a full turn, saturation and value in [0,1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..device import per_channel, sent


def rgb_to_hsv(images: Tensor) -> Tensor:
    """(B,3,H,W) RGB in [0,1] -> (B,3,H,W) hue, saturation, value in [0,1]. Grey has hue 0 and saturation 0."""
    value, largest = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    # Where red is largest: (green - blue)/chroma, where green is: (blue - red)/chroma + 2, where blue is: ... + 4.
    sector = (images.roll(-1, dims=1) - images.roll(-2, dims=1)) / safe[:, None] + per_channel((0, 2, 4), images)
    hue = sector.gather(1, largest[:, None])[:, 0] / 6 % 1.0
    saturation = chroma / torch.where(value > 0, value, 1.0)
    return torch.stack([torch.where(chroma > 0, hue, 0.0), saturation, value], dim=1)


def hsv_to_rgb(images: Tensor) -> Tensor:
    """Inverse of `rgb_to_hsv`; the hue may be any real number of turns."""
    hue, saturation, value = images.unbind(dim=1)
    # Distance of each primary's peak on the hexagon: 5, 3 and 1 sixths of a turn for red, green and blue.
    position = (per_channel((5, 3, 1), images) + hue[:, None] * 6) % 6
    ramp = torch.minimum(position, 4 - position).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * ramp)


def scale_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply the saturation of HSV, up to 1: images (B,3,H,W) in [0,1], factors that broadcast with (B,1,H,W).

    Hue and value stay, so every channel only moves towards or away from the largest one: no turn into HSV and back.
    """
    value = images.amax(dim=1, keepdim=True)
    below = value - images
    chroma = below.amax(dim=1, keepdim=True)
    full = value / chroma.clamp(min=torch.finfo(images.dtype).tiny)  # the factor that brings the saturation to 1
    return torch.addcmul(value, below, torch.minimum(full, factors), value=-1)


def _uniform(num: int, low: float, high: float, generator: Generator) -> Tensor:
    """One number per image."""
    return torch.rand(num, generator=generator) * (high - low) + low


def _per_image(images: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers (B,) that were drawn on the host, each as (B,1,1,1) where the images are; they travel together."""
    return sent(torch.stack(numbers), images.device).view(len(numbers), -1, 1, 1, 1).unbind()


def color_jitter(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """The jitter DAFormer trained with (the semantics of kornia 0.5.8, which later releases changed; method 2.6).

    Brightness is *added*, U(-s,s); contrast *multiplies*, U(1-s,1+s), not around the mean; saturation is scaled in
    HSV by U(1-s,1+s); hue turns by U(-s,s) of a full turn. The order is drawn once for the batch, the factors per
    image, and every result is clamped to [0,1].

    Args:
        images: (B,3,H,W) RGB in [0,1].
        strength: s in [0,1].
        generator: of the CPU.

    Returns:
        (B,3,H,W) in [0,1].
    """
    num = len(images)
    ranges = ((-strength, strength), (1 - strength, 1 + strength), (1 - strength, 1 + strength), (-strength, strength))
    drawn = [_uniform(num, low, high, generator) for low, high in ranges]
    brightness, contrast, saturation, hue = _per_image(images, *drawn)
    for operation in torch.randperm(4, generator=generator).tolist():
        if operation == 0:
            images = images + brightness
        elif operation == 1:
            images = images * contrast
        elif operation == 2:
            images = scale_saturation(images, saturation)
        else:
            h, rest = rgb_to_hsv(images).split([1, 2], dim=1)
            images = hsv_to_rgb(torch.cat([h + hue, rest], dim=1))
        images = images.clamp(0, 1)
    return images


def blur_kernel_size(side: int) -> int:
    """Largest odd number up to ⌈side/10⌉, by DAFormer's formula: 512 -> 51, 1024 -> 103."""
    tenth = math.ceil(0.1 * side)
    return math.floor(tenth - 0.5 + tenth % 2)


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Separable Gaussian blur, one σ per image, borders reflected.

    Args:
        images: (B,3,H,W).
        sigmas: (B,) > 0 in pixels, on the host.
        kernel_size: (height, width), odd; 1 leaves that direction alone.
    """
    num, channels, height, _ = images.shape
    rows, columns = (side // 2 for side in kernel_size)
    padded = F.pad(images, (columns, columns, rows, rows), mode="reflect").reshape(
        1, num * channels, height + 2 * rows, -1
    )
    for dim, radius in ((2, rows), (3, columns)):
        offsets = torch.arange(-radius, radius + 1, dtype=images.dtype)
        taps = torch.exp(-0.5 * (offsets / sigmas.to(images.dtype).view(-1, 1)) ** 2)
        taps = (taps / taps.sum(dim=1, keepdim=True)).repeat_interleave(channels, 0)
        shape = (num * channels, 1, -1, 1) if dim == 2 else (num * channels, 1, 1, -1)
        padded = F.conv2d(padded, sent(taps.view(shape), images.device), groups=num * channels)
    return padded.view(images.shape)


def strong_augment(
    images: Tensor, jitter_probability: float, jitter_strength: float, blur_probability: float, generator: Generator
) -> Tensor:
    """Colour jitter, then Gaussian blur with σ ~ U(0.15, 1.15) per image (method 2.6).

    Whether each of the two happens is drawn once for the batch, its factors per image.

    Args:
        images: (B,3,H,W) RGB in [0,1]. DAFormer blurs normalised values; the blur is linear, so the result is the same.
        jitter_probability, blur_probability: the true probabilities (DAFormer's "0.2" applies if u > 0.2).
        jitter_strength: s of `color_jitter`.
        generator: of the CPU.

    Returns:
        (B,3,H,W) in [0,1].
    """
    jitters, blurs = (
        torch.rand(2, generator=generator) < torch.tensor([jitter_probability, blur_probability])
    ).tolist()
    if jitters:
        images = color_jitter(images, jitter_strength, generator)
    if blurs:
        sigmas = torch.rand(len(images), generator=generator) + 0.15
        height, width = images.shape[-2:]
        images = gaussian_blur(images, sigmas, (blur_kernel_size(height), blur_kernel_size(width)))
    return images


def photometric_distortion(images: Tensor, generator: Generator) -> Tensor:
    """Distortion of supervised training, drawn per image (mmsegmentation's recipe; method 3.4).

    Each with probability 1/2: brightness +U(-32,32)/255; contrast ×U(0.5,1.5), before or after the colour steps by a
    fair coin; HSV saturation ×U(0.5,1.5); hue turned by a whole number of 2-degree steps in -18..17. Every step is
    clamped; unlike the original, values are not rounded to 8 bits between steps.

    Args:
        images: (B,3,H,W) RGB in [0,1].
        generator: of the CPU.
    """
    num = len(images)

    def coin() -> Tensor:
        return torch.rand(num, generator=generator) < 0.5

    brightness = _uniform(num, -32 / 255, 32 / 255, generator) * coin()
    contrast = torch.where(coin(), _uniform(num, 0.5, 1.5, generator), 1.0)
    saturation = torch.where(coin(), _uniform(num, 0.5, 1.5, generator), 1.0)
    turn = torch.randint(-18, 18, (num,), generator=generator) / 180 * coin()
    first = coin()
    before, after = torch.where(first, contrast, 1.0), torch.where(first, 1.0, contrast)
    brightness, before, saturation, turn, after = _per_image(images, brightness, before, saturation, turn, after)
    images = ((images + brightness).clamp(0, 1) * before).clamp(0, 1)
    h, s, v = rgb_to_hsv(images).split(1, dim=1)
    images = hsv_to_rgb(torch.cat([h + turn, (s * saturation).clamp(0, 1), v], dim=1))
    return (images * after).clamp(0, 1)
