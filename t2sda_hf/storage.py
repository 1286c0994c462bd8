"""Files that are read back: written whole or not at all, and read so that a damaged one never ends a command.

A kill or a full disk may come at any byte. What was there before stays readable then, and what is cut is named, left
out and, where it can be, made again. Only the standard library is imported here.
"""

import errno
import json
import logging
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step: a reader sees the old or the new one, never a part.

    Raises:
        OSError: the old one stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON; NaN and infinity are no JSON.

    Raises:
        OSError: the old file stays.
        ValueError: for a number that is not finite.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is none, or if it is damaged, which is said."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # no JSON, or no UTF-8
        logger.warning("%s is damaged (%s): it is read as if it were not there.", path, error)
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; damaged lines are left out and counted in a warning."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    entries, damaged = [], 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            damaged += 1
    if damaged:
        logger.warning("%s has %d damaged lines, which are left out.", path, damaged)
    return entries


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk.

    Some file systems of clusters cannot wait for a folder. That is said once, and left out.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
        _tell_about_folders(os.strerror(error.errno))
    finally:
        os.close(descriptor)


def share_weights(folder: Path) -> None:
    """Give weights in a folder, and below it, the rights that any new file has there.

    safetensors writes them for their owner alone, whatever the umask allows to a group.
    """
    probe = folder / ".rights"
    probe.touch()
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(probe, path)
    probe.unlink()


@cache
def _tell_about_folders(reason: str) -> None:
    logger.warning("fsync of a folder is not possible on this file system (%s): it is left out.", reason)
