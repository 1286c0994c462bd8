"""Translators that were trained beforehand: a network that runs along, or a folder of images it made (method 5.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from ..storage import read_json, write_json

MANIFEST_FILE = "manifest.json"


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


@dataclass(frozen=True)
class TranslatedFolder:
    """One translated image per row of the source domain, as `write_translated` leaves them."""

    folder: Path
    files: tuple[str, ...]

    def image(self, index: int) -> np.ndarray:
        """(H,W,3) uint8 RGB, of any size with the source image's aspect."""
        with Image.open(self.folder / self.files[index]) as picture:
            return np.array(picture.convert("RGB"))


def open_translated(location: str, num_images: int) -> TranslatedFolder:
    """Check a folder of translations against the source domain it stands for.

    Args:
        location: the folder, with manifest.json: "files" in the order of the rows, and who made them.
        num_images: rows of the source domain.

    Raises:
        ValueError: without a manifest, if the numbers differ, or if files are missing (the first five are named).
    """
    folder = Path(location)
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        raise ValueError(
            f"translate.trained.folder: {str(manifest)!r} does not exist. "
            "`t2sda translator apply` writes a folder of translations with its manifest."
        )
    files = tuple((read_json(manifest) or {}).get("files", ()))
    if len(files) != num_images:
        raise ValueError(
            f"{manifest} lists {len(files)} images, and the source domain has {num_images}. "
            "Translate the whole domain, or set source.num_images to what was translated."
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the files in its manifest: {', '.join(missing[:5])}.")
    return TranslatedFolder(folder, files)


def write_manifest(folder: Path, files: list[str], facts: Mapping[str, object]) -> None:
    """Say in `folder` which files it has, in the order of the rows, and what made them (engine, weights, domains)."""
    content = {**facts, "num_images": len(files), "files": files}
    write_json(folder / MANIFEST_FILE, content)
