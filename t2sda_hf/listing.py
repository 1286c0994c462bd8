"""Which files a folder has. Every reader of a folder lists it here, so all of them see the same files.

No file is left out without a word: what is not used comes with the reason. Only the standard library is imported here.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# The bytes of a file choose among these decoders only. Others that Pillow knows start programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "PPM", "AVIF")
LABEL_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".npy")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_PICTURES = (".heic", ".heif", ".avif", ".gif", ".jp2", ".dng", ".cr2", ".nef", ".arw", ".raw", ".exr", ".psd", ".svg")
# What operating systems and their programs leave in folders, besides names that begin with a dot.
_SYSTEM = ("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Listing:
    """What is in a folder.

    Attributes:
        files: those to use, sorted.
        ignored: reason -> files and folders that are left out; the reason is such that "3 " fits in front of it.
    """

    files: list[Path]
    ignored: dict[str, list[Path]]


def list_files(folder: Path, suffixes: Sequence[str], deep: bool = True) -> Listing:
    """The files of a folder whose names end in one of `suffixes`, upper case or lower case.

    Links are followed, to files and to folders; one that leads back to a folder above it is not. Hidden files and
    folders are left out with all that is in them, as are those of operating systems (`__MACOSX`, `Thumbs.db`).

    Args:
        deep: also those of its folders, and of the folders in them.
    """
    listing = Listing([], {})
    _walk(folder, tuple(suffixes), deep, (_identity(folder),), listing)
    return Listing(sorted(listing.files), listing.ignored)


def _walk(
    folder: Path, suffixes: tuple[str, ...], deep: bool, above: tuple[tuple[int, int], ...], listing: Listing
) -> None:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        listing.ignored.setdefault("folders that cannot be opened", []).append(folder)
        return
    for name in names:
        path, reason = folder / name, ""
        if name.startswith(".") or name in _SYSTEM:
            reason = "hidden"
        elif not _is_text(name):
            reason = "whose names are not UTF-8 (rename them)"
        elif os.path.isdir(path):
            own = _identity(path)
            if not deep:
                reason = "folders"
            elif own in above:
                reason = "links in a circle"
            else:
                _walk(path, suffixes, deep, (*above, own), listing)
                continue
        elif not os.path.isfile(path):
            reason = "broken links or special files"
        elif not name.lower().endswith(suffixes):
            suffix = path.suffix.lower()
            reason = f"{suffix} (save them as JPEG or PNG)" if suffix in _PICTURES else suffix or "without an ending"
        if reason:
            listing.ignored.setdefault(reason, []).append(path)
        else:
            listing.files.append(path)


def _identity(folder: Path) -> tuple[int, int]:
    """Of the folder itself, whatever links lead to it."""
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino


def _is_text(name: str) -> bool:
    """False for bytes that are no UTF-8, which Python keeps as lone surrogates: no table can hold them."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def account(used: int, ignored: Mapping[str, Sequence[object]]) -> str:
    """ "120 of 126 files used; ignored: 4 hidden, 2 .txt", or "" if nothing was left out."""
    total = used + sum(map(len, ignored.values()))
    reasons = ", ".join(f"{len(files)} {reason}" for reason, files in ignored.items() if files)
    return f"{used} of {total} files used; ignored: {reasons}" if reasons else ""


def spelled(path: Path) -> str:
    r"""A path for messages and pages: bytes that are no UTF-8 are written out, as in T\xfcr.png."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def refuse_pointer(start: bytes, where: object) -> None:
    """ValueError if a file that begins like this is what Git keeps in place of a large file."""
    if start.startswith(_POINTER):
        raise ValueError(f"{where} is a Git LFS pointer, not the file itself. Run `git lfs pull` where it was cloned.")


def refuse_pointers(path: Path) -> None:
    """`refuse_pointer` of a file, or of every file directly in a folder; what cannot be read is no pointer."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with suppress(OSError), file.open("rb") as stream:
                refuse_pointer(stream.read(len(_POINTER)), file)


def from_home(text: str) -> str:
    """A path of a user, who may write ~ for the home folder where no shell replaces it; any other text as it is."""
    return os.path.expanduser(text) if text != "~" else text
