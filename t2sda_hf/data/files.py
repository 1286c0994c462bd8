"""One file in, one array out: RGB images and maps of ids, or a ValueError that says what is wrong with the file.

A cell is what a column `Image(decode=False)` of `datasets` holds: {"bytes", "path"}, one of them None.
"""

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
from PIL import Image, ImageOps

from ..labels import IGNORE_INDEX
from ..listing import refuse_pointer
from .transforms import Size

logger = logging.getLogger(__name__)

Cell = Mapping[str, Any]
Color = tuple[int, int, int]

HUB = "hf://datasets/"  # how paths on the Hub begin
_PIXELS = 2**22  # files up to 64 MiB are read whatever max_pixels says

# What Pillow and its plugins raise for damaged files.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_ORIENTATION = 0x0112  # EXIF
_PNG_MAY_TURN = (
    b"eXIf",
    b"Raw profile",
    b"adobe.xmp",
)  # without these words a PNG is upright; asking Pillow decodes it


@dataclass(frozen=True)
class LabelRule:
    """What a label file means.

    Attributes:
        ids: (256,) uint8, id on disk -> class id of the run or 255.
        known: (256,) bool, ids that the data set defines; others are an error. 255 is always defined.
        colors: RGB -> id on disk, for coloured maps; None if there are no colours.
        always_colored: read palettes and grey values as colours too, not as ids.
        first_channel: of a 16-bit colour PNG the first channel holds the ids (SYNTHIA).
    """

    ids: np.ndarray
    known: np.ndarray
    colors: Mapping[Color, int] | None = None
    always_colored: bool = False
    first_channel: bool = False


