"""Where the rows of a domain come from: drawn, files, parquet, the Hub or a video in; one `datasets` table out."""

import csv
import difflib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage

from ..config import DomainConfig
from .layouts import find_files
from .streets import streets

# Domains that need no path: name -> a function of the domain's config.
DRAWN: dict[str, Callable[[DomainConfig], Dataset]] = {
    "streets-source": lambda config: streets("source", config.split, config.num_images),
    "streets-target": lambda config: streets("target", config.split, config.num_images),
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LABEL_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".npy")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
LIST_SUFFIXES = (".txt", ".csv", ".tsv")

Pair = tuple[Path, Path | None]


def load_rows(config: DomainConfig, labelled: bool) -> tuple[Dataset, str]:
    """The table of a domain and the label space of its label files.

    Returns:
        Rows with the columns config.image_column and, if there are labels, config.label_column, and perhaps
        "file_name"; the name of the label space, config.label_space unless a layout knows better.

    Raises:
        ValueError: if there is no such data set, or it does not fit together.
    """
    if not config.path:
        raise ValueError("a domain has no path. Set source.path, target.path and test.path.")
    path = Path(config.path)
    if config.layout:
        pairs, space = find_files(config.layout, config.path, config.split, labelled)
        return _table(pairs, path, config), space
    if config.path in DRAWN:
        return DRAWN[config.path](config), config.label_space
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return _video(path, config), config.label_space
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        return _table(_listed(path, labelled), path.parent, config), config.label_space
    if path.is_dir() and (config.label_path or _holds_images_only(path)):
        return _table(_matched(path, config, labelled), path, config), config.label_space
    return _loaded(config), config.label_space


def _table(pairs: list[Pair], root: Path, config: DomainConfig) -> Dataset:
    """Rows of paths. Sizes and times of the files are part of the table's fingerprint, so caches notice changes."""
    if not pairs:
        return Dataset.from_dict({config.image_column: []}, features=Features({config.image_column: Image()}))
    features = Features({config.image_column: Image(), "file_name": Value("string")})
    if pairs[0][1] is not None:
        features[config.label_column] = Image()
    rows = []
    for image, label in pairs:
        row = {config.image_column: _cell(image), "file_name": image.relative_to(root).as_posix()}
        rows.append(row if label is None else row | {config.label_column: _cell(label)})
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for pair in pairs for file in pair if file is not None]
    # Wrapped, since a list directly in gen_kwargs would be taken for shards.
    return _generated(_given_rows, features, {"rows": tuple(rows), "stamps": tuple(stamps)})


