"""Where the rows of a domain come from: drawn, files, parquet, the Hub or a video in; one `datasets` table out."""

import codecs
import csv
import difflib
import errno
import glob
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import constants, hf_hub_download, metadata_load
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image as PILImage

from ..config import DomainConfig
from ..errors import RunFailed, causes
from ..files import HUB, RANGE, ZIP, Cell, VideoFrames, read_image
from ..listing import IMAGE_SUFFIXES, LABEL_SUFFIXES, VIDEO_SUFFIXES, Listing, account, list_files, refuse_pointers
from .contents import digest, set_aside
from .layouts import find_files
from .shards import Shards, counts_file, read_counts
from .streets import streets

logger = logging.getLogger(__name__)

# Domains that need no path: name -> a function of the domain's config.
DRAWN: dict[str, Callable[[DomainConfig], Dataset]] = {
    "streets-source": lambda config: streets("source", config.split, config.num_images),
    "streets-target": lambda config: streets("target", config.split, config.num_images),
    "streets-simulator": lambda config: streets("simulator", config.split, config.num_images),
    "streets-night": lambda config: streets("night", config.split, config.num_images),
}
LIST_SUFFIXES = (".txt", ".csv", ".tsv")
LOOKED_AT = 16  # rows of a stream that are checked before training

Pair = tuple[Path, Path | None]
Ignored = dict[str, list[Path]]  # reason -> files of a folder that are not used


def load_rows(config: DomainConfig, labelled: bool, shards: Shards | None = None) -> tuple[Dataset, str, Ignored]:
    """The table of a domain, the label space of its label files, and the files that are not used.

    Args:
        shards: of a domain that is streamed: with labels the table has all their rows, otherwise the first ones.

    Returns:
        Rows with the columns config.image_column and, if there are labels, config.label_column, and perhaps
        "file_name"; the name of the label space, config.label_space unless a layout knows better; for a folder of
        images what is left out of it, see `listing`. Cells hold bytes, or the absolute path of a file of the data set.

    Raises:
        ValueError: if there is no such data set, it does not fit together, or a cell points out of it.
        RunFailed: if the cache of `datasets` cannot be written.
    """
    if not config.path:
        raise ValueError("a domain has no path. Set source.path, target.path and test.path.")
    with cache_explained():
        if shards is not None:
            return (_counted(shards, config) if labelled else _first_of(shards, config)), config.label_space, {}
        return _rows(config, labelled)


def _rows(config: DomainConfig, labelled: bool) -> tuple[Dataset, str, Ignored]:
    path = Path(config.path)
    if config.layout:
        pairs, space = find_files(config.layout, config.path, config.split, labelled)
        return _table(pairs, path, config), space, {}
    if config.path in DRAWN:
        return DRAWN[config.path](config), config.label_space or "cityscapes", {}
    if path.is_file():
        refuse_pointers(path)
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return _video(path, config), config.label_space, {}
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        return _table(_listed(path, labelled), path.parent, config), config.label_space, {}
    found = list_files(path, IMAGE_SUFFIXES) if path.is_dir() else Listing([], {})
    if path.is_dir() and (config.label_path or _holds_images_only(found)):
        pairs, ignored = _matched(path, found, config, labelled)
        return _table(pairs, path, config), config.label_space, ignored
    rows = _loaded(config)
    if config.streaming or not found.files:
        return rows, config.label_space, {}
    if len(rows.info.splits or ()) > 1:  # other images are those of other splits
        return rows, config.label_space, {}
    used = _files_of(rows)
    unlisted = [file for file in found.files if os.path.realpath(file) not in used]
    return rows, config.label_space, {f"in no row of the split {config.split}": unlisted} if unlisted else {}


def _files_of(rows: Dataset) -> set[str]:
    """The files that cells of a table point to, without links."""
    columns = (rows.with_format("arrow")[name] for name, kind in rows.features.items() if isinstance(kind, Image))
    paths = (pc.struct_field(chunk, "path").to_pylist() for column in columns for chunk in column.chunks)
    return {os.path.realpath(path) for of_chunk in paths for path in of_chunk if path}