def read_image(cell: Cell | None, where: str, max_pixels: int) -> np.ndarray:
    """(H,W,3) uint8 RGB, turned upright if its EXIF data says so.

    Raises:
        ValueError: for a file that is no image, cut, too large, an animation, or has more than 8 bits per channel in a
            form that cannot be brought to 8 without guessing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = file_bytes(cell, where, max_pixels)
        picture = _opened(data, where, max_pixels)
        plain = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if _is_plain_bmp(picture, data) else None
        if plain is not None:
            return cv2.cvtColor(plain, cv2.COLOR_BGR2RGB)
        if picture.mode.startswith(("I", "F")):
            raise ValueError(
                f"{where} has more than 8 bits per pixel ({picture.mode}). How to bring it to 8 is for you to say: "
                "save it as 8-bit RGB or grey."
            )
        try:
            if picture.getexif().get(_ORIENTATION, 1) != 1:
                picture = ImageOps.exif_transpose(picture)
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        except _DAMAGE as error:
            raise _damaged(where, error) from error


def read_ids(cell: Cell | None, where: str, rule: LabelRule, max_pixels: int) -> np.ndarray:
    """(H,W) uint8 ids as the data set defines them, or 255.

    Palette files give their indices: turned to grey they would give brightness. Colours are matched exactly.

    Raises:
        ValueError: for a file that is no map of ids (JPEG, colours without a table, unknown colours or ids).
    """
    data = file_bytes(cell, where, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = _opened(data, where, max_pixels)
        if picture.format in ("JPEG", "MPO", "JPEG2000"):
            raise ValueError(
                f"{where}: the label map is a {picture.format} file. Its compression mixes neighbouring ids; export "
                "the labels again as PNG."
            )
        try:
            if picture.format == "PNG":
                picture.verify()  # checksums: a wrong bit may decode, to other ids
                picture = _opened(data, where, max_pixels)
        except _DAMAGE as error:
            raise _damaged(where, error) from error
        colored = rule.colors is not None and (rule.always_colored or picture.mode in ("RGB", "RGBA"))
        deep = _is_deep_color_png(data)
        raw: np.ndarray | None = None
        try:
            if deep and rule.first_channel:
                raw = _first_channel(data)
            elif colored and not deep:
                opaque = picture.mode != "RGBA" or picture.getchannel("A").getextrema() == (255, 255)
                raw = np.asarray(picture.convert("RGB")) if opaque else None
            elif picture.mode in ("L", "P", "1") or picture.mode.startswith("I"):
                raw = np.asarray(picture)
        except _DAMAGE as error:
            raise _damaged(where, error) from error
    if raw is None:
        kind = "16-bit colour" if deep else picture.mode
        raise ValueError(
            f"{where}: the label map is a {kind} picture, not a map of ids. Save class ids as 8-bit grey or palette "
            "PNG, or say in label_colors what its colours mean (label_space synthia reads SYNTHIA's 16-bit files)."
        )
    if raw.ndim == 3:
        if not rule.always_colored:
            _tell_about_standard_colors()
        return _ids_of_colors(raw, rule.colors or {}, where)
    return _checked(raw, rule.known, where)


def read_header(cell: Cell | None, where: str, max_pixels: int) -> tuple[Size, int]:
    """Upright (height, width) of an image and its EXIF orientation, almost without decoding it.

    Raises:
        ValueError: as `read_image`, also if the file is cut.
    """
    data = file_bytes(cell, where, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = _opened(data, where, max_pixels)
        whole = picture.format == "JPEG" and b"\xff\xd9" in data[-64:]
        try:
            if picture.format == "PNG":
                whole, settled = True, not any(word in data for word in _PNG_MAY_TURN)
                picture.verify()  # checksums of all its parts; a wrong bit may decode without complaint
                orientation = 1 if settled else _opened(data, where, max_pixels).getexif().get(_ORIENTATION, 1)
            else:
                orientation = picture.getexif().get(_ORIENTATION, 1)
        except _DAMAGE as error:
            raise _damaged(where, error) from error
    width, height = picture.size
    if not whole or picture.mode.startswith(("I", "F")):
        read_image({"bytes": data, "path": None}, where, max_pixels)
    return ((width, height) if orientation in (5, 6, 7, 8) else (height, width)), orientation


def file_bytes(cell: Cell | None, where: str, max_pixels: int = _PIXELS) -> bytes:
    """The file of a cell, from memory, the disk, or the Hub. Its size is looked at before it is read.

    Args:
        max_pixels: a file of more than 16 bytes for each of them is no image that would be allowed.

    Raises:
        ValueError: if it is missing or empty, too large, no regular file, of another place, or a Git LFS pointer.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError(f"{where} is empty: it has no file. Leave the row out, or give it one.")
    data: bytes = _read(cell["path"], where, 16 * max(max_pixels, _PIXELS)) if cell["bytes"] is None else cell["bytes"]
    if not data:
        raise ValueError(f"{where} is an empty file of 0 bytes. Copy or export it again.")
    refuse_pointer(data, where)
    return data


def _read(path: str, where: str, most: int) -> bytes:
    """What lies at `path`, which is one that `sources` allows."""
    try:
        if path.startswith(HUB):
            with fsspec.open(path) as stream:
                size = stream.size
                data: bytes | None = stream.read() if size <= most else None
        elif "://" in path or not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{where}: {path} is no file. Only regular files are read.")
        else:
            size = os.path.getsize(path)
            data = Path(path).read_bytes() if size <= most else None
    except OSError as error:
        raise ValueError(f"{where}: {path} cannot be read: {error}. Check that the file is still there.") from error
    if data is None:
        raise ValueError(
            f"{where}: {path} has {size} bytes, which is far too large for an image: it is not read. Raise the "
            "domain's max_pixels if the size is right."
        )
    return data


def _opened(data: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} is far too large: {error} Cut it into tiles.") from error
    except _DAMAGE as error:
        raise ValueError(f"{where} cannot be read as an image: {_first_line(error)}. Export it again.") from error
    if picture.width * picture.height > max_pixels:
        raise ValueError(
            f"{where} has {picture.width}x{picture.height} pixels, more than max_pixels ({max_pixels}): it is not "
            "decoded, to save memory. Raise the domain's max_pixels if the size is right."
        )
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:  # MPO: a photo with a preview
        raise ValueError(f"{where} has {picture.n_frames} frames: an image is one. Save the frames as files.")  # type: ignore[attr-defined]
    return picture


