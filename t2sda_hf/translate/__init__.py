"""Translation engines: source content, target style."""

from typing import Protocol

from torch import Generator, Tensor

from ..config import TranslateConfig
from .fda import fda_translate


class TranslationEngine(Protocol):
    """Draws source scenes in the style of the target. What every engine promises:

    - (B,3,H,W) float in, the same out. Input is RGB in [0,1], not normalised; it is never changed in place.
    - Geometry is untouched: pixel (i, j) keeps its class, so the source labels stay valid.
    - Same inputs and same generator state give the same output, on every device of one kind.
    - No gradient is recorded, no trainable parameter exists.
    """

    def __call__(self, source_images: Tensor, style_images: Tensor, generator: Generator) -> Tensor: ...


def build_engine(config: TranslateConfig) -> TranslationEngine:
    """The engine that `translate.engine` names."""

    def fda(source_images: Tensor, style_images: Tensor, generator: Generator) -> Tensor:
        styled = fda_translate(source_images, style_images, config.fda.beta, config.fda.window)
        return styled.clamp(0, 1) if config.fda.clip else styled

    def none(source_images: Tensor, style_images: Tensor, generator: Generator) -> Tensor:
        return source_images

    return {"fda": fda, "none": none}[config.engine]