@contextmanager
def cache_explained() -> Iterator[None]:
    """Say which folder it is if `datasets` cannot write its cache.

    Raises:
        RunFailed: naming the folder and how to choose another one.
    """
    try:
        yield
    except (OSError, ValueError, DatasetGenerationError) as error:
        cache = str(datasets.config.HF_DATASETS_CACHE)
        for cause in causes(error):
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            own = isinstance(cause, OSError) and str(cause.filename).startswith((cache, str(constants.HF_HOME)))
            if full or (own and isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM)):
                raise RunFailed(
                    f"`datasets` cannot write its cache {cache}: {cause}. Make room there, or name a folder on another "
                    "disk in the environment variable HF_HOME, or HF_DATASETS_CACHE for this cache alone."
                ) from error
        raise


def _table(pairs: list[Pair], root: Path, config: DomainConfig) -> Dataset:
    """Rows of paths, in memory."""
    if not pairs:
        return Dataset.from_dict({config.image_column: []}, features=Features({config.image_column: Image()}))
    features = Features({config.image_column: Image(), "file_name": Value("string")})
    if pairs[0][1] is not None:
        features[config.label_column] = Image()
    rows = []
    for image, label in pairs:
        row = {config.image_column: _cell(image), "file_name": Path(os.path.relpath(image, root)).as_posix()}
        rows.append(row if label is None else row | {config.label_column: _cell(label)})
    return Dataset.from_list(rows, features=features)


