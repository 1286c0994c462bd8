"""Parquet files that are read while a run trains: whole row groups in passing, or one image by the bytes it takes.

Nothing here grows with the number of files but their listing and the table of class counts: a file is opened when
something in it is drawn. `datasets` keeps images in parquet as they are, neither compressed nor encoded, so that one of
them is a range of bytes.
"""

import json
import mmap
import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from fsspec.core import url_to_fs

from ..files import RANGE, Cell, read_header
from ..listing import refuse_pointer
from .contents import digest

COUNTS = "class_counts"  # column of prepared domains: pixels per id at the size of the original file
DIGEST, SIZE = "digest", "size"  # columns of what `read_counts` gives: of image and label map, and of the image
_SHARDS = b"shards"  # in the schema of the class counts: names and sizes of the files that they are of
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("file_name", pa.string()),
        (COUNTS, pa.list_(pa.int64())),
        (SIZE, pa.list_(pa.int64(), 2)),
    ]
    + [(f"{name}_{end}", pa.int64()) for name in ("image", "label") for end in ("start", "stop")]
    + [(DIGEST, pa.string())]
)


@dataclass(frozen=True)
class Shards:
    """The parquet files of one split, in the order of their names.

    Attributes:
        root: the folder or the address that all of them lie under.
        names: relative to it.
    """

    root: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def url(self, name: str) -> str:
        """Path or address of a file under the root."""
        return posixpath.join(self.root, name)

    def sizes(self) -> list[int]:
        """Bytes of each file, from a listing of the folders that they lie in: none of them is opened.

        Raises:
            OSError: if a folder cannot be listed.
        """
        found: dict[str, int] = {}
        for folder in dict.fromkeys(posixpath.dirname(name) for name in self.names):
            where = self.url(folder).rstrip("/")
            if "://" in where:
                system, path = url_to_fs(where)
                listed = [(posixpath.basename(entry["name"]), entry["size"]) for entry in system.ls(path, detail=True)]
            else:
                with os.scandir(where) as entries:
                    listed = [(entry.name, entry.stat().st_size) for entry in entries if entry.is_file()]
            found |= {posixpath.join(folder, name): size for name, size in listed}
        return [found.get(name, 0) for name in self.names]

    def contents(self) -> str:
        """A number for the names and sizes of the files: by it a run that goes on knows that none was added or cut."""
        return digest(json.dumps([self.names, self.sizes()]).encode())

    @contextmanager
    def open(self, number: int) -> Iterator[pq.ParquetFile]:
        """One of the files.

        Raises:
            ValueError: if it is not there, is no parquet file, or is damaged where it is read.
        """
        url = self.url(self.names[number])
        try:
            with fsspec.open(url, "rb") as stream:
                refuse_pointer(stream.read(64), url)
                with pq.ParquetFile(stream) as opened:
                    yield opened
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{url} cannot be read as parquet: {error}. Copy or export it again.") from error

    def first_rows(self, columns: Sequence[str], count: int) -> tuple[list[dict[str, Any]], pa.Schema]:
        """So many rows from the beginning, of those columns that there are; and the schema of the last file read."""
        rows: list[dict[str, Any]] = []
        for number in range(min(len(self), count)):
            with self.open(number) as opened:
                schema = opened.schema_arrow
                kept = [name for name in columns if name in schema.names]
                batches = opened.iter_batches(count, columns=kept)
                rows += [row for batch in islice(batches, 1) for row in batch.to_pylist()][: count - len(rows)]
            if len(rows) == count:
                break
        return rows, schema


def counts_file(split: str) -> str:
    """Name of the file beside the shards of a split that says what each image shows, and where it lies."""
    return f"{COUNTS}-{split}.parquet"


def write_counts(folder: Path, split: str, parts: Sequence[pa.Table], names: Sequence[str]) -> None:
    """Write the class counts of a split.

    Args:
        parts: `counts_of_shard` of each file.
        names: of these files, in the folder.
    """
    shards = json.dumps([names, Shards(str(folder), tuple(names)).sizes()])
    unfinished = folder / f".{counts_file(split)}.{os.getpid()}.unfinished"
    try:
        pq.write_table(pa.concat_tables(parts).replace_schema_metadata({_SHARDS: shards.encode()}), unfinished)
        unfinished.replace(folder / counts_file(split))
    finally:
        unfinished.unlink(missing_ok=True)


