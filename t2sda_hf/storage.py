"""Files that are read back: written whole or not at all, and read so that a damaged one never ends a command. And
what a command may write: never over anything that it did not make.

A kill or a full disk may come at any byte. What was there before stays readable then, and what is cut is named, left
out and, where it can be, made again. Only the standard library is imported here.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MADE_FILE = ".t2sda.json"  # in a folder: which of its files which command made, and their sha256


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step: a reader sees the old or the new one, never a part.

    Raises:
        OSError: the old one stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write the same file
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


def foreign_json(path: Path, keys: set[str]) -> bool:
    """Whether a file is there that is not ours: one without these keys. A cut one may be ours if it begins as JSON."""
    content = read_json(path)
    if content is None:
        return path.exists() and path.read_bytes().strip(b"\0\n ")[:1] not in (b"", b"{")
    return not (isinstance(content, dict) and keys <= content.keys())


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
        with suppress(OSError):  # some file systems have no rights, or let nobody change them
            shutil.copymode(probe, path)
    probe.unlink()


@cache
def _tell_about_folders(reason: str) -> None:
    logger.warning("fsync of a folder is not possible on this file system (%s): it is left out.", reason)


def refuse_inside(path: Path, inputs: Iterable[str], flag: str = "--output") -> None:
    """ValueError for an output that is one of the inputs, or in a folder of them: it would be read with the next.

    `flag` gives another one.
    """
    place = Path(os.path.realpath(path))
    for source in (Path(os.path.realpath(name)) for name in inputs if name and Path(name).exists()):
        if place == source:
            raise ValueError(f"{path} is read as data: pass another {flag}.")
        if source in place.parents:
            raise ValueError(f"{path} lies in {source}, which is read as data: pass another {flag}.")


def refuse_foreign(command: str, paths: Iterable[Path], inputs: Iterable[str] = ()) -> None:
    """ValueError for an output that is in the way: only what the same command made there is ever replaced.

    Args:
        command: "evaluate".
        paths: files and folders that it will write. A folder must hold nothing but what it made; hidden files do not
            count.
        inputs: folders and files of data that it reads; words that are no path are left out.
    """
    inputs = list(inputs)
    for path in paths:
        refuse_inside(path, inputs)
        made = _made_in(path if path.is_dir() else path.parent, command)
        for file in _files_of(path):
            name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
            if name not in made:
                raise ValueError(f"{file} exists, and `t2sda {command}` did not write it: pass another --output.")
            if made[name] != sha256_of(file):
                raise ValueError(f"{file} was changed since `t2sda {command}` wrote it: pass another --output.")


@contextmanager
def outputs(command: str, *paths: Path, inputs: Iterable[str] = ()) -> Iterator[None]:
    """Write files or folders inside of this: see `refuse_foreign`. What is there afterwards was made by `command`."""
    refuse_foreign(command, paths, inputs)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:  # however it ends, its files are its own
        for path in paths:
            folder = path if path.is_dir() else path.parent
            made = {file.relative_to(folder).as_posix(): sha256_of(file) for file in _files_of(path)}
            if made:
                content = read_json(folder / MADE_FILE)
                known = content if isinstance(content, dict) else {}
                write_json(folder / MADE_FILE, known | {command: _made_in(folder, command) | made})


def _files_of(path: Path) -> list[Path]:
    """A file itself, if it exists; of a folder all that is in it, but nothing hidden."""
    if not path.is_dir():
        return [path] if path.exists() or path.is_symlink() else []
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _made_in(folder: Path, command: str) -> dict[str, str]:
    """Name -> sha256 of the files that a command made in a folder."""
    content = read_json(folder / MADE_FILE)
    made = content.get(command) if isinstance(content, dict) else None
    return made if isinstance(made, dict) else {}


def sha256_of(file: Path) -> str:
    """sha256 of what is in a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()
