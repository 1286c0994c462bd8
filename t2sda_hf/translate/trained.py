"""Translators that were trained beforehand: a network that runs along, or images it made (method 5.2)."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class NetworkTranslation:
    """An nn.Module that translates the source window on the device it is on."""

    network: nn.Module

    @torch.no_grad()
    def __call__(self, source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
        translated: Tensor = self.network.to(source_images.device)(source_images)
        if translated.shape != source_images.shape:
            raise ValueError(
                f"the translator {type(self.network).__name__} made {tuple(translated.shape)} of "
                f"{tuple(source_images.shape)}. It must keep the size, or labels would not fit."
            )
        return translated.clamp(0, 1)


def take_translated(source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
    """The engine of a folder: the loader has put the translated window where others have the target image."""
    if style_images is None:
        raise ValueError("translate.trained.folder needs the loader's translated windows, and the batch has none.")
    return style_images