def _generated(function: Callable[..., Iterator[dict[str, Any]]], features: Features, arguments: dict) -> Dataset:
    """Rows that a function makes once; `datasets` keeps them in its cache."""
    number = digest(repr(sorted(arguments.items())).encode())[:32]
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        return _whole(
            lambda: Dataset.from_generator(function, features=features, gen_kwargs=arguments, fingerprint=number),
            lambda: [*(cache / "generator").glob(f"default-fingerprint={number}*/*")],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from error
        raise


def _data_set(config: DomainConfig, path: str, how: dict[str, Any]) -> Dataset:
    """`load_dataset`, which keeps rows in its cache."""

    def folders() -> list[Path]:
        with TemporaryDirectory() as empty:  # a damaged entry would end the look at the usual place
            made_in = Path(load_dataset_builder(path, cache_dir=empty, **how).cache_dir).resolve()
            return [Path(datasets.config.HF_DATASETS_CACHE) / made_in.relative_to(Path(empty).resolve())]

    return _whole(lambda: load_dataset(path, split=config.split, **how), folders)


def _whole(load: Callable[[], Dataset], folders: Callable[[], list[Path]]) -> Dataset:
    """What `load` gives, and if the cache of `datasets` is damaged there, what it gives without that.

    Args:
        load: reads from the cache, or makes an entry in it.
        folders: where the entry lies; asked only if there is something wrong.
    """
    try:
        rows = load()
        expected = (rows.info.splits or {}).get(str(rows.split))
        if expected is None or expected.num_examples == len(rows):
            return rows
    except DatasetsError:  # there is no such data set, or it cannot be read itself
        raise
    except (OSError, ValueError):
        damaged = [folder for folder in folders() if _is_damaged(folder)]
        if not damaged:
            raise
    else:  # cut between two batches
        damaged = folders()
    for folder in damaged:
        set_aside(folder, "the rows that `datasets` has cached")
    return load()


def _is_damaged(folder: Path) -> bool:
    """Whether an entry of the cache of `datasets` holds a file that is not as it was written."""
    rows = list(folder.glob("*.arrow"))
    try:
        for file in folder.glob("dataset_info.json"):
            json.loads(file.read_bytes())
        for file in rows:
            with pa.memory_map(str(file)) as mapped:
                pa.ipc.open_stream(mapped).read_all()
    except (OSError, ValueError):
        return True
    return folder.is_dir() and not rows


def _cell(path: Path) -> dict[str, Any]:
    return {"bytes": None, "path": str(path)}


def _holds_images_only(found: Listing) -> bool:
    """No parquet or metadata file, which `datasets` would read, and no folder that it saved."""
    known = ("metadata.jsonl", "metadata.csv", "state.json", "dataset_dict.json")
    others = [file for files in found.ignored.values() for file in files]
    return bool(found.files) and not any(
        file.suffix == ".parquet" or file.name in known for file in others if not file.name.startswith(".")
    )


def _matched(root: Path, found: Listing, config: DomainConfig, labelled: bool) -> tuple[list[Pair], Ignored]:
    """Images and label maps of the same relative name, without the suffixes and extensions; what is not used."""
    folder = Path(config.label_path) if config.label_path else None
    if folder is not None and not folder.is_dir():
        if labelled:
            raise ValueError(f"label_path {config.label_path!r} is not a folder. Give the folder of the label maps.")
        folder = None
    flat = folder is not None and folder.samefile(root)
    if flat and not config.image_suffix and not config.label_suffix:
        raise ValueError(
            f"images and label maps lie in the same folder {root}. Say how the names of the label maps end, before the "
            "extension, in label_suffix, for example _mask."
        )
    beside = Listing([], {}) if folder is None else list_files(folder, LABEL_SUFFIXES)
    if folder is None or flat:
        photos = [
            file for file in found.files if not config.label_suffix or not file.stem.endswith(config.label_suffix)
        ]
    else:  # the label maps may lie in a folder among the images, or the images among the label maps
        theirs = set(map(_place, beside.files))
        photos = [file for file in found.files if _place(file) not in theirs] or found.files
    others: Ignored = {}
    images = _by_name(photos, root, config.image_suffix, "images", others)
    if folder is None and not config.label_suffix:
        _refuse_label_maps(images, root)
    if not labelled:
        others["label maps"] = sorted(set(found.files) - set(photos))
        return [(file, None) for file in images.values()], _not_used(images.values(), found.ignored, others)
    if folder is None:
        raise ValueError(
            f"{root} is a folder of images and its labels are needed. Set label_path to the folder of the label maps."
        )
    taken = set(map(_place, images.values()))
    maps = [file for file in beside.files if _place(file) not in taken]
    labels = _by_name(maps, folder, config.label_suffix, "label maps", others)
    without = [file for key, file in images.items() if key not in labels]
    if without:
        example = next(iter(labels.values()), None)
        raise ValueError(
            f"{len(without)} of {len(images)} images in {root} have no label map in {folder}, first {without[0].name}; "
            f"a label map there is {example.name if example else 'nowhere'}. Names must be equal up to the extension; "
            "say what else differs in image_suffix and label_suffix."
        )
    others["label maps without an image"] = [file for key, file in labels.items() if key not in images]
    pairs = [(file, labels[key]) for key, file in images.items()]
    used = [file for pair in pairs for file in pair]
    return list(pairs), _not_used(used, found.ignored, beside.ignored, others)


def _not_used(used: Iterable[Path], *listed: Mapping[str, Iterable[Path]]) -> Ignored:
    """All that is listed, every file once, without those that are used after all."""
    ignored, seen = Ignored(), set(map(_place, used))
    for reason, file in ((reason, file) for one in listed for reason, files in one.items() for file in files):
        if _place(file) not in seen:
            seen.add(_place(file))
            ignored.setdefault(reason, []).append(file)
    return ignored


def _place(file: Path) -> str:
    return os.path.abspath(file)


def _by_name(files: Iterable[Path], root: Path, suffix: str, what: str, ignored: Ignored) -> dict[str, Path]:
    """Relative name without extension and suffix -> file. Composed and decomposed letters are the same.

    Files that do not end in the suffix are added to `ignored`.

    Raises:
        ValueError: for two files of the same name.
    """
    named: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix()
        if not name.endswith(suffix):
            ignored.setdefault(_other_ending(suffix), []).append(file)
            continue
        key = unicodedata.normalize("NFC", name.removesuffix(suffix))
        if key and named.setdefault(key, file) != file:
            raise ValueError(
                f"{named[key]} and {file} are {what} of the same name. Images and label maps belong together by their "
                "names, so remove or rename one."
            )
    return named


def _other_ending(suffix: str) -> str:
    return f"without {suffix!r} at the end of the name"


def _refuse_label_maps(images: Mapping[str, Path], root: Path) -> None:
    """ValueError if label maps lie among the images: x_mask.png beside x.png, or masks/x.png beside images/x.png.

    One in three files must be such a map, by its name or, beside an image whose whole name it begins with, by its few
    colours.
    """
    same: dict[tuple[object, ...], list[tuple[str, str]]] = {}  # what two names share -> (the rest, the name)
    for key in images:
        for found in re.finditer(r"[-_. ]", key):
            same.setdefault(("ending", key[: found.start()]), []).append((key[found.start() :], key))
        same.setdefault(("ending", key), []).insert(0, ("", key))
        parts = PurePosixPath(key).parts
        for index in range(len(parts) - 1):
            same.setdefault(("folder", index, *parts[:index], "", *parts[index + 1 :]), []).append((parts[index], key))
    pairs: dict[tuple[object, str], list[tuple[Path, Path, bool]]] = {}  # -> photo, map, whether the rest is all
    for shared, keys in same.items():
        for rest, key in keys if len(keys) > 1 else ():
            other_rest, other = next(pair for pair in keys if pair[1] != key)
            if rest:
                bare = not other_rest or shared[0] == "folder"
                pairs.setdefault((shared[0], rest), []).append((images[other], images[key], bare))
    for (kind, rest), found_pairs in pairs.items():
        photo, map_, bare = found_pairs[0]
        if 3 * len(found_pairs) < len(images) or not (_MASK.search(rest) or (bare and _few_colors(map_, photo))):
            continue
        advice = f"label_suffix: {rest}" if kind == "ending" else "path: the folder of the images alone"
        raise ValueError(
            f"{len(found_pairs)} of {len(images)} files in {root} look like label maps, first {map_.relative_to(root)} "
            f"of {photo.relative_to(root)}: they would be used as photos. Set {advice}."
        )


_MASK = re.compile(
    r"(?<![^-_. ])((mask|label|annotation|seg|segmentation)s?|gt\w*|labelids|trainids|labeltrainids)$",
    re.IGNORECASE,
)


def _few_colors(file: Path, other: Path) -> bool:
    """Whether a picture has at most 64 colours, and the other at least four times as many."""
    numbers = []
    for one in (file, other):
        try:
            pixels = read_image(_cell(one), str(one), 2**25)
        except ValueError:
            return False  # the check of the domain will say what is wrong with it
        numbers.append(len(np.unique(pixels.reshape(-1, 3).astype(np.uint32) @ np.array([65536, 256, 1], np.uint32))))
    return numbers[0] <= 64 and numbers[1] >= 4 * numbers[0]


def _listed(path: Path, labelled: bool) -> list[Pair]:
    """Lines "image label" or, for an unlabelled domain, "image": comma in .csv, or semicolon if its first line has one
    and no comma; tab in .tsv, tab or blanks in .txt."""
    text = _text_of(path)
    if path.suffix.lower() == ".txt":
        lines = enumerate(text.splitlines(), 1)
        numbered = [(number, line.split("\t") if "\t" in line else line.split()) for number, line in lines]
    else:
        first = text.partition("\n")[0]
        comma = ";" if ";" in first and "," not in first else ","  # spreadsheets write it where a comma is in numbers
        delimiter = comma if path.suffix.lower() == ".csv" else "\t"
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
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
        files = [_as_spelled(path.parent, name) for name in names]
        for name, file in zip(names, files, strict=True):
            if not Path(os.path.realpath(file)).is_relative_to(root):  # which a circle of links does not stop
                linked = Path(_place(file)).is_relative_to(_place(path.parent))
                what = "is a link out of" if linked else "lies outside"
                raise ValueError(
                    f"{path}, line {number}: {name!r} {what} the list's folder. Names are relative to the list; "
                    "put it into the folder that holds everything."
                )
            if not file.is_file():
                raise ValueError(f"{path}, line {number}: there is no file {name!r} beside the list.")
        pairs.append((files[0], files[1] if labelled else None))
    return pairs


def _text_of(path: Path) -> str:
    """The text of a list, in UTF-8 or, as spreadsheets save it, in UTF-16 with its mark at the start."""
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}. Save it with this encoding.") from error


