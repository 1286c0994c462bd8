"""Domains: `datasets` in, images and class ids of the run out.

A domain is a table of rows with an image and perhaps a label map. Where the table comes from (drawn on the spot, a
parquet file, a folder, the Hub) ends here; what its ids mean is settled once, by class name.
"""

import difflib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from ..config import DomainConfig
from ..labels import CITYSCAPES_CLASSES, IGNORE_INDEX, LABEL_SPACES, id_map
from .streets import streets
from .transforms import Size, resize_image, resized_size

# Domains that need no path: name -> a function of the domain's config.
DOMAINS: dict[str, Callable[[DomainConfig], Dataset]] = {
    "streets-source": lambda config: streets("source", config.split, config.num_images, config.drawing_seed),
    "streets-target": lambda config: streets("target", config.split, config.num_images, config.drawing_seed),
}


@dataclass(frozen=True)
class Domain:
    """Rows of one domain, read by index.

    Attributes:
        name: for messages and tables.
        rows: column "image" and, if labelled, "label", both undecoded ({"bytes", "path"}).
        ids: (256,) uint8, id on disk -> class id of the run or 255; None without labels.
        known_ids: how many ids the data set defines; larger ones are an error, but 255 is always "ignored".
        config: resize rule of the domain.
    """

    name: str
    rows: Dataset
    ids: np.ndarray | None
    known_ids: int
    config: DomainConfig

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> np.ndarray:
        """(H,W,3) uint8 RGB at the size of the file, turned upright if its EXIF data says so."""
        with _open(self.rows[index]["image"], self._where(index)) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))

    def labels(self, index: int) -> np.ndarray:
        """(H,W) uint8 class ids of the run, 255 ignored, at the size of the file.

        Raises:
            ValueError: for a file that is not a map of ids, or for ids the data set does not define.
        """
        if self.ids is None:
            raise ValueError(f"domain {self.name} was loaded without labels.")
        raw = _read_ids(self.rows[index]["label"], self._where(index))
        return self.ids[_checked(raw, self.known_ids, self._where(index), self.name)]

    def working_size(self, size: Size) -> Size:
        """Size of an image of `size` after the domain's resize rule."""
        return size if self.config.resize is None else resized_size(size, self.config.resize, self.config.resize_mode)

    def network_size(self) -> Size | None:
        """What every image is brought to for inference: the first one's size by the resize rule; None without a rule."""
        if self.config.resize is None:
            return None
        image = self.image(0)
        return self.working_size((image.shape[0], image.shape[1]))

    def resized_image(self, index: int) -> np.ndarray:
        image = self.image(index)
        return resize_image(image, self.working_size((image.shape[0], image.shape[1])))

    def _where(self, index: int) -> str:
        return f"row {index} of {self.name}"


def load_domain(
    domain: str | DomainConfig, classes: Sequence[str] = CITYSCAPES_CLASSES, labelled: bool = True
) -> Domain:
    """Open a domain. Nothing is decoded yet; `check_domain` does that.

    Args:
        domain: a name of `DOMAINS`, a parquet file or folder, a data set of the Hub, or a full DomainConfig.
        classes: class names of the run.
        labelled: False drops the label column, if there is one, before anything can read it.

    Raises:
        ValueError: if there is no such data set or split, a column is missing, it is empty, or label names do not fit.
    """
    config = DomainConfig(path=domain) if isinstance(domain, str) else domain
    rows = _load_rows(config)
    name = f"{config.path} ({config.split})"
    columns = {"image": config.image_column} | ({"label": config.label_column} if labelled else {})
    for kind, column in columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"{name} has no column {column!r}: it has {', '.join(rows.column_names)}. Set {kind}_column to one of them."
            )
    if config.num_images is not None:
        rows = rows.select(range(min(config.num_images, len(rows))))
    if not len(rows):
        raise ValueError(f"{name} is empty: there is no image to train or test on. Check path and split.")
    rows = rows.select_columns(list(columns.values()))
    for kind, column in columns.items():
        rows = rows.cast_column(column, Image(decode=False))
        rows = rows if column == kind else rows.rename_column(column, kind)
    names = config.class_names or LABEL_SPACES[config.label_space]
    try:
        ids = id_map(names, classes, config.label_map) if labelled else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Domain(name, rows, ids, len(names), config)