def _generated(function: Callable[..., Iterator[dict[str, Any]]], features: Features, arguments: dict) -> Dataset:
    try:
        return Dataset.from_generator(function, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from error


def _given_rows(rows: tuple[dict[str, Any], ...], stamps: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    yield from rows


def _cell(path: Path) -> dict[str, Any]:
    return {"bytes": None, "path": str(path)}


def _is_image(path: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _holds_images_only(folder: Path) -> bool:
    """No parquet or metadata file, which `datasets` would read."""
    known = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
    return not any(file.name in known or file.suffix == ".parquet" for file in folder.rglob("*")) and any(
        _is_image(file) for file in folder.rglob("*")
    )


def _matched(root: Path, config: DomainConfig, labelled: bool) -> list[Pair]:
    """Images and label maps of the same relative name, without the suffixes and extensions."""
    images = {_key(file, root, config.image_suffix): file for file in sorted(root.rglob("*")) if _is_image(file)}
    images.pop("", None)
    if not labelled:
        return [(file, None) for file in images.values()]
    if not config.label_path:
        raise ValueError(
            f"{root} is a folder of images and its labels are needed. Set label_path to the folder of the label maps."
        )
    folder = Path(config.label_path)
    if not folder.is_dir():
        raise ValueError(f"label_path {config.label_path!r} is not a folder. Give the folder of the label maps.")
    labels: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        key = _key(file, folder, config.label_suffix) if _is_image(file, LABEL_SUFFIXES) else ""
        if key and labels.setdefault(key, file) != file:
            raise ValueError(f"{labels[key]} and {file} are label maps of the same name. Remove one.")
    without = [file for key, file in images.items() if key not in labels]
    if without:
        example = next(iter(labels.values()), None)
        raise ValueError(
            f"{len(without)} of {len(images)} images in {root} have no label map in {folder}, first {without[0].name}; "
            f"a label map there is {example.name if example else 'nowhere'}. Names must be equal up to the extension; "
            "say what else differs in image_suffix and label_suffix."
        )
    return [(file, labels[key]) for key, file in images.items()]


def _key(file: Path, root: Path, suffix: str) -> str:
    """Relative name without extension and suffix; "" if the file does not end in the suffix."""
    name = file.relative_to(root).with_suffix("").as_posix()
    return name.removesuffix(suffix) if name.endswith(suffix) else ""


def _listed(path: Path, labelled: bool) -> list[Pair]:
    """Lines "image label" or, for an unlabelled domain, "image": comma in .csv, tab in .tsv, tab or blanks in .txt."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".txt":
        lines = enumerate(text.splitlines(), 1)
        numbered = [(number, line.split("\t") if "\t" in line else line.split()) for number, line in lines]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="," if path.suffix.lower() == ".csv" else "\t")
        numbered = [(reader.line_num, fields) for fields in reader]
    numbered = [(number, fields) for number, fields in numbered if any(field.strip() for field in fields)]
    if numbered and [field.strip().lower() for field in numbered[0][1]] in (["image", "label"], ["image"]):
        numbered = numbered[1:]
    root, pairs = path.parent.resolve(), []
    for number, line in numbered:
        names = [field.strip() for field in line]
        if len(names) > 2 or len(names) < 1 + labelled or not all(names):
            raise ValueError(
                f"{path}, line {number}: expected an image{' and a label map' if labelled else ''}, got {len(names)} "
                f"fields: {line}. Separate names that contain blanks by a tab."
            )
        files = [path.parent / name for name in names]
        for name, file in zip(names, files, strict=True):
            if not Path(os.path.realpath(file)).is_relative_to(root):  # which a circle of links does not stop
                raise ValueError(
                    f"{path}, line {number}: {name!r} lies outside the list's folder. Names are relative to the list; "
                    "put it into the folder that holds everything."
                )
            if not file.is_file():
                raise ValueError(f"{path}, line {number}: there is no file {name!r} beside the list.")
        pairs.append((files[0], files[1] if labelled else None))
    return pairs


def _video(path: Path, config: DomainConfig) -> Dataset:
    stamp = path.stat()
    features = Features({config.image_column: Image(), "file_name": Value("string")})
    arguments = {"path": str(path), "step": config.frame_step, "column": config.image_column}
    return _generated(_frames, features, arguments | {"stamp": (stamp.st_size, stamp.st_mtime_ns)})


def _frames(path: str, step: int, column: str, stamp: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Every `step`-th frame, losslessly compressed."""
    video = cv2.VideoCapture(path)
    try:
        number = 0
        while video.grab():
            if number % step == 0:
                good, pixels = video.retrieve()
                if not good:
                    break
                file = io.BytesIO()
                PILImage.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).save(file, format="PNG", compress_level=1)
                yield {column: {"bytes": file.getvalue(), "path": None}, "file_name": f"frame_{number:07d}.png"}
            number += 1
        if not number:
            raise ValueError(f"{path} is not a video that can be read. Convert it, for instance to MP4 with H.264.")
    finally:
        video.release()


def _loaded(config: DomainConfig) -> Dataset:
    """Through `datasets`: a parquet file, a folder it understands, or a data set of the Hub."""
    path = Path(config.path)
    try:
        if path.is_file() and path.suffix.lower() == ".parquet":
            return load_dataset("parquet", data_files={config.split: str(path)}, split=config.split)
        shards = sorted(path.glob(f"{config.split}-*.parquet")) if path.is_dir() else []
        if shards and not config.streaming:  # the other splits are left alone: they may have other columns
            return load_dataset("parquet", data_files={config.split: list(map(str, shards))}, split=config.split)
        if path.is_dir() or (config.path.count("/") == 1 and not path.is_absolute() and not path.exists()):
            if config.streaming:
                return _first_rows(config)
            return load_dataset(config.path, split=config.split)
    except DatasetGenerationError as error:  # its own text only says that there was an error
        raise ValueError(
            f"cannot load the data set {config.path!r}, split {config.split!r}: {error.__cause__ or error}"
        ) from error
    except (OSError, ValueError) as error:  # missing on the Hub or offline, no such split, no readable file
        raise ValueError(f"cannot load the data set {config.path!r}, split {config.split!r}: {error}") from error
    if path.is_file():
        raise ValueError(
            f"{config.path} is none of the files a domain can be: .parquet, a list ({', '.join(LIST_SUFFIXES)}) or a "
            f"video ({', '.join(VIDEO_SUFFIXES)}). Give the folder for a set of images."
        )
    near = difflib.get_close_matches(config.path, DRAWN, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Domains by name: {', '.join(DRAWN)}."
    raise ValueError(f"there is no domain {config.path!r}: no such file, folder or name. {hint}")


def open_stream(config: DomainConfig) -> IterableDataset:
    """The rows of a parquet file or folder or of a data set of the Hub, undecoded, as they come.

    Raises:
        ValueError: for another kind of domain; those are read by index from the disk anyway.
    """
    path = Path(config.path)
    if config.layout or config.label_path or config.path in DRAWN or (path.is_dir() and _holds_images_only(path)):
        given = None
    elif path.is_file():
        given = ("parquet", {"data_files": {config.split: str(path)}}) if path.suffix.lower() == ".parquet" else None
    else:
        given = (config.path, {})
    if given is None:
        raise ValueError(
            f"streaming reads parquet files and data sets of the Hub; {config.path!r} needs none. Leave it out."
        )
    stream: IterableDataset = load_dataset(given[0], split=config.split, streaming=True, **given[1])
    columns = [name for name in (config.image_column, config.label_column) if name in (stream.column_names or [])]
    for column in columns:
        stream = stream.cast_column(column, Image(decode=False))
    return stream


def _first_rows(config: DomainConfig) -> Dataset:
    """The first rows of a stream, kept locally: training reads images by index, in an order of its own."""
    stream = open_stream(config)
    columns = [name for name in (config.image_column, config.label_column) if name in (stream.column_names or [])]
    features = Features(dict.fromkeys(columns, Image()))
    rows = [{column: row[column] for column in columns} for row in stream.take(config.num_images or 0)]
    return Dataset.from_list(rows, features=features)
