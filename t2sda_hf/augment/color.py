"""Colour: the strong augmentation of mixed images, and the photometric distortion of supervised training.

Hue, saturation and value follow the usual hexagon: hue in [0,1) of a full turn, saturation and value in [0,1].
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..device import exact_products, per_channel, sent


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


def change_colors(images: Tensor, hue: Tensor | None = None, saturation: Tensor | None = None) -> Tensor:
    """Turn the hue of HSV and multiply its saturation, up to 1, without the way into HSV and back.

    V and L, the largest and the smallest of the three channels, stay what they are under a turn. Along the circle of
    hues a channel goes from V to L, stays there, and comes back. Let it go on beyond both at the same slope: this
    triangular wave of channel c is 2·x_c + V + L - Σx. After a whole sixth of a turn it is the wave of another channel,
    or V + L minus that. Between two sixths it is linear, except beyond V and L, where it is cut off anyway. So a turned
    image is a matrix product, clamped to [L,V]. For the saturation all channels move away from V.

    Args:
        images: (B,3,H,W) in [0,1].
        hue: (B,3,5) of `hue_matrix`, or (B,15,1,1); None leaves the hue.
        saturation: (B,1,1,1) factors >= 0; None leaves the saturation.

    Returns:
        (B,3,H,W) in [0,1].
    """
    value, lowest = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    if hue is not None:
        known = torch.cat([images, value, lowest], dim=1).flatten(2)
        with exact_products():
            turned = torch.bmm(hue.view(-1, 3, 5), known)
        images = turned.view(images.shape).clamp(lowest, value)
    if saturation is not None:
        full = value / (value - lowest)  # brings the saturation to 1; no number for black
        images = torch.lerp(value, images, torch.fmin(full, saturation))
    return images.clamp(0, 1)


def hue_matrix(turns: Tensor) -> Tensor:
    """(B,3,5), for `change_colors`: turns (B,) of the hue, in full turns, as a matrix on red, green, blue, V and L."""
    sixths = turns.double() * 6 % 6
    whole = sixths.floor()
    of_even = torch.where(whole % 2 == 0, 1 - (sixths - whole), sixths - whole)[
        :, None, None
    ]  # share of that neighbour
    even, odd = ((whole + 1) // 2)[:, None, None], (whole // 2 - 1)[:, None, None]  # by how many channels it is moved
    moved = torch.arange(3)[:, None] - torch.arange(3)
    matrix = (1 - of_even) * (1 - 2.0 * ((moved - odd) % 3 == 0)) - of_even * (1 - 2.0 * ((moved - even) % 3 == 0))
    return torch.cat([matrix, of_even.expand(-1, 3, 2)], dim=2).to(turns.dtype)


def _uniform(num: int, low: float, high: float, generator: Generator) -> Tensor:
    """One number per image."""
    return torch.rand(num, generator=generator) * (high - low) + low


def _per_image(images: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers (B,...) of the host, each as (B,number,1,1) where the images are; they travel together."""
    columns = [values.view(len(values), -1).to(images.dtype) for values in numbers]
    there = sent(torch.cat(columns, dim=1), images.device)[..., None, None]
    return there.split([values.shape[1] for values in columns], dim=1)


def _affine(*steps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several steps factor · x + shift, factor >= 0, each clamped to [0,1], as one: a, b, low, high (B,) of
    clamp(a · x + b, low, high).
    """
    (scale, shift), *others = steps
    low, high = torch.zeros_like(scale), torch.ones_like(scale)
    for factor, added in others:
        scale, shift = factor * scale, factor * shift + added
        low, high = ((factor * end + added).clamp(0, 1) for end in (low, high))
    return scale, shift, low, high


def _apply(images: Tensor, scale: Tensor, shift: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.addcmul(shift, images, scale).clamp(low, high)


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
    brightness, contrast, saturation, hue = drawn
    zero, one = torch.zeros(num), torch.ones(num)
    order: list[int] = torch.randperm(4, generator=generator).tolist()
    # Neighbours are one operation: brightness and contrast are affine, saturation and hue leave the largest channel.
    # Not at the start, where a translation may have left [0,1], so that it matters which of them clamps first.
    groups = [list(group) for _, group in itertools.groupby(order, lambda number: number < 2)]
    groups[:1] = [groups[0]] if groups[0][0] < 2 else [[number] for number in groups[0]]
    operations: list[Callable[..., Tensor]] = []
    numbers: list[tuple[Tensor | None, ...]] = []
    for group in groups:
        if group[0] < 2:
            operations.append(_apply)
            numbers.append(_affine(*([(one, brightness), (contrast, zero)][number] for number in group)))
        else:
            operations.append(change_colors)
            numbers.append((hue_matrix(hue) if 3 in group else None, saturation if 2 in group else None))
    there = iter(_per_image(images, *(values for own in numbers for values in own if values is not None)))
    for operation, own in zip(operations, numbers, strict=True):
        images = operation(images, *(None if values is None else next(there) for values in own))
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
    zero, one = torch.zeros(num), torch.ones(num)
    affine = _affine((one, brightness), (before, zero))
    *affine_there, hue, saturation, after = _per_image(images, *affine, hue_matrix(turn), saturation, after)
    images = change_colors(_apply(images, *affine_there), hue, saturation)
    return (images * after).clamp(0, 1)