def check_domain(domain: Domain, classes: Sequence[str]) -> np.ndarray:
    """Read every label map and every image header once, before training.

    Returns:
        (images, K) int64 pixels per class at the labels' own resolution; zeros without labels.

    Raises:
        ValueError: naming the first row that is not an image, has a label map of another size, or shows an id that
            the data set does not define; or if fewer than two classes occur in a labelled domain.
    """
    counted = domain.rows.map(
        partial(_count_row, name=domain.name, ids=domain.ids, known_ids=domain.known_ids, num_classes=len(classes)),
        with_indices=True,
        remove_columns=domain.rows.column_names,
        desc=f"reading {domain.name}",
    )
    counts = np.array(counted["counts"], dtype=np.int64).reshape(len(domain), len(classes))
    present = [name for name, total in zip(classes, counts.sum(axis=0), strict=True) if total]
    if domain.ids is not None and len(present) < 2:
        raise ValueError(
            f"{domain.name} shows {'only the class ' + present[0] if present else 'none of the classes'}: "
            "at least two are needed. Check label_space and label_map."
        )
    return counts


def _count_row(
    row: dict[str, Any], index: int, *, name: str, ids: np.ndarray | None, known_ids: int, num_classes: int
) -> dict[str, list[int]]:
    where = f"row {index} of {name}"
    with _open(row["image"], where) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    if ids is None:
        return {"counts": [0] * num_classes}
    labels = _read_ids(row["label"], where)
    if labels.shape != (height, width):
        raise ValueError(
            f"{where}: the image has {width}x{height} pixels, its label map {labels.shape[1]}x{labels.shape[0]}. "
            "They must be equal; resize or re-export the label map (nearest neighbour)."
        )
    mapped = ids[_checked(labels, known_ids, where, name)]
    return {"counts": np.bincount(mapped.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes].tolist()}


def _open(cell: dict[str, Any] | None, where: str) -> PILImage.Image:
    """The picture in a cell {"bytes", "path"}."""
    if cell is None:
        raise ValueError(f"{where} is empty: it has no file.")
    source: Any = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
    try:
        return PILImage.open(source)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where} ({cell['path'] or 'embedded file'}) cannot be read as an image: {error}") from error


def _read_ids(cell: dict[str, Any] | None, where: str) -> np.ndarray:
    """(H,W) ids as stored. Palette files give their indices: turned to grey they would give brightness."""
    with _open(cell, where) as picture:
        if picture.mode not in ("L", "P", "I;16", "I", "1"):
            raise ValueError(
                f"{where}: the label map is a {picture.mode} picture, not a map of ids. "
                "Save class ids as 8-bit grey or palette PNG."
            )
        return np.asarray(picture)


def _checked(raw: np.ndarray, known_ids: int, where: str, name: str) -> np.ndarray:
    """`raw` as uint8 if every id is defined or 255."""
    wrong = raw[(raw >= known_ids) & (raw != IGNORE_INDEX)]
    if wrong.size:
        found, times = np.unique(wrong, return_counts=True)
        listed = ", ".join(f"{value} ({count} pixels)" for value, count in zip(found[:5], times[:5], strict=True))
        raise ValueError(
            f"{where} contains the ids {listed}, but its label space has ids 0..{known_ids - 1}, and 255 for ignored "
            "pixels. Set label_space or class_names to what the ids mean."
        )
    return raw.astype(np.uint8)


def _load_rows(config: DomainConfig) -> Dataset:
    if config.path in DOMAINS:
        return DOMAINS[config.path](config)
    path = Path(config.path)
    try:
        if path.is_file():
            return load_dataset("parquet", data_files={config.split: str(path)}, split=config.split)
        if path.is_dir() or config.path.count("/") == 1:
            return load_dataset(config.path, split=config.split)
    except (OSError, ValueError) as error:  # missing on the Hub or offline, no such split, no readable file
        raise ValueError(f"cannot load the data set {config.path!r}, split {config.split!r}: {error}") from error
    near = difflib.get_close_matches(config.path, DOMAINS, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Domains by name: {', '.join(DOMAINS)}."
    raise ValueError(f"there is no domain {config.path!r}: no such file, folder or name. {hint}")
