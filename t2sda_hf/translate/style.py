"""Styles of domain generalisation: pseudo-target images without a target (paper section 4.2; method 5.12).

Every image gets one of the styles at hand, drawn uniformly. A style whose weights, images or library are not there is
left out, and one line says so.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..augment.color import hsv_to_rgb, rgb_to_hsv
from ..config import TranslateConfig
from ..files import read_header, read_image
from ..listing import IMAGE_SUFFIXES, Listing, account, list_files
from .fda import low_amplitude, with_low_amplitude
from .style_networks import ADAIN_FILES, RANDOMIZATION_FILES, AdaIN, StyleRandomizer, find_weights

logger = logging.getLogger(__name__)

Style = Callable[[Tensor, Generator], Tensor]  # (1,3,H,W) in [0,1] -> the same
SEVERITIES = 5
LARGEST_SEED = 2**31 - 1
RANDOM_SHARE = 0.5  # of a drawn style; the rest is the image's own (DG code)
MAX_PIXELS = 2**27  # of a style image: paintings are photographed larger than a camera sees a street
KEPT_AMPLITUDES = 4096  # 3 MB at β 0.01 and 512 x 512


class NotAtHand(Exception):
    """Why a style is left out, as the rest of "style NAME is left out: ..."."""


@dataclass(frozen=True)
class StyleTranslation:
    """The engine `style`: one of `styles` per image."""

    styles: dict[str, Style]

    @torch.no_grad()
    def __call__(self, source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
        names = list(self.styles)
        translated = []
        for image in source_images:
            name = names[int(torch.randint(len(names), (1,), generator=generator))]
            translated.append(self.styles[name](image[None], generator).clamp(0, 1))
        return torch.cat(translated)


def build_style(config: TranslateConfig) -> StyleTranslation:
    """The styles of `translate.style.styles` that are at hand.

    Raises:
        ValueError: if none is, or if files that were given do not fit.
    """
    pictures = cache(partial(_style_images, config))  # looked at once, for both styles that take them
    makers: dict[str, Callable[[TranslateConfig], Style]] = {
        "fda": lambda config: _fda(config, pictures()),
        "randomization": _randomization,
        "adain": lambda config: _adain(config, pictures()),
        "weather": _weather,
        "cartoon": _cartoon,
    }
    styles: dict[str, Style] = {}
    reasons = []
    for name in config.style.styles:
        try:
            styles[name] = makers[name](config)
        except NotAtHand as reason:
            reasons.append(f"style {name} is left out: {reason}")
            logger.warning("%s", reasons[-1])
    if not styles:
        raise ValueError(f"translate.engine style has no style to draw from. {'. '.join(reasons)}.")
    logger.info("styles: %s", ", ".join(styles))
    return StyleTranslation(styles)


# --- a picture's amplitude, a picture's feature statistics, a random style -------------------------------------------


@dataclass
class StyleImages:
    """Pictures of a folder by number. What FDA needs of each is kept: it is a few numbers."""

    files: list[Path]
    amplitudes: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def draw(self, generator: Generator) -> int:
        return int(torch.randint(len(self.files), (1,), generator=generator))

    def image(self, index: int, size: tuple[int, int]) -> Tensor:
        """(1,3,h,w) in [0,1], bilinear."""
        file = self.files[index]
        pixels = read_image({"bytes": None, "path": str(file)}, str(file), MAX_PIXELS)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def amplitude(self, index: int, size: tuple[int, int], beta: float, window: str) -> Tensor:
        key = (index, size, beta, window)
        if key not in self.amplitudes:
            if len(self.amplitudes) == KEPT_AMPLITUDES:
                self.amplitudes.pop(next(iter(self.amplitudes)))
            self.amplitudes[key] = low_amplitude(self.image(index, size), beta, window)  # type: ignore[arg-type]
        return self.amplitudes[key]


def _style_images(config: TranslateConfig) -> StyleImages:
    if not config.style.images:
        raise NotAtHand("translate.style.images names no folder of style images")
    folder = Path(config.style.images)
    found = list_files(folder, IMAGE_SUFFIXES) if folder.is_dir() else Listing([], {})
    if told := account(len(found.files), found.ignored):
        logger.warning("translate.style.images: %s", told)
    if not found.files:
        raise ValueError(
            f"translate.style.images: no image ({', '.join(IMAGE_SUFFIXES)}) in {config.style.images!r}. "
            "Give a folder of pictures whose style is to be taken, or leave it empty."
        )
    for file in found.files:  # what cannot be read would end the training whenever it is drawn
        try:
            read_header({"bytes": None, "path": str(file)}, str(file), MAX_PIXELS)
        except ValueError as error:
            raise ValueError(f"translate.style.images: {error} Or take it out of the folder.") from error
    return StyleImages(found.files)


def _fda(config: TranslateConfig, pictures: StyleImages) -> Style:
    beta, window = config.fda.beta, config.fda.window

    def style(image: Tensor, generator: Generator) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        amplitude = pictures.amplitude(pictures.draw(generator), size, beta, window)
        return with_low_amplitude(image, amplitude.to(image.device))

    return style


def _adain(config: TranslateConfig, pictures: StyleImages) -> Style:
    network = AdaIN.load(_weights("adain", config.style.adain, ADAIN_FILES))

    def style(image: Tensor, generator: Generator) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        picture = pictures.image(pictures.draw(generator), size)
        stylised: Tensor = network.to(image.device)(image, picture.to(image.device))
        return stylised

    return style


def _randomization(config: TranslateConfig) -> Style:
    network = StyleRandomizer.load(_weights("randomization", config.style.randomization, RANDOMIZATION_FILES))
    share = RANDOM_SHARE

    def style(image: Tensor, generator: Generator) -> Tensor:
        stylised: Tensor = network.to(image.device)(image, share, generator)
        return stylised

    return style


def _weights(name: str, location: str, files: tuple[str, ...]) -> dict[str, Path]:
    if not location:
        raise NotAtHand(f"translate.style.{name} names no folder or Hub repository with its weights")
    found = find_weights(location, files)
    missing = [file for file in files if file not in found]
    if missing:
        raise NotAtHand(f"no {', '.join(missing)} (.safetensors or .pth) in {location!r}")
    return found


# --- weather and cartoon ---------------------------------------------------------------------------------------------


def _weather(config: TranslateConfig) -> Style:
    """Snow, frost, fog or brightness of severity 1 to 5: the "weather" corruptions of Michaelis et al. (2019)."""
    try:
        from imagecorruptions import corrupt, get_corruption_names
    except ImportError:
        logger.warning("style weather is fog and brightness alone: snow and frost need pip install 't2sda_hf[styles]'")
        return _plain_weather
    kinds = get_corruption_names("weather")

    def style(image: Tensor, generator: Generator) -> Tensor:
        kind, severity, seed = _draws(generator, len(kinds), SEVERITIES, LARGEST_SEED)
        with _numpy_seeded(seed):
            return _through_bytes(image, partial(corrupt, corruption_name=kinds[kind], severity=severity + 1))

    return style


def _cartoon(config: TranslateConfig) -> Style:
    """Even areas and dark outlines, more or less of both: OpenCV's stylization (Gastal and Oliveira 2011)."""

    def style(image: Tensor, generator: Generator) -> Tensor:
        reach, contrast = torch.rand(2, generator=generator).tolist()
        # A filter that reaches beyond the image makes an even one black (OpenCV 5.0).
        sigma_s = min(10 + 50 * reach, min(image.shape[-2:]) / 2)
        return _through_bytes(image, partial(cv2.stylization, sigma_s=sigma_s, sigma_r=0.2 + 0.25 * contrast))

    return style


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """For a library that draws from numpy's global state, which is as it was afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _draws(generator: Generator, *numbers: int) -> list[int]:
    """One whole number below each of `numbers`."""
    return [int(torch.randint(number, (1,), generator=generator)) for number in numbers]


def _through_bytes(image: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    changed = np.asarray(function(np.ascontiguousarray(pixels)))
    return torch.from_numpy(changed.astype(np.float32) / 255).permute(2, 0, 1)[None].to(image.device)


def _plain_weather(image: Tensor, generator: Generator) -> Tensor:
    """Fog, x ← (x + f·noise)·max/(max + f) under cloudy noise, or brighter: value + 0.1 … 0.5. The usual severities."""
    kind, severity = _draws(generator, 2, SEVERITIES)
    if kind == 1:
        hue_and_saturation, value = rgb_to_hsv(image).split([2, 1], dim=1)
        return hsv_to_rgb(torch.cat([hue_and_saturation, (value + 0.1 * (severity + 1)).clamp(max=1)], dim=1))
    amount = (1.5, 2.0, 2.5, 2.5, 3.0)[severity]
    noise = torch.zeros_like(image[:, :1])
    for octave in range(1, 6):  # each finer and weaker than the one before
        grid = torch.rand(1, 1, 2**octave + 1, 2**octave + 1, generator=generator).to(image.device)
        noise += F.interpolate(grid, image.shape[-2:], mode="bilinear", align_corners=True) / 1.7**octave
    noise = (noise - noise.amin()) / (noise.amax() - noise.amin()).clamp(min=1e-6)
    largest = image.amax()
    return (image + amount * noise) * largest / (largest + amount)