def counts_of_shard(path: Path, max_pixels: int) -> pa.Table:
    """Of each row of a prepared file its name, class counts and size, and which bytes image and label map are.

    Raises:
        ValueError: if the file does not keep its images as they are.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        pq.ParquetFile(file) as opened,
    ):
        for group in range(opened.num_row_groups):
            rows = opened.read_row_group(group).to_pylist()
            for name in ("image", "label"):
                places = _places(mapped, _begin(opened.metadata.row_group(group), name), [row[name] for row in rows])
                if places is None:
                    raise ValueError(
                        f"{path} does not keep images as they are: it was written by an older `datasets`. Remove the "
                        "folder and prepare it again."
                    )
                columns[f"{name}_start"] += [start for start, _ in places]
                columns[f"{name}_stop"] += [stop for _, stop in places]
            for row in rows:
                where = f"{row['file_name']} of {path}"
                columns["shard"].append(path.name)
                columns["file_name"].append(row["file_name"])
                columns[COUNTS].append(row[COUNTS])
                columns[SIZE].append(list(read_header(row["image"], where, max_pixels)[0]))
                columns[DIGEST].append(digest(row["image"]["bytes"], row["label"]["bytes"]))
    return pa.table(columns, _SCHEMA)


def _begin(group: pq.RowGroupMetaData, name: str) -> int:
    """Where the bytes of a column of images begin in a file."""
    leaves = [group.column(place) for place in range(group.num_columns)]
    return int(next(leaf.data_page_offset for leaf in leaves if leaf.path_in_schema == f"{name}.bytes"))


def _places(mapped: mmap.mmap, begin: int, cells: Sequence[Cell]) -> list[tuple[int, int]] | None:
    """First byte, and the one behind the last, of values that follow each other, each behind its length in 4 bytes.

    None if a value is not there as it is.
    """
    places = []
    for value in (cell["bytes"] for cell in cells):
        start = mapped.find(len(value).to_bytes(4, "little") + value, begin) + 4
        if start < 4:
            return None
        begin = start + len(value)
        places.append((start, begin))
    return places


def read_counts(shards: Shards, file: Path, image_column: str, label_column: str) -> Dataset:
    """The rows of shards by their class counts: images and label maps are ranges of bytes in files that stay closed.

    Args:
        shards: that lie there now.
        file: what `write_counts` wrote of them.

    Returns:
        Cells whose path is `RANGE`, "file_name", `COUNTS`, `SIZE` and `DIGEST`.

    Raises:
        ValueError: if the file is damaged, or is of other shards.
    """
    try:
        table = pq.read_table(file, memory_map=True)
        names, sizes = json.loads(table.schema.metadata[_SHARDS])
        table = table.select(_SCHEMA.names).cast(_SCHEMA.with_metadata(table.schema.metadata))
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no class counts: {error}. Write it anew with `t2sda prepare`.") from error
    there = dict(zip(shards.names, shards.sizes(), strict=True))
    told = dict(zip(names, sizes, strict=True))
    if there != told:
        differ = sorted(name for name in there.keys() | told.keys() if there.get(name) != told.get(name))
        raise ValueError(
            f"{file} is not of the files in {shards.root}: {len(differ)} of {len(there)} differ, first {differ[0]} "
            f"({told.get(differ[0], 'no')} bytes there, {there.get(differ[0], 'no')} here). Write it anew with "
            "`t2sda prepare`."
        )
    places = pc.index_in(table["shard"], pa.array(names))
    if places.null_count:
        raise ValueError(f"{file} names a file that is none of its own. Write it anew with `t2sda prepare`.")
    urls = pa.array([shards.url(name) for name in names]).take(places.combine_chunks())
    cells = {}
    for name, column in (("image", image_column), ("label", label_column)):
        start, stop = (table[f"{name}_{end}"].combine_chunks().cast(pa.string()) for end in ("start", "stop"))
        paths = pc.binary_join_element_wise(urls, RANGE, start, "-", stop, "")
        cells[column] = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    kept = {name: table[name] for name in ("file_name", COUNTS, SIZE, DIGEST)}
    number = digest(table.schema.metadata[_SHARDS], "".join(kept[DIGEST].to_pylist()).encode())  # or all is hashed
    return Dataset(pa.table(cells | kept), fingerprint=number[:32])
