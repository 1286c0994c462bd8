"""Colour: the strong augmentation of mixed images, and the photometric distortion of supervised training.

Hue, saturation and value follow the usual hexagon: hue in [0,1) of a full turn, saturation and value in [0,1].
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..device import constant, exact_products, per_channel, sent


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


def hue_matrix(turns: Tensor) -> Tensor:
    """(B,3,5): turns (B,) of the hue, in full turns, as a matrix on red, green, blue, V and L.

    V and L, the largest and the smallest of the three channels, stay what they are under a turn. Along the circle of
    hues a channel goes from V to L, stays there, and comes back. Let it go on beyond both at the same slope: this
    triangular wave of channel c is 2·x_c + V + L - Σx. After a whole sixth of a turn it is the wave of another channel,
    or V + L minus that. Between two sixths it is linear, except beyond V and L, where it is cut off anyway. So a turned
    image is this product, clamped to [L,V].
    """
    sixths = turns.double() * 6 % 6
    whole = sixths.floor()
    of_even = torch.where(whole % 2 == 0, 1 - (sixths - whole), sixths - whole)[
        :, None, None
    ]  # share of that neighbour
    even, odd = ((whole + 1) // 2)[:, None, None], (whole // 2 - 1)[:, None, None]  # by how many channels it is moved
    moved = torch.arange(3)[:, None] - torch.arange(3)
    matrix = (1 - of_even) * (1 - 2.0 * ((moved - odd) % 3 == 0)) - of_even * (1 - 2.0 * ((moved - even) % 3 == 0))
    return torch.cat([matrix, of_even.expand(-1, 3, 2)], dim=2).to(turns.dtype)


_FACTOR, _SCALE = 36, 27  # columns of `color_step` with a·saturation and a, which are one where the saturation stays


@dataclass(frozen=True)
class ColorSteps:
    """Changes of the colours of B images, one after the other, by numbers that were drawn for each image on the host.

    Attributes:
        first: (B,4) of `_affine`, before all others; None: there is no such step.
        others: (B,39) of `color_step` each.
    """

    first: Tensor | None
    others: tuple[Tensor, ...]


def color_step(turns: Tensor, saturation: Tensor, affine: Tensor | None = None) -> Tensor:
    """(B,39): turn the hue of HSV and multiply its saturation, up to 1; then a step of `_affine`.

    For the saturation all channels move away from V. So with y the turned image a channel becomes
    a·V + b - (V-y)·min(a·V/(V-L), a·saturation), of six products of red, green, blue, V, L and 1.

    Args:
        turns: (B,) of the hue, in full turns.
        saturation: (B,) factors >= 0.
        affine: (B,4); None: clamp to [0,1].
    """
    num = len(turns)
    if affine is None:
        affine = _affine((torch.ones(num), torch.zeros(num)))
    scale, shift, low, high = affine.unbind(dim=1)
    products = turns.new_zeros(num, 6, 6)
    products[:, :3, 3] = 1
    products[:, :3, :5] -= hue_matrix(turns)  # V - y
    products[:, 3, 3], products[:, 3, 4] = 1, -1  # V - L
    products[:, 4, 3] = products[:, 5, 3] = scale  # a·V, and the same + b
    products[:, 5, 5] = shift
    products[:, 4, 5] = 1e9 * (saturation == 1)  # no limit, where a translation may have left [0,1]
    return torch.cat([products.flatten(1), torch.stack([scale * saturation, low, high], dim=1)], dim=1)


def change_colors(images: Tensor, steps: ColorSteps) -> Tensor:
    """(B,3,H,W) in [0,1] of images (B,3,H,W), without the way into HSV and back."""
    num, _, height, width = images.shape
    host = [*([] if steps.first is None else [steps.first]), *steps.others]
    there = sent(torch.cat(host, dim=1).to(images.dtype), images.device)[..., None, None]
    known = images.new_empty(num, 6, height, width)  # red, green, blue, V, L, 1
    known[:, 5].fill_(1)
    if steps.first is None:
        known[:, :3].copy_(images)
    for left, own, given in zip(range(1 - len(host), 1), host, there.split([len(h[0]) for h in host], 1), strict=True):
        if own is steps.first:
            scale, shift, low, high = given.split(1, dim=1)
            images = torch.addcmul(shift, images, scale)
        else:
            products, factor, low, high = given.split([36, 1, 1, 1], dim=1)
            torch.amax(known[:, :3], dim=1, out=known[:, 3])
            torch.amin(known[:, :3], dim=1, out=known[:, 4])
            with exact_products():
                made = torch.bmm(products.view(num, 6, 6), known.flatten(2)).view_as(known)
            away, chroma, value, moved = made.split([3, 1, 1, 1], dim=1)
            away = away.clamp(constant((0.0,), images.device, images.dtype), chroma)
            if not torch.equal(own[:, _FACTOR], own[:, _SCALE]):
                factor = torch.fmin(value / chroma, factor)  # no number for black
            images = torch.addcmul(moved, away, factor, value=-1)
        plain = not own[:, -2].any() and bool((own[:, -1] == 1).all())  # low and high of all images
        bounds: Any = (0, 1) if plain else (low, high)
        images = torch.clamp(images, *bounds, out=known[:, :3] if left else None)
    return images


def _uniform(num: int, low: float, high: float, generator: Generator) -> Tensor:
    """One number per image."""
    return torch.rand(num, generator=generator) * (high - low) + low


def _affine(*steps: tuple[Tensor, Tensor]) -> Tensor:
    """Several steps factor · x + shift, factor >= 0, each clamped to [0,1], as one: a, b, low, high, together (B,4), of
    clamp(a · x + b, low, high).
    """
    (scale, shift), *others = steps
    low, high = torch.zeros_like(scale), torch.ones_like(scale)
    for factor, added in others:
        scale, shift = factor * scale, factor * shift + added
        low, high = ((factor * end + added).clamp(0, 1) for end in (low, high))
    return torch.stack([scale, shift, low, high], dim=1)


def draw_jitter(num: int, strength: float, generator: Generator) -> ColorSteps:
    """The jitter DAFormer trained with (the semantics of kornia 0.5.8, which later releases changed; method 2.6).

    Brightness is *added*, U(-s,s); contrast *multiplies*, U(1-s,1+s), not around the mean; saturation is scaled in
    HSV by U(1-s,1+s); hue turns by U(-s,s) of a full turn. The order is drawn once for the batch, the factors per
    image, and every result is clamped to [0,1].

    Args:
        num: of images.
        strength: s in [0,1].
        generator: of the CPU.
    """
    ranges = ((-strength, strength), (1 - strength, 1 + strength), (1 - strength, 1 + strength), (-strength, strength))
    brightness, contrast, saturation, hue = (_uniform(num, low, high, generator) for low, high in ranges)
    zero, one = torch.zeros(num), torch.ones(num)
    affine = ((one, brightness), (contrast, zero))
    # Neighbours are one step: brightness and contrast are affine, saturation and hue leave the largest channel.
    # Not at the start, where a translation may have left [0,1], so that it matters which of them clamps first.
    first: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[dict[int, Tensor], list[tuple[Tensor, Tensor]]]] = []
    for number in torch.randperm(4, generator=generator).tolist():
        if number < 2:
            (others[-1][1] if others else first).append(affine[number])
            continue
        if not others or others[-1][1] or not (first or len(others) > 1):
            others.append(({2: one, 3: zero}, []))
        others[-1][0][number] = (saturation, hue)[number - 2]
    return ColorSteps(
        _affine(*first) if first else None,
        tuple(
            # what came before has clamped already
            color_step(own[3], own[2], _affine(*([] if after and (first or place) else [(one, zero)]), *after))
            for place, (own, after) in enumerate(others)
        ),
    )


def joined(drawn: Sequence[ColorSteps]) -> ColorSteps:
    """The steps of several batches as those of one. A step that a batch does not have is one that changes nothing."""
    nums = [len(steps.others[0]) for steps in drawn]

    def together(own: Sequence[Tensor | None], as_it_is: Callable[[int], Tensor]) -> Tensor:
        return torch.cat([as_it_is(num) if x is None else x for num, x in zip(nums, own, strict=True)])

    firsts = [steps.first for steps in drawn]
    others = itertools.zip_longest(*(steps.others for steps in drawn))
    return ColorSteps(
        together(firsts, lambda num: torch.tensor([[1, 0, -math.inf, math.inf]]).expand(num, -1))
        if any(first is not None for first in firsts)
        else None,
        tuple(together(own, lambda num: color_step(torch.zeros(num), torch.ones(num))) for own in others),
    )


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


@dataclass(frozen=True)
class StrongAugmentation:
    """Jitter and blur of a batch, drawn. What does not happen is None.

    Attributes:
        jitter: of its colours.
        sigmas: (B,) of a Gaussian blur, in pixels.
    """

    jitter: ColorSteps | None
    sigmas: Tensor | None

    @classmethod
    def draw(
        cls,
        num: int,
        jitter_probability: float,
        jitter_strength: float,
        blur_probability: float,
        generator: Generator,
    ) -> "StrongAugmentation":
        """Colour jitter, and Gaussian blur with σ ~ U(0.15, 1.15) per image (method 2.6).

        Whether each of the two happens is drawn once for the batch, its factors per image.

        Args:
            num: of images.
            jitter_probability, blur_probability: the true ones (DAFormer's "0.2" applies if u > 0.2).
            jitter_strength: s of `draw_jitter`.
            generator: of the CPU.
        """
        chances = torch.tensor([jitter_probability, blur_probability])
        jitters, blurs = (torch.rand(2, generator=generator) < chances).tolist()
        jitter = draw_jitter(num, jitter_strength, generator) if jitters else None
        return cls(jitter, torch.rand(num, generator=generator) + 0.15 if blurs else None)


def strong_augment(batches: Sequence[Tensor], drawn: Sequence[StrongAugmentation]) -> list[Tensor]:
    """First the jitter, then the blur, of several batches at once if the same happens to all of them.

    Args:
        batches: (B,3,H,W) RGB in [0,1], all of one height and width. DAFormer blurs normalised values; the blur is
            linear, so the result is the same.
        drawn: for each of them.

    Returns:
        (B,3,H,W) in [0,1] each; a batch to which nothing happens as it is.
    """
    if len({(own.jitter is None, own.sigmas is None) for own in drawn}) > 1:
        return [strong_augment([batch], [own])[0] for batch, own in zip(batches, drawn, strict=True)]
    jitters = [own.jitter for own in drawn if own.jitter is not None]
    sigmas = [own.sigmas for own in drawn if own.sigmas is not None]
    if not jitters and not sigmas:
        return list(batches)
    images = batches[0] if len(batches) == 1 else torch.cat(list(batches))
    if jitters:
        images = change_colors(images, joined(jitters))
    if sigmas:
        height, width = images.shape[-2:]
        images = gaussian_blur(images, torch.cat(sigmas), (blur_kernel_size(height), blur_kernel_size(width)))
    return list(images.split([len(batch) for batch in batches]))


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
    zero, one = torch.zeros(num), torch.ones(num)
    before, after = torch.where(first, contrast, one), torch.where(first, one, contrast)
    colors = color_step(turn, saturation, _affine((one, zero), (after, zero)))
    return change_colors(images, ColorSteps(_affine((one, brightness), (before, zero)), (colors,)))