def _as_spelled(root: Path, name: str) -> Path:
    """The file of a name, whose letters may be composed on the disk and decomposed in the list, or the reverse."""
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return next((root / form for form in forms if (root / form).is_file()), root / name)


def _video(path: Path, config: DomainConfig) -> Dataset:
    stamp = path.stat()
    features = Features({config.image_column: Image(), "file_name": Value("string")})
    arguments = {"path": str(path), "step": config.frame_step, "column": config.image_column}
    rows = _generated(_frames, features, arguments | {"stamp": (stamp.st_size, stamp.st_mtime_ns)})
    told = VideoFrames(str(path)).cut(len(rows) * config.frame_step)  # each time: the rows may come from the cache
    if told:
        logger.warning("%s", told)
    return rows


def _frames(path: str, step: int, column: str, stamp: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Every `step`-th frame, losslessly compressed."""
    for number, pixels in enumerate(VideoFrames(path)):
        if number % step == 0:
            file = io.BytesIO()
            PILImage.fromarray(pixels).save(file, format="PNG", compress_level=1)
            yield {column: {"bytes": file.getvalue(), "path": None}, "file_name": f"frame_{number:07d}.png"}


def _loaded(config: DomainConfig) -> Dataset:
    """Through `datasets`: a parquet file, a folder it understands, or a data set of the Hub."""
    path = Path(config.path)
    if saved := _saved(path, config.split):
        return _at_home(saved, config)
    name, how = _given(config)
    how = how or _configuration(config)
    try:
        if config.streaming and not path.is_file():
            return _first_rows(config)
        rows = _data_set(config, name, how)
    except DatasetGenerationError as error:  # its own text only says that there was an error
        raise ValueError(
            f"cannot load the data set {config.path!r}, split {config.split!r}: {error.__cause__ or error}"
        ) from error
    except (OSError, ValueError) as error:  # missing on the Hub or offline, no such split, no readable file
        hint = "" if path.exists() else " There is no file or folder of this name here either."
        if path.is_dir() and (told := account(0, list_files(path, IMAGE_SUFFIXES).ignored)):
            hint = f" Of other files than images it has {told.partition('ignored: ')[2]}."
        raise ValueError(f"cannot load the data set {config.path!r}, split {config.split!r}: {error}{hint}") from error
    return _at_home(rows, config)


def _given(config: DomainConfig) -> tuple[str, dict[str, Any]]:
    """What `load_dataset` is told: its first argument, and further ones.

    Raises:
        ValueError: if there is nothing that it could read.
    """
    path = Path(config.path)
    files = [path] if path.is_file() and path.suffix.lower() == ".parquet" else []
    if path.is_dir():
        # The other splits are left alone: they may have other columns, or not be there.
        files = sorted(file for file in path.glob(f"{config.split}-*.parquet") if not file.name.startswith("."))
        others = () if files else list_files(path, ()).ignored.values()
        for file in files or [file for kind in others for file in kind if file.is_file()]:
            refuse_pointers(file)
    if files:
        return "parquet", {"data_files": {config.split: [glob.escape(str(file)) for file in files]}}
    if path.is_dir():
        if glob.has_magic(config.path):
            raise ValueError(
                f"{config.path!r} has one of the characters * ? [ ] in its name, which `datasets` reads as a pattern. "
                "Rename the folder."
            )
        return config.path, {}
    if path.is_file():
        raise ValueError(
            f"{config.path} is none of the files a domain can be: .parquet, a list ({', '.join(LIST_SUFFIXES)}) or a "
            f"video ({', '.join(VIDEO_SUFFIXES)}). Give the folder for a set of images."
        )
    near = _near(config.path)
    if not near and _may_be_on_the_hub(config.path):
        return config.path, {}
    near = near or next(iter(difflib.get_close_matches(config.path, DRAWN, 1)), "")
    hint = f"Did you mean {near!r}?" if near else f"Domains by name: {', '.join(DRAWN)}."
    raise ValueError(f"there is no domain {config.path!r}: no such file, folder or name. {hint}")


def _configuration(config: DomainConfig) -> dict[str, str]:
    """Which configuration of a data set `load_dataset` is told to read, by its card: {"name": that of the split}, as
    `t2sda prepare` writes them, or {} where `datasets` knows.

    Raises:
        ValueError: if the card sends its reader elsewhere: `datasets` would ask any address it names.
    """
    names: list[str] = []
    for name in ("README.md", ".huggingface.yaml"):
        card = Path(config.path) / name
        if not Path(config.path).exists():
            try:
                card = Path(hf_hub_download(config.path, name, repo_type="dataset"))
            except (OSError, ValueError):  # there is none, or the Hub is out of reach, which `datasets` says better
                continue
        if not card.is_file():
            continue
        try:
            text = card.read_text(encoding="utf-8")
            described = metadata_load(card) if name == "README.md" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{card} cannot be read, and says where the files of a data set lie: {error}") from error
        listed = described.get("configs") if isinstance(described, dict) else None
        found = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        names += ["default" if one.get("default") else one.get("config_name", "default") for one in found]
        for place in _texts(listed):
            if ("://" in place and not place.startswith(HUB)) or place.startswith("/") or ".." in Path(place).parts:
                raise ValueError(
                    f"{card} says that files of the data set lie at {place!r}, which is no part of it: nothing is "
                    "opened."
                )
    return {"name": config.split} if len(names) > 1 and "default" not in names and config.split in names else {}


def _texts(tree: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(part)


def _may_be_on_the_hub(path: str) -> bool:
    """OWNER/NAME"""
    known = (*LIST_SUFFIXES, *VIDEO_SUFFIXES, *IMAGE_SUFFIXES, ".parquet")
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.lower().endswith((*known, "/"))


def _near(path: str) -> str:
    """A path that exists and differs in one name that looks alike; "" if there is none."""
    missing = Path(path)
    while not missing.parent.is_dir():
        missing = missing.parent
    for name in difflib.get_close_matches(missing.name, os.listdir(missing.parent), 3, 0.6):
        if (other := missing.parent / name / Path(path).relative_to(missing)).exists():
            return str(other)
    return ""


def _saved(path: Path, split: str) -> Dataset | None:
    """The table that `save_to_disk` of `datasets` left in a folder; None if it did not."""
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return None
    for file in path.rglob("*.arrow"):
        refuse_pointers(file)
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the saved data set {str(path)!r}: {error}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{str(path)!r} has no split {split!r}: it has {', '.join(map(str, saved))}.")
        return saved[split]
    return saved


def at_home(cell: Cell | None, where: str, config: DomainConfig) -> Cell | None:
    """A cell of a data set that somebody else may have made: with bytes, or the absolute path of one of its files.

    What a cell says is not trusted. A path must lead to a place inside the folder of the data set, after all links;
    `datasets` itself gives paths in the cache for what it downloaded, hf:// for what it streams, and
    zip://NAME::ARCHIVE for a file of an archive, which must be one of the data set's files itself.

    Raises:
        ValueError: for any other path, before anything is opened.
    """
    path = None if cell is None or cell["bytes"] is not None else cell["path"]
    if cell is None or path is None:
        return cell
    if path.startswith(ZIP) and path.count("::") == 1:
        name, _, archive = path.removeprefix(ZIP).partition("::")
        if ".." not in name and "::" not in archive and not archive.startswith(ZIP):
            held = at_home({"bytes": None, "path": archive}, where, config)
            return {"bytes": None, "path": f"{ZIP}{name}::{held['path']}"} if held is not None else None
    own = Path(config.path)
    if own.exists():
        folder = Path(os.path.abspath(own if own.is_dir() else own.parent))
        # A snapshot in the cache of the Hub links to files two folders above.
        roots = [folder.parents[1] if folder.parent.name == "snapshots" else folder]
    else:
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{config.path.replace('/', '--')}"
        roots = [folder, Path(datasets.config.DOWNLOADED_DATASETS_PATH)]
        own_address = path.startswith((f"{HUB}{config.path}/", f"{HUB}{config.path}@"))
        if own_address and not any(sign in path for sign in ("..", "::", RANGE)):
            return cell
    real = None
    if not any(sign in path for sign in ("://", "\0", RANGE)):
        real = Path(os.path.realpath(folder / path))
    if real is None or not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        inside = real is not None and Path(_place(folder / path)).is_relative_to(folder)
        linked = " but a link out of it" if inside else ""
        raise ValueError(
            f"{where} points to {path!r}, which is no file of this data set{linked}: it is not opened. A cell "
            "holds the bytes of a file, or a relative path inside the data set's folder."
        )
    return {"bytes": None, "path": str(folder / path)}


def _at_home(rows: Dataset, config: DomainConfig) -> Dataset:
    """The table after `at_home` of every cell; only those without bytes are looked at."""
    for column in (config.image_column, config.label_column):
        feature = rows.features.get(column)
        if not isinstance(feature, Image) and not (isinstance(feature, dict) and {"bytes", "path"} <= set(feature)):
            continue
        cells = rows.data.column(column)
        paths = pc.struct_field(cells, "path")
        bare = np.flatnonzero(pc.and_(pc.is_null(pc.struct_field(cells, "bytes")), pc.is_valid(paths)).to_numpy())
        moved = False
        for index in bare.tolist():
            path = paths[index].as_py()
            cell = at_home({"bytes": None, "path": path}, f"row {index} of {config.path}", config)
            moved |= cell is not None and cell["path"] != path
        if moved:
            rows = rows.cast_column(column, Image(decode=False))
            rows = rows.map(_moved, fn_kwargs={"column": column, "config": config}, features=rows.features)
    return rows


def _moved(row: dict[str, Any], column: str, config: DomainConfig) -> dict[str, Any]:
    cell = at_home(row[column], "a row", config)
    # With a path beside the bytes, `datasets` would drop the bytes wherever there is a file of this name.
    return {column: cell if cell is None or cell["bytes"] is None else {"bytes": cell["bytes"], "path": None}}


def _refuse_needless(config: DomainConfig) -> None:
    """ValueError for a domain that is read by index from the disk anyway."""
    path = Path(config.path)
    needless = config.layout or config.label_path or config.path in DRAWN
    needless = needless or (path.is_file() and path.suffix.lower() != ".parquet")
    if path.is_dir() and not needless and not _shards_in(path, config.split):
        needless = _holds_images_only(list_files(path, IMAGE_SUFFIXES))
        needless = needless or any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if needless:
        raise ValueError(
            f"streaming reads parquet files and data sets of the Hub; {config.path!r} needs none. Leave it out."
        )


def _shards_in(folder: Path, split: str) -> list[str]:
    """Names of the parquet files of a split that lie in a folder itself."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return sorted(name for name in names if name.startswith(f"{split}-") and name.endswith(".parquet"))


def open_stream(config: DomainConfig) -> IterableDataset:
    """The rows of a parquet file or folder or of a data set of the Hub, undecoded, as they come.

    Its cells are those of the data set: whoever reads one asks `at_home` first.

    Raises:
        ValueError: for another kind of domain.
    """
    _refuse_needless(config)
    name, how = _given(config)
    how = how or _configuration(config)
    stream: IterableDataset = load_dataset(name, split=config.split, streaming=True, **how)
    columns = [name for name in (config.image_column, config.label_column) if name in (stream.column_names or [])]
    for column in columns:
        stream = stream.cast_column(column, Image(decode=False))
    if columns:  # `datasets` would open what the cells of other columns point to
        kept = [*columns, *(name for name in ("file_name",) if name in (stream.column_names or []))]
        stream = stream.select_columns(kept)
    return stream


def open_shards(config: DomainConfig) -> Shards:
    """The parquet files of a parquet file or folder or of a data set of the Hub. None of them is opened.

    Raises:
        ValueError: for another kind of domain, or if a data set of the Hub is not there or has other files.
    """
    if not config.path:
        raise ValueError("a domain has no path. Set source.path, target.path and test.path.")
    _refuse_needless(config)
    path = Path(os.path.abspath(config.path))
    if path.is_file():
        return Shards(str(path.parent), (path.name,))
    if path.is_dir() and (names := _shards_in(path, config.split)):
        return Shards(str(path), tuple(names))
    name, _ = _given(config)
    how = _configuration(config)
    try:
        builder = load_dataset_builder(name, **how)
        files = (builder.config.data_files or {}).get(config.split)
    except (OSError, ValueError) as error:
        hint = "" if path.exists() else " There is no file or folder of this name here either."
        raise ValueError(f"cannot load the data set {config.path!r}, split {config.split!r}: {error}{hint}") from error
    if not files:
        raise ValueError(
            f"cannot load the data set {config.path!r}, split {config.split!r}: it has "
            f"{', '.join(builder.config.data_files or ()) or 'no split'}."
        )
    if not isinstance(builder, Parquet):
        raise ValueError(
            f"a stream reads parquet files, and {config.path!r} is of the kind {builder.name}: save it as "
            "parquet (`Dataset.to_parquet`), or set num_images to fetch the first so many."
        )
    root = str(path) if path.exists() else re.match(rf"{HUB}[^/]+/[^/]+", files[0])[0]  # type: ignore[index]
    names = sorted(os.path.relpath(file, root) for file in files)
    return Shards(root, tuple(name for name in names if name != counts_file(config.split)))


def _counted(shards: Shards, config: DomainConfig) -> Dataset:
    """All rows of shards, by the class counts that lie beside them."""
    name, file = counts_file(config.split), Path(shards.root)
    if shards.root.startswith(HUB):
        _, _, revision = shards.root.partition("@")
        try:
            file = Path(hf_hub_download(config.path, name, repo_type="dataset", revision=revision or None))
        except RemoteEntryNotFoundError:
            file = Path(name)
        except OSError as error:
            raise ValueError(f"cannot load {name} of the data set {config.path!r}: {error}") from error
    else:
        file = file / name
    if not file.is_file():
        raise ValueError(
            f"{config.path!r} is streamed with its labels, and {name}, which says what each image shows and where it "
            "lies, is not there: write it with `t2sda prepare`, or set num_images to fetch the first so many."
        )
    return read_counts(shards, file, config.image_column, config.label_column)


def _first_of(shards: Shards, config: DomainConfig) -> Dataset:
    """The first rows of shards, which are looked at before training."""
    rows, schema = shards.first_rows([config.image_column, "file_name"], LOOKED_AT)
    kept_as = schema.field(config.image_column).type if config.image_column in schema.names else None
    if kept_as is None or not (pa.types.is_struct(kept_as) or pa.types.is_binary(kept_as)):
        return Dataset(pa.Table.from_pylist(rows, schema))  # what is wrong is said where all columns are looked at
    return _kept(rows, [config.image_column], config)


def _first_rows(config: DomainConfig) -> Dataset:
    """The first rows of a stream, kept locally: training reads images by index, in an order of its own."""
    stream = open_stream(config)
    columns = [name for name in (config.image_column, config.label_column) if name in (stream.column_names or [])]
    return _kept(stream.take(config.num_images or 0), columns, config)


def _kept(stream: Iterable[Mapping[str, Any]], columns: list[str], config: DomainConfig) -> Dataset:
    features = Features(dict.fromkeys(columns, Image()) | {"file_name": Value("string")})
    rows = []
    for index, row in enumerate(stream):
        given = {column: as_cell(row.get(column)) for column in columns}
        cells = {column: at_home(given[column], f"row {index} of {config.path}", config) for column in columns}
        name = row.get("file_name") or ((given[columns[0]] or {}).get("path") if columns else None)
        # With a path beside the bytes, `datasets` would drop the bytes wherever there is a file of this name.
        cells = {
            key: {**cell, "path": None} if cell and cell["bytes"] is not None else cell for key, cell in cells.items()
        }
        rows.append({**cells, "file_name": name})
    return Dataset.from_list(rows, features=features)


def as_cell(value: Any) -> Cell | None:
    """A value of a column of images in parquet: a cell, or the bytes of a file alone."""
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value
