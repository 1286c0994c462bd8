"""A folder of source images that a translator made beforehand, read like the images of a domain (method 5.2)."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import DomainConfig
from ..files import read_image
from ..listing import FORMATS
from ..storage import read_json, write_json

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class TranslatedFolder:
    """One translated image per row of the source domain, as `t2sda translator apply` leaves them."""

    folder: Path
    files: tuple[str, ...]
    max_pixels: int

    def image(self, index: int) -> np.ndarray:
        """(H,W,3) uint8 RGB, of any size with the source image's aspect.

        Raises:
            ValueError: see `files.read_image`.
        """
        path = self.folder / self.files[index]
        return read_image({"bytes": None, "path": str(path)}, f"translated image {index} ({path})", self.max_pixels)


def open_translated(location: str, num_images: int, max_pixels: int = DomainConfig.max_pixels) -> TranslatedFolder:
    """Check a folder of translations against the source domain it stands for.

    Args:
        location: the folder, with manifest.json: "files" in the order of the rows, and who made them.
        num_images: rows of the source domain.
        max_pixels: of the source domain.

    Raises:
        ValueError: without a manifest, if the numbers differ, files are missing (the first five are named) or too
            large, or a name leads out of the folder: the manifest may be somebody else's.
    """
    folder = Path(location)
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        raise ValueError(
            f"translate.trained.folder: {str(manifest)!r} does not exist. "
            "`t2sda translator apply` writes a folder of translations with its manifest."
        )
    content = read_json(manifest)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f'{manifest} has no list "files" of names. Translate the source again.')
    if len(files) != num_images:
        raise ValueError(
            f"{manifest} lists {len(files)} images, and the source domain has {num_images}. "
            "Translate the whole domain, or set source.num_images to what was translated."
        )
    root = os.path.realpath(folder)
    outside = [name for name in files if "\0" in name or not _inside(os.path.realpath(folder / name), root)]
    if outside:
        raise ValueError(
            f"{manifest} names {outside[0]!r}, which lies outside its folder: nothing is opened. Names are relative to "
            "the manifest."
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the files in its manifest: {', '.join(missing[:5])}.")
    for name in files:
        _check_size(folder / name, max_pixels)
    return TranslatedFolder(folder, tuple(files), max_pixels)


def _inside(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)


def _check_size(path: Path, max_pixels: int) -> None:
    """ValueError for a picture with too many pixels, or none at all. Only its header is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"translated image {path} cannot be read: {error}. Translate the source again.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"translated image {path} is far too large: {error}") from error
    if width * height > max_pixels:
        raise ValueError(
            f"translated image {path} has {width}x{height} pixels, more than source.max_pixels ({max_pixels}): it is "
            "not decoded. Raise it if the size is right."
        )


def write_manifest(folder: Path, files: list[str], facts: Mapping[str, object]) -> None:
    """Say in `folder` which files it has, in the order of the rows, and what made them (engine, weights, domains)."""
    write_json(folder / MANIFEST_FILE, {**facts, "num_images": len(files), "files": files})
