"""One file in, one array out: RGB images and maps of ids, or a ValueError that says what is wrong with the file.

A cell is what a column `Image(decode=False)` of `datasets` holds: {"bytes", "path"}, one of them None. A path may go
on with `RANGE`: the file is a part of another one.
"""

import io
import logging
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
from PIL import Image, ImageFile, ImageOps

from .labels import IGNORE_INDEX
from .listing import FORMATS, refuse_pointer

logger = logging.getLogger(__name__)

Cell = Mapping[str, Any]
Color = tuple[int, int, int]

HUB = "hf://datasets/"  # how paths on the Hub begin
ZIP = "zip://"  # how `datasets` names a file of an archive: zip://NAME::ARCHIVE
RANGE = "#bytes="  # how a path goes on that means a part of a file: PATH#bytes=FIRST-BEHIND_LAST
_PIXELS = 2**22  # files up to 64 MiB are read whatever max_pixels says
TRANSPARENT: Color = (256, 0, 0)  # stands for pixels of no opacity, whatever their colour
_LOSSY = ("jpeg", "tiff_jpeg", "webp", "jxl", "jpegxl", "jp2k", "lerc")  # compressions inside of a TIFF

# What Pillow and its plugins raise for damaged files.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# What `zipfile` raises for an archive that is damaged, has no such file, or is encrypted or packed in another way.
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError)
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
        known: (256,) bool, ids that the data set defines. Others are an error, except 255 and -1: pixels without a
            class. If the data set defines 255, it is an id like others.
        colors: RGB or `TRANSPARENT` -> id on disk, for coloured maps; None if there are no colours.
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
            deep = _sample(picture)[0] > 8
            turned = picture.getexif().get(_ORIENTATION, 1) != 1
            upright = ImageOps.exif_transpose(picture) if turned else picture
            pixels = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
        except _DAMAGE as error:
            raise _damaged(where, error) from error
    if deep and pixels.max() < 64:  # the upper halves of 16 bits: with 14 used bits or fewer there is nothing in them
        raise ValueError(
            f"{where} has more than 8 bits per channel, and no pixel is brighter than a quarter of 16 bits: as it "
            "stands it is black. How to bring it to 8 is for you to say: save it as 8-bit RGB."
        )
    return pixels


def read_labels(cell: Cell | None, where: str, rule: LabelRule, max_pixels: int) -> np.ndarray:
    """(H,W) uint8 class ids of the run, 255 ignored.

    Palette files give their indices: turned to grey they would give brightness. Grey values of 1, 2 or 4 bits are
    taken as they are stored. A picture of three equal channels is a grey one, unless all its values are colours of the
    rule. Colours are matched exactly. A GIF has grey values as a palette, so one whose palette is grey gives these
    values, and another its indices. Arrays (.npy) hold ids. -1, and 65535 in 16 bits, are ignored like 255.

    Raises:
        ValueError: for a file that is no map of ids (JPEG, colours without a table, unknown colours or ids).
    """
    data = file_bytes(cell, where, max_pixels)
    raw = _array(data, where, max_pixels) if data[:6] == b"\x93NUMPY" else _label_pixels(data, where, rule, max_pixels)
    if raw.ndim == 3:
        if not rule.always_colored:
            _tell_about_standard_colors()
        return _ids_of_colors(raw, rule, where)
    return _mapped(raw, rule, where)


