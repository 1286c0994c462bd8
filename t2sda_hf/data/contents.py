"""What files hold, wherever they lie: the hash of every byte, and what else was found in them, read once.

Two sets of files are the same if their contents are. What was read of a file is remembered in the cache of `datasets`
for as long as its size, times and inode stay as they were, so that a second start only asks for these.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from ..storage import write_text

logger = logging.getLogger(__name__)

READING = 1  # to be raised when a file is read in another way: what is remembered of it counts no longer
_SHORT = 8  # hexadecimal digits that a record keeps of each part: enough to name those that differ


@dataclass(frozen=True)
class Contents:
    """What a run reads, in parts: the images of a domain in their order, files of a folder, the weights of a network.

    Attributes:
        unit: what a part is called where there are several, such as "images".
        names: of the parts, for messages; they are no part of what is compared.
        digests: sha256 of each, in hexadecimal digits.
    """

    unit: str
    names: Sequence[str]
    digests: Sequence[str]

    @property
    def fingerprint(self) -> str:
        """A number for all of it."""
        return digest("".join(self.digests).encode())

    def record(self) -> dict[str, Any]:
        """What is kept of it, for JSON: the fingerprint, and by "parts" which of them differ from other contents."""
        return {"fingerprint": self.fingerprint, "parts": "".join(one[:_SHORT] for one in self.digests)}

    def difference(self, before: Mapping[str, Any], others: str = "before") -> str:
        """In words how this differs from what `record` gave elsewhere; "" if it does not."""
        return difference(self.record(), before, self.unit, self.names, others)


def difference(
    now: Mapping[str, Any], before: Mapping[str, Any], unit: str, names: Sequence[str], others: str = "before"
) -> str:
    """In words how one record of contents differs from another; "" if it does not. `names` are of the first one."""
    if before["fingerprint"] == now["fingerprint"]:
        return ""
    ours, theirs = (
        [record["parts"][place : place + _SHORT] for place in range(0, len(record["parts"]), _SHORT)]
        for record in (now, before)
    )
    known = list(names) if len(names) == len(ours) else [f"number {place}" for place in range(len(ours))]
    if len(ours) == 1 == len(theirs):
        return f"not the same as {others}"
    if len(ours) == len(theirs):
        differ = [name for name, one, other in zip(known, ours, theirs, strict=True) if one != other]
        order = ", which are the same in another order" if sorted(ours) == sorted(theirs) else ""
        return f"{len(differ)} of {len(ours)} {unit} differ from those {others}{order}, first: {differ[0]}"
    new = [name for name, one in zip(known, ours, strict=True) if one not in set(theirs)]
    return f"{len(ours)} {unit} now, {len(theirs)} {others}{f', first new one: {new[0]}' if new else ''}"


def digest(*parts: bytes | bytearray | memoryview) -> str:
    """sha256 of the parts and their lengths, in hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
        whole.update(len(part).to_bytes(8, "little"))
    return whole.hexdigest()


def file_contents(files: Iterable[Path], root: Path | None = None, unit: str = "files") -> Contents:
    """The contents of files in this order.

    Args:
        files: all of them exist.
        root: names in messages are relative to it.
        unit: see `Contents`.

    Raises:
        OSError: if one cannot be read.
    """
    given = list(files)
    key = ["files", *(str(file.absolute()) for file in given)]
    digests = remembered(
        f"{unit} of {root or given[0].parent}" if given else unit,
        key,
        [stamp(file) for file in given],
        lambda place: digest(given[place].read_bytes()),
    )
    names = [(file.relative_to(root) if root else file).as_posix() for file in given]
    return Contents(unit, names, digests)


def stamp(file: Path) -> list[int]:
    """By what a file is known to be as it was: size, time of its content, time of its inode, number of its inode.

    Raises:
        OSError: if there is no such file.
    """
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def remembered(what: str, key: Any, stamps: Sequence[Any | None], read: Callable[[int], Any]) -> list[Any]:
    """`read` of every place from 0 on, except where the cache has it from an earlier call with the same stamp.

    Args:
        what: the progress bar and messages call it so.
        key: JSON; on what else the results depend, and where the files lie. It chooses the file in the cache.
        stamps: JSON, one for each place; None is never remembered.
        read: gives JSON.

    Raises:
        ValueError, OSError: of `read`.
    """
    name = f"{_number([version('t2sda_hf'), READING, key])}.json"
    path = Path(datasets.config.HF_DATASETS_CACHE) / "t2sda_hf" / name
    known = _read(path, what)
    found: list[Any] = []
    missing = sum(given is None or json.dumps(given) not in known for given in stamps)
    with tqdm(total=missing, desc=f"reading {what}", disable=not missing, leave=False) as bar:
        for place, given in enumerate(stamps):
            name = json.dumps(given)
            if given is None or name not in known:
                found.append(read(place))
                bar.update()
            else:
                found.append(known[name])
    if missing and any(given is not None for given in stamps):
        now = {json.dumps(given): one for given, one in zip(stamps, found, strict=True) if given is not None}
        _write(path, now)
    return found


def _number(key: Any) -> str:
    return digest(json.dumps(key, sort_keys=True).encode())[:32]


def _read(path: Path, what: str) -> dict[str, Any]:
    """What a file of the cache holds. One that is not as it was written is set aside, and nothing of it is believed."""
    try:
        checksum, _, text = path.read_bytes().partition(b"\n")
    except OSError:
        return {}
    if checksum.decode("ascii", "replace") == digest(text):
        content: dict[str, Any] = json.loads(text)
        return content
    set_aside(path, f"the cached statistics of {what}")
    return {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{digest(text.encode())}\n{text}")
    except OSError as error:
        logger.warning("what was read is not remembered: %s cannot be written (%s).", path, error)


def set_aside(path: Path, what: str) -> None:
    """Rename a damaged file or folder of a cache to *.damaged, and say that it is made again."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        path.rename(aside)
    except OSError as error:
        logger.warning("%s in %s are damaged (and stay: %s), and made again.", what, path, error)
    else:
        logger.warning("%s in %s are damaged: set aside as %s, and made again.", what, path, aside.name)


def settings_of(section: Any) -> dict[str, Any]:
    """A dataclass of settings for JSON."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(section)))
    return content
