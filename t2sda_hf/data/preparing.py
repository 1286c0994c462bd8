"""A domain in, parquet shards out: class ids as 8-bit PNG, original names, class counts, images perhaps resized."""

import hashlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm import tqdm

from ..config import DomainConfig
from ..errors import SIGNALS
from ..files import file_bytes, read_header
from ..labels import IGNORE_INDEX, LABEL_SPACES, VOID
from ..storage import read_json, refuse_inside, write_text
from .domains import Domain, load_domain
from .layouts import LAYOUTS
from .shards import COUNTS, counts_file, counts_of_shard, write_counts
from .sources import DRAWN
from .transforms import resize_labels

Encoding = Literal["png", "jpeg", "raw"]
ROWS_PER_SHARD = 128  # GTA5: 195 files of 350 MB; what a kill costs is at most one per process


def prepare_layout(
    name: str,
    root: str,
    output: Path,
    *,
    size: tuple[int, int] | None = None,
    resize_mode: Literal["keep_ratio", "exact"] = "keep_ratio",
    encoding: Encoding = "png",
    splits: Sequence[str] = (),
    unlabelled: Sequence[str] = (),
    incomplete: bool = False,
    num_processes: int | None = None,
) -> dict[str, int]:
    """Turn an unpacked official download into `output`, which `DomainConfig.path` takes.

    Args:
        name: of `layouts.LAYOUTS`.
        size, resize_mode: as DomainConfig.resize; None keeps the files as they are, byte for byte.
        encoding: of resized images. "raw" is not compressed: large, and the fastest to read.
        splits: those to prepare; () is all the layout has.
        unlabelled: of these, those without labels; their label files are not looked for.
        incomplete: accept another number of images than the complete download has.
        num_processes: None is one per core.

    Returns:
        Images per split.

    Raises:
        ValueError: for a download that is not complete or not what it should be, or an output of other settings.
    """
    if name not in LAYOUTS:
        raise ValueError(f"there is no layout {name!r}: known are {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    unknown = sorted({*splits, *unlabelled} - set(layout.splits))
    if unknown:
        raise ValueError(f"{name} has no split {', '.join(unknown)}: it has {', '.join(layout.splits)}.")
    _refuse_other_card(output)
    classes = tuple(name for name in LABEL_SPACES[layout.space] if name != VOID)
    domains = {}
    for split in splits or layout.splits:  # all of them are looked at before any work
        config = DomainConfig(path=root, layout=name, split=split, resize=size, resize_mode=resize_mode)
        domain = load_domain(config, classes, labelled=split not in unlabelled)
        expected = layout.splits[split][1]
        if len(domain) != expected and not incomplete:
            raise ValueError(
                f"{name} ({split}) has {len(domain)} images in {root}, but the complete download has {expected}. "
                "Unpack all archives, or accept what is there with --incomplete."
            )
        domains[split] = domain
    for split, domain in domains.items():
        prepare(domain, output, split, len(classes), encoding, num_processes)
        if domain.rule is not None:
            _check_classes(output, split, name, classes)
    _describe(output, name, LABEL_SPACES[layout.space])
    return {split: len(domain) for split, domain in domains.items()}


def prepare_domain(
    config: DomainConfig,
    classes: Sequence[str],
    output: Path,
    *,
    labelled: bool,
    encoding: Encoding = "png",
    num_processes: int | None = None,
) -> int:
    """Turn any domain into `output`: its images as they are trained on, label maps of the ids of `classes`.

    Returns:
        The number of images.

    Raises:
        ValueError: for a domain or an output at fault.
    """
    if not re.fullmatch(r"\w+", config.split):
        raise ValueError(f"split must be a plain name, which files can begin with, got {config.split!r}.")
    if config.path not in DRAWN:
        refuse_inside(output, [config.path, config.label_path])
    _refuse_other_card(output)
    domain = load_domain(config, classes, labelled)
    prepare(domain, output, config.split, len(classes), encoding, num_processes)
    _describe(output, domain.name, classes)
    return len(domain)


def prepare(
    domain: Domain,
    output: Path,
    split: str,
    num_classes: int,
    encoding: Encoding = "png",
    num_processes: int | None = None,
) -> None:
    """Write the shards of one split. A shard appears when it is complete, so a killed run goes on where it was.

    Raises:
        ValueError: naming the first file at fault, or if `output` holds shards of other settings or files.
    """
    shards = -(-len(domain) // ROWS_PER_SHARD)
    paths = [output / f"{split}-{shard:05d}-of-{shards:05d}.parquet" for shard in range(shards)]
    _claim(domain, output, split, encoding, [path.exists() for path in paths])
    todo = [shard for shard in range(shards) if not paths[shard].exists()]
    jobs = [(domain, shard, paths[shard], num_classes, encoding) for shard in todo]
    with tqdm(total=len(domain), initial=len(domain) - _rows(todo, len(domain)), unit="image", desc=split) as bar:
        for _, written in _in_processes(_write_shard, jobs, num_processes):
            bar.update(written)
    counted = output / counts_file(split)
    if domain.rule is None or (not todo and counted.exists()):
        return
    counted.unlink(missing_ok=True)
    parts = {}
    with tqdm(total=shards, unit="file", desc=f"{split}: where images lie") as bar:
        of_all = [(path, domain.config.max_pixels) for path in paths]
        for place, part in _in_processes(counts_of_shard, of_all, num_processes):
            parts[place] = part
            bar.update()
    write_counts(output, split, [parts[place] for place in range(shards)], [path.name for path in paths])


def _in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], num_processes: int | None
) -> Iterator[tuple[int, Any]]:
    """(place of the job, what the function gave) as they end."""
    workers = min(num_processes or os.cpu_count() or 1, max(len(jobs), 1))
    if workers == 1:
        yield from ((place, function(*job)) for place, job in enumerate(jobs))
        return
    context = get_context("forkserver")  # not forked from here: threads, torch's among them, would be missing
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _begin_worker) as pool:
        running = {pool.submit(function, *job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker() -> None:
    """One thread for torch; signals are the parent's to follow, and without it there is nothing to do."""
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _rows(shards: Sequence[int], length: int) -> int:
    return sum(min(ROWS_PER_SHARD, length - shard * ROWS_PER_SHARD) for shard in shards)


def _refuse_other_card(output: Path) -> None:
    card = output / "README.md"
    if card.is_file() and "by `t2sda prepare`" not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{card} exists, and `t2sda prepare` did not write it: choose another --output.")


def _claim(domain: Domain, output: Path, split: str, encoding: Encoding, written: Sequence[bool]) -> None:
    """Remember in a hidden file what the shards are made of, and refuse to mix; `written` says which shards exist."""
    digest = hashlib.sha256()
    for row in domain.table.select_columns([name for name in ("file_name",) if name in domain.table.column_names]):
        digest.update(row["file_name"].encode() + b"\0")
    rule = None if domain.rule is None else hashlib.sha256(domain.rule.ids.tobytes()).hexdigest()
    settings = {"config": asdict(domain.config), "encoding": encoding, "files": digest.hexdigest(), "ids": rule}
    contents = _stamps(domain)
    text = json.dumps({**settings, "contents": contents, "format": 1}, sort_keys=True)
    memory = output / f".{split}.json"
    output.mkdir(parents=True, exist_ok=True)
    known = memory.read_text(encoding="utf-8", errors="replace") if memory.exists() else None
    if known is not None and (any(output.glob(f"{split}-*.parquet")) or known.endswith("}")):  # else it was cut
        earlier = read_json(memory)
        earlier = earlier if isinstance(earlier, dict) else {}
        before = earlier.pop("contents", contents)  # an earlier release knows nothing of it
        if earlier | {"contents": contents} != json.loads(text) or len(before) != len(contents):
            raise ValueError(
                f"{output} holds the split {split} of other files or settings (see {memory.name}). Choose another "
                "--output, or remove the folder yourself."
            )
        changed = [there and then != now for there, then, now in zip(written, before, contents, strict=True)]
        if any(changed):
            raise ValueError(
                f"{output} holds the split {split} of files that are others now, {sum(changed)} of its {len(changed)} "
                "parquet files. Choose another --output, or remove the folder yourself."
            )
    elif any(output.glob(f"{split}-*.parquet")):
        raise ValueError(f"{output} holds a split {split} that was not made here. Choose another --output.")
    if known != text:
        write_text(memory, text)


def _stamps(domain: Domain) -> list[str]:
    """By what images and label maps of each shard are known to be as they were: size and time of each file, or the
    length of bytes. A copy that keeps its times counts as the same, which the inodes of `contents.stamp` would refuse.
    """
    columns = domain.table.with_format("arrow")[:]
    columns = columns.select([name for name in ("image", "label") if name in columns.column_names])
    found = []
    for first in range(0, len(columns), ROWS_PER_SHARD):
        digest = hashlib.sha256()
        for column in columns.slice(first, ROWS_PER_SHARD).combine_chunks().columns:
            paths, cells = (pc.struct_field(column, name) for name in ("path", "bytes"))
            for path, length in zip(paths.to_pylist(), pc.binary_length(cells).to_pylist(), strict=True):
                file = Path(path).stat() if length is None and path and Path(path).exists() else None
                digest.update(f"{(file.st_size, file.st_mtime_ns) if file else length}".encode())
        found.append(digest.hexdigest()[:16])
    return found


def _write_shard(domain: Domain, shard: int, path: Path, num_classes: int, encoding: Encoding) -> int:
    rows = [
        _prepared(domain, index, num_classes, encoding)
        for index in range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(domain)))
    ]
    features = Features({"image": Image(), "file_name": Value("string")})
    if domain.rule is not None:
        features |= {"label": Image(mode="L"), COUNTS: List(Value("int64"))}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        Dataset.from_list(rows, features=Features(features)).to_parquet(str(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(rows)


def _prepared(domain: Domain, index: int, num_classes: int, encoding: Encoding) -> dict[str, Any]:
    row = domain.table[index]
    where = domain.where(row, index)
    image = domain.image(index)  # decoded in any case: a damaged file must not get in
    size = (image.shape[0], image.shape[1])
    target = domain.working_size(size)
    encoded = target != size or domain.config.crop_box is not None
    limit = domain.config.max_pixels
    cell = {
        "bytes": _encoded(domain.resized_image(index), encoding) if encoded else file_bytes(row["image"], where, limit)
    }
    name = row.get("file_name") or f"row {index}"
    result: dict[str, Any] = {"image": cell | {"path": None}, "file_name": name}
    if domain.rule is None:
        return result
    if read_header(row["image"], where, limit)[1] != 1:
        raise ValueError(f"{where}: the photo must be turned (EXIF), its label map cannot be. Save it upright.")
    labels = domain.labels(index)
    if labels.shape != size:
        raise ValueError(
            f"{where}: the image has {size[1]}x{size[0]} pixels, its label map {labels.shape[1]}x{labels.shape[0]}. "
            "They must be equal; unpack both archives again."
        )
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes].tolist()
    label = {"bytes": _encoded(resize_labels(labels, target), "png"), "path": None}
    return result | {"label": label, COUNTS: counts}


def _check_classes(output: Path, split: str, name: str, classes: Sequence[str]) -> None:
    """Whether the labels are plausible as a whole: other files of the same format would pass one by one."""
    counts = sum(
        np.array(pq.read_table(file, columns=[COUNTS])[COUNTS].to_pylist()).sum(axis=0)
        for file in output.glob(f"{split}-*.parquet")
    )
    present = [label for label, total in zip(classes, np.atleast_1d(counts), strict=True) if total]
    expected = ("road", "building", "sky", "car") if name == "synthia" else ()
    missing = [label for label in expected if label not in present]
    if len(present) < 2 or missing:
        raise ValueError(
            f"the labels of {name} ({split}) show {', '.join(present) or 'no class'}"
            f"{' but never ' + ', '.join(missing) if missing else ''}: this is another data set, or another "
            f"subset. Remove {output} and give the right --root."
        )


def _encoded(pixels: np.ndarray, encoding: Encoding) -> bytes:
    file = io.BytesIO()
    picture = PILImage.fromarray(pixels)
    if encoding == "png":
        picture.save(file, format="PNG", compress_level=1)
    elif encoding == "jpeg":
        picture.save(file, format="JPEG", quality=95, subsampling=0)
    else:
        picture.save(file, format="BMP")
    return file.getvalue()


def _describe(output: Path, name: str, names: Sequence[str]) -> None:
    """The card by which `datasets` finds the splits: a configuration each, since one may have no labels."""
    splits = sorted({file.name.split("-")[0] for file in output.glob("*-of-*.parquet")})
    configs = "\n".join(
        f"- config_name: {split}\n  data_files:\n  - split: {split}\n    path: {split}-*.parquet" for split in splits
    )
    ids = ", ".join(f"{label_id} {label}" for label_id, label in enumerate(names) if label != VOID)
    write_text(
        output / "README.md",
        f"---\nconfigs:\n{configs}\n---\n"
        f"{name}, prepared by `t2sda prepare`. `label` holds class ids, 255 ignored: {ids}. `{COUNTS}` are "
        "pixels per class at the size of the original file. The terms of the original data set apply.\n",
    )