def _damaged(where: str, error: BaseException) -> ValueError:
    return ValueError(f"{where} is cut or damaged: {_first_line(error)}. Copy or export it again.")


def _first_line(error: BaseException) -> str:
    return (
        (str(error).splitlines() or [type(error).__name__])[0].replace("<_io.BytesIO object", "<the file").rstrip(".")
    )


def _is_plain_bmp(picture: Image.Image, data: bytes) -> bool:
    """A whole BMP of 3 uncompressed bytes a pixel, as "raw" prepares: OpenCV reads it four times as fast."""
    length = picture.height * ((3 * picture.width + 3) // 4 * 4)  # lines are filled up to 4 bytes
    plain = picture.format == "BMP" and data[28:34] == b"\x18\0\0\0\0\0"
    return plain and len(data) >= int.from_bytes(data[10:14], "little") + length


def _is_deep_color_png(data: bytes) -> bool:
    """A PNG with 16 bits in each of 3 or 4 channels; Pillow would keep the upper halves only."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:26] in (b"\x10\x02", b"\x10\x06")


def _first_channel(data: bytes) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("not a readable PNG")
    return pixels[..., 2]  # OpenCV's order is B, G, R


def _ids_of_colors(pixels: np.ndarray, colors: Mapping[Color, int], where: str) -> np.ndarray:
    """(H,W,3) uint8 -> (H,W) uint8 by exact colour."""
    keys = pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    table = {red * 65536 + green * 256 + blue: label_id for (red, green, blue), label_id in colors.items()}
    unknown = [(key, count) for key, count in zip(found.tolist(), counts.tolist(), strict=True) if key not in table]
    if unknown:
        unknown.sort(key=lambda pair: -pair[1])
        listed = ", ".join(f"{key >> 16},{key >> 8 & 255},{key & 255} ({count} pixels)" for key, count in unknown[:5])
        raise ValueError(
            f"{where}, an RGB picture, shows {len(unknown)} colours without a class: {listed}. Add them to "
            "label_colors (void: no class); colours by the dozen mean that the map was smoothed, or is not a label map."
        )
    return np.array([table[key] for key in found.tolist()], dtype=np.uint8)[inverse].reshape(pixels.shape[:2])


@cache
def _tell_about_standard_colors() -> None:
    """Once per process."""
    logger.warning(
        "label maps are RGB pictures, read by Cityscapes' colours. Two of them stand for two classes: pole groups "
        "become poles, licence plates cars."
    )


def _checked(raw: np.ndarray, known: np.ndarray, where: str) -> np.ndarray:
    """`raw` as uint8 if every id is defined or 255."""
    good = known.astype(np.uint8)
    good[IGNORE_INDEX] = 1
    if raw.dtype == np.uint8 and not cv2.countNonZero(cv2.LUT(raw, 1 - good)):
        return raw
    inside = (raw >= 0) & (raw <= 255) if raw.dtype.itemsize > 1 else True
    ids = raw.astype(np.uint8, copy=False)
    fine = (cv2.LUT(ids, good) == 1) & inside
    if not fine.all():
        wrong = raw[~fine]
        found, times = np.unique(wrong, return_counts=True)
        listed = ", ".join(f"{value} ({count} pixels)" for value, count in zip(found[:5], times[:5], strict=True))
        raise ValueError(
            f"{where} contains the ids {listed}, but its label space has the ids {_ranges(known)}, and 255 for ignored "
            "pixels. Set label_space, class_names or label_ids to what the ids mean."
        )
    return ids


def _ranges(known: np.ndarray) -> str:
    """0..3, 7, 9..11"""
    ids = np.flatnonzero(known)
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run))