def _label_pixels(data: bytes, where: str, rule: LabelRule, max_pixels: int) -> np.ndarray:
    """The ids that stand in a picture, (H,W) of whole numbers, or its colours, (H,W,3) or (H,W,4) uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = _opened(data, where, max_pixels)
        lossy_tiff = picture.format == "TIFF" and picture.info.get("compression") in _LOSSY
        lossy_webp = picture.format == "WEBP" and b"VP8L" not in data
        if picture.format in ("JPEG", "MPO", "JPEG2000", "AVIF") or lossy_tiff or lossy_webp:
            kind = "TIFF with JPEG or a like compression" if lossy_tiff else f"{picture.format} file"
            raise ValueError(
                f"{where}: the label map is a {kind}. Its compression mixes neighbouring ids; export the labels again "
                "as PNG."
            )
        try:
            if picture.format == "PNG":
                picture.verify()  # checksums: a wrong bit may decode, to other ids
                picture = _opened(data, where, max_pixels)
        except _DAMAGE as error:
            raise _damaged(where, error) from error
        colored = rule.colors is not None and (rule.always_colored or picture.mode in ("RGB", "RGBA"))
        bits, inverted = _sample(picture)
        deep = bits > 8 and picture.mode in ("RGB", "RGBA", "LA")
        raw: np.ndarray | None = None
        try:
            if deep and rule.first_channel and picture.format == "PNG":
                raw = _first_channel(data)
            elif deep or (picture.format == "PPM" and picture.tile[0][0] != "raw"):  # whose values would be scaled
                pass
            elif colored:
                grey = None if rule.always_colored else _grey(picture)
                if grey is not None and _are_ids(grey, rule):
                    raw = grey
                else:
                    raw = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
            elif picture.mode in ("RGB", "RGBA", "LA"):
                raw = _grey(picture)
            elif picture.format == "GIF" and (grey := _grey(picture)) is not None:
                raw = grey  # a GIF has no mode for grey values: it has them as a palette, in any order
            elif picture.mode in ("L", "P", "1") or picture.mode.startswith("I"):
                raw = np.asarray(picture)
                if picture.mode == "L" and inverted:
                    raw = 255 - raw
                if picture.mode == "L" and bits < 8:  # Pillow spread them over 0..255
                    raw = raw // (255 // (2**bits - 1))
        except _DAMAGE as error:
            raise _damaged(where, error) from error
    if raw is None:
        kind = "16-bit colour" if deep else picture.mode
        raise ValueError(
            f"{where}: the label map is a {kind} picture, not a map of ids. Save class ids as 8-bit grey or palette "
            "PNG, or say in label_colors what its colours mean (label_space synthia reads SYNTHIA's 16-bit files)."
        )
    return raw


def _grey(picture: Image.Image) -> np.ndarray | None:
    """(H,W) uint8, the value of three equal channels of an opaque picture; None for any other."""
    pixels = np.asarray(picture.convert("RGBA"))
    value = pixels[..., 0]
    equal = (pixels[..., 1] == value) & (pixels[..., 2] == value) & (pixels[..., 3] == 255)
    return value if equal.all() else None


def _are_ids(grey: np.ndarray, rule: LabelRule) -> bool:
    """Whether grey values are all ids of a rule, or 255, and not all of them its colours."""
    values = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    colors = rule.colors or {}
    fits = all(rule.known[value] or value == IGNORE_INDEX for value in values)
    return fits and not all((value, value, value) in colors for value in values.tolist())


def _array(data: bytes, where: str, max_pixels: int) -> np.ndarray:
    """The ids of a .npy file: (H,W), or (H,W,1), of whole numbers. Its size is looked at before it is read."""
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        whole = dtype.kind in "biu"
        if not whole or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 1):
            raise ValueError(
                f"{where}: the label map is an array of the shape {shape} and the type {dtype}. Save class ids as "
                "whole numbers of the shape (height, width)."
            )
        fits = shape[0] * shape[1] <= max_pixels and len(data) >= shape[0] * shape[1] * dtype.itemsize
        if not fits:
            raise ValueError(
                f"an array of {shape[1]}x{shape[0]} ids, with max_pixels {max_pixels}, in {len(data)} bytes"
            )
        stream.seek(0)
        return np.load(stream, allow_pickle=False).reshape(shape[:2])
    except _DAMAGE as error:
        if str(error).startswith(where):
            raise
        raise _damaged(where, error) from error


def read_header(cell: Cell | None, where: str, max_pixels: int) -> tuple[tuple[int, int], int]:
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
            bits = _sample(picture)[0]
            if picture.format == "PNG":
                whole, settled = True, not any(word in data for word in _PNG_MAY_TURN)
                picture.verify()  # checksums of all its parts; a wrong bit may decode without complaint
                orientation = 1 if settled else _opened(data, where, max_pixels).getexif().get(_ORIENTATION, 1)
            else:
                orientation = picture.getexif().get(_ORIENTATION, 1)
        except _DAMAGE as error:
            raise _damaged(where, error) from error
    width, height = picture.size
    if not whole or picture.mode.startswith(("I", "F")) or bits > 8:
        read_image({"bytes": data, "path": None}, where, max_pixels)
    return ((width, height) if orientation in (5, 6, 7, 8) else (height, width)), orientation


class VideoFrames(Iterator[np.ndarray]):
    """The frames of a video, (H,W,3) uint8 RGB, turned upright as its display matrix says.

    Attributes:
        rate: frames a second; 25 if the file does not say.
        expected: frames that the file says it has; 0 if it does not say.
        size: (height, width) of a frame.

    Raises:
        ValueError: if nothing can be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._video = cv2.VideoCapture(path)
        self._video.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        self._next: np.ndarray | None = self._following()
        if self._next is None:
            raise ValueError(f"{path} is not a video that can be read. Convert it, for instance to MP4 with H.264.")
        self.size: tuple[int, int] = self._next.shape[:2]
        rate = self._video.get(cv2.CAP_PROP_FPS)
        self.rate = Fraction(rate).limit_denominator(1001) if 0 < rate < 1000 else Fraction(25)
        self.expected = max(int(self._video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def __next__(self) -> np.ndarray:
        if self._next is None:
            self._video.release()
            raise StopIteration
        pixels = cv2.cvtColor(self._next, cv2.COLOR_BGR2RGB)
        self._next = self._following()
        return pixels

    def _following(self) -> np.ndarray | None:
        good, pixels = self._video.read()
        return pixels if good else None

    def cut(self, read: int) -> str:
        """A sentence if the file has clearly more frames than were `read`; "" if not."""
        if read >= self.expected - max(2, 0.05 * self.expected):  # some containers only know about how many
            return ""
        return (
            f"{self._path} ends after {read} of {self.expected} frames: it is cut or damaged. Copy it again, or "
            "convert what is there."
        )


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
        if path.startswith(ZIP):
            name, _, archive = path.removeprefix(ZIP).partition("::")
            with fsspec.open(archive) as stream, zipfile.ZipFile(stream) as opened:
                size = opened.getinfo(name).file_size  # no more is read, whatever the archive holds
                data: bytes | None = opened.read(name) if size <= most else None
        elif part := re.fullmatch(rf"(.*){RANGE}(\d+)-(\d+)", path, re.S):
            start, size = int(part[2]), int(part[3]) - int(part[2])
            system, place = fsspec.core.url_to_fs(part[1])
            with system.open(place, cache_type="none") as stream:
                stream.seek(start)
                data = stream.read(size) if size <= most else None
        elif path.startswith(HUB):
            with fsspec.open(path) as stream:
                size = stream.size
                data = stream.read() if size <= most else None
        elif "://" in path or not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{where}: {path} is no file. Only regular files are read.")
        else:
            size = os.path.getsize(path)
            data = Path(path).read_bytes() if size <= most else None
    except (*_BAD_ARCHIVE, OSError) as error:
        raise ValueError(f"{where}: {path} cannot be read: {error}. Check that the file is still there.") from error
    if data is None:
        raise ValueError(
            f"{where}: {path} has {size} bytes, which is far too large for an image: it is not read. Raise the "
            "domain's max_pixels if the size is right."
        )
    return data


def _opened(data: bytes, where: str, max_pixels: int) -> ImageFile.ImageFile:
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} is far too large: {error} Cut it into tiles.") from error
    except _DAMAGE as error:
        raise ValueError(f"{where} cannot be read as an image: {_first_line(error)}. Export it again.") from error
    if picture.width * picture.height > max_pixels:
        raise ValueError(
            f"{where} has {picture.width}x{picture.height} pixels, more than max_pixels ({max_pixels}): it is not "
            "decoded, to save memory. Raise max_pixels if the size is right."
        )
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:  # MPO: a photo with a preview
        raise ValueError(f"{where} has {picture.n_frames} frames: an image is one. Save the frames as files.")  # type: ignore[attr-defined]
    return picture


def _damaged(where: str, error: BaseException) -> ValueError:
    return ValueError(f"{where} is cut or damaged: {_first_line(error)}. Copy or export it again.")


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(" <_io.BytesIO object[^>]*>", "", line).rstrip(".")


def _is_plain_bmp(picture: Image.Image, data: bytes) -> bool:
    """A whole BMP of 3 uncompressed bytes a pixel, as "raw" prepares: OpenCV reads it four times as fast."""
    length = picture.height * ((3 * picture.width + 3) // 4 * 4)  # lines are filled up to 4 bytes
    plain = picture.format == "BMP" and data[28:34] == b"\x18\0\0\0\0\0"
    return plain and len(data) >= int.from_bytes(data[10:14], "little") + length


def _sample(picture: ImageFile.ImageFile) -> tuple[int, bool]:
    """Bits of a stored sample, and whether 0 is white; of a file that Pillow has opened and not yet decoded.

    Pillow spreads grey values of 2 and 4 bits over 0..255, and keeps the upper halves of 16-bit colours. The names of
    its raw forms tell: "L;4", "RGB;16B", "L;I".
    """
    arguments = picture.tile[0][3] if picture.tile else ""
    form = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    how = str(form).partition(";")[2]
    digits = re.match(r"\d*", how)[0]  # type: ignore[index]
    return int(digits or 8), "I" in how


def _first_channel(data: bytes) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("not a readable PNG")
    return pixels[..., 2]  # OpenCV's order is B, G, R


def _ids_of_colors(pixels: np.ndarray, rule: LabelRule, where: str) -> np.ndarray:
    """(H,W,3) or, with opacity, (H,W,4) uint8 -> (H,W) uint8 class ids of the run, by exact colour."""
    table = {_number(color): label_id for color, label_id in (rule.colors or {}).items()}
    keys = pixels[..., :3].astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    if pixels.shape[2] == 4:
        opacity = pixels[..., 3]
        if ((opacity != 0) & (opacity != 255)).any():
            raise ValueError(
                f"{where}: the label map has half-transparent pixels: it was smoothed, or is a RGBA picture to look "
                "at, not a map of ids. Export it without smoothing."
            )
        if _number(TRANSPARENT) in table:
            keys = np.where(opacity == 0, np.uint32(_number(TRANSPARENT)), keys)
    found, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    unknown = [(key, count) for key, count in zip(found.tolist(), counts.tolist(), strict=True) if key not in table]
    if unknown:
        unknown.sort(key=lambda pair: -pair[1])
        listed = ", ".join(f"{key >> 16},{key >> 8 & 255},{key & 255} ({count} pixels)" for key, count in unknown[:5])
        raise ValueError(
            f"{where}, an RGB picture, shows {len(unknown)} colours without a class: {listed}. Add them to "
            "label_colors (void: no class; transparent: pixels of no opacity); colours by the dozen mean that the map "
            "was smoothed, or is not a label map."
        )
    return rule.ids[[table[key] for key in found.tolist()]][inverse].reshape(pixels.shape[:2])


def _number(color: Color) -> int:
    return color[0] * 65536 + color[1] * 256 + color[2]


@cache
def _tell_about_standard_colors() -> None:
    """Once per process."""
    logger.warning(
        "label maps are RGB pictures, read by Cityscapes' colours. Two of them stand for two classes: pole groups "
        "become poles, licence plates cars."
    )


def _mapped(raw: np.ndarray, rule: LabelRule, where: str) -> np.ndarray:
    """Class ids of the run, uint8, of ids that are all defined, or stand for no class."""
    good = rule.known.astype(np.uint8)
    good[IGNORE_INDEX] = 1
    raw = np.ascontiguousarray(raw.astype(np.uint8) if raw.dtype == bool else raw)
    if raw.dtype == np.uint8:
        ids, fine = raw, np.True_ if not cv2.countNonZero(cv2.LUT(raw, 1 - good)) else cv2.LUT(raw, good) == 1
        labels = cv2.LUT(ids, rule.ids)
    else:
        without = raw == (-1 if np.issubdtype(raw.dtype, np.signedinteger) else np.iinfo(raw.dtype).max)
        ids = raw.astype(np.uint8)
        fine = without | ((cv2.LUT(ids, good) == 1) & (raw >= 0) & (raw <= 255))
        labels = np.where(without, np.uint8(IGNORE_INDEX), cv2.LUT(ids, rule.ids))
    if not fine.all():
        found, times = np.unique(raw[~fine], return_counts=True)
        listed = ", ".join(f"{value} ({count} pixels)" for value, count in zip(found[:5], times[:5], strict=True))
        ignored = "" if rule.known[IGNORE_INDEX] else ", and 255 for ignored pixels"
        raise ValueError(
            f"{where} contains the ids {listed}, but its label space has the ids {_ranges(rule.known)}{ignored}. Set "
            "label_space, class_names or label_ids to what the ids mean."
        )
    return labels


def _ranges(known: np.ndarray) -> str:
    """0..3, 7, 9..11"""
    ids = np.flatnonzero(known)
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run))
