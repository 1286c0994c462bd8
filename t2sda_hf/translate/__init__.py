"""Translation engines: source content, target style."""

from collections.abc import Callable
from typing import Protocol

from torch import Generator, Tensor

from ..config import TranslateConfig
from .color_jitter import simclr_color_jitter
from .fda import fda_translate
from .gaussian_blur import simclr_blur
from .generator import load_translator
from .style import build_style
from .trained import NetworkTranslation, take_translated


class TranslationEngine(Protocol):
    """Draws source scenes in the style of the target. What every engine promises:

    - (B,3,H,W) float in, the same out. Input is RGB in [0,1], not normalised; it is never changed in place.
    - Geometry is untouched: pixel (i, j) keeps its class, so the source labels stay valid.
    - Same inputs and same generator state give the same output, on every device of one kind.
    - No gradient is recorded, no trainable parameter exists.
    - `style_images` may be None for the engines that take their style from elsewhere (`config.NEEDS_TARGET`).
    """

    def __call__(self, source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor: ...


def _none(config: TranslateConfig) -> TranslationEngine:
    def none(source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
        return source_images

    return none


def _fda(config: TranslateConfig) -> TranslationEngine:
    def fda(source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
        if style_images is None:
            raise ValueError("translate.engine fda takes its style from target images, and the batch has none.")
        styled = fda_translate(source_images, style_images, config.fda.beta, config.fda.window)
        return styled.clamp(0, 1) if config.fda.clip else styled

    return fda


def _color_jitter(config: TranslateConfig) -> TranslationEngine:
    def color_jitter(source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
        jitter = config.color_jitter
        return simclr_color_jitter(source_images, jitter.probability, jitter.strength, generator)

    return color_jitter


def _gaussian_blur(config: TranslateConfig) -> TranslationEngine:
    def blur(source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
        return simclr_blur(source_images, config.gaussian_blur.probability, config.gaussian_blur.sigma, generator)

    return blur


def _trained(config: TranslateConfig) -> TranslationEngine:
    if config.trained.folder:
        return take_translated
    return NetworkTranslation(load_translator(config.trained.model, config.trained.architecture))


ENGINES: dict[str, Callable[[TranslateConfig], TranslationEngine]] = {
    "fda": _fda,
    "color_jitter": _color_jitter,
    "gaussian_blur": _gaussian_blur,
    "style": build_style,
    "trained": _trained,
    "none": _none,
}


def build_engine(config: TranslateConfig) -> TranslationEngine:
    """The engine that `translate.engine` names.

    Raises:
        ValueError: if weights or a folder it needs are not there or do not fit.
    """
    return ENGINES[config.engine](config)
