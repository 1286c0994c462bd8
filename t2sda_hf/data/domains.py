"""Domains: `datasets` in, images and class ids of the run out.

A domain is a table of rows with an image and perhaps a label map. Where the table comes from is settled in `sources`,
what is in a file in `files`; what the ids mean is settled here, once, by class name.
"""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, Value
from PIL import ImageColor

from ..config import DomainConfig, DomainConfigs, shares_of
from ..files import TRANSPARENT, Color, LabelRule, file_bytes, read_header, read_image, read_labels
from ..labels import CITYSCAPES_CLASSES, IGNORE_INDEX, LABEL_SPACES, SPACE_COLORS, id_map
from ..listing import account
from .contents import Contents, digest, remembered, settings_of, stamp
from .shards import COUNTS, DIGEST, SIZE, Shards, counts_file
from .sources import LOOKED_AT, as_cell, at_home, load_rows, open_shards
from .transforms import InputSize, KeepRatio, Size, resize_image, resize_labels, resized_size

logger = logging.getLogger(__name__)

_ORDER_STREAM = 4  # tells the random numbers of the order of a stream from others
_TRIES = 1000  # row groups that are looked at for one that is taken
NOT_NAMED = (
    "Pixels of 255 are ignored: if 255 stands for a class, name it in label_ids, for example {0: back, 255: object}."
)

RowGroup = tuple[pa.Table, list[int]]  # its rows, and which of them are drawn one after the other


@dataclass(frozen=True)
class Domain:
    """Rows of one domain, read by index.

    Attributes:
        name: for messages and tables.
        table: column "image" and, if labelled, "label", both undecoded ({"bytes", "path"}); perhaps "file_name" and
            `COUNTS`.
        rule: what label files mean; None without labels.
        valid: (h,w) bool, the static validity mask at its own size; None if all is valid.
        config: crop, resize rule and limits of the domain.
        ignored: reason -> files of a folder that are no part of the domain.
    """

    name: str
    table: Dataset
    rule: LabelRule | None
    valid: np.ndarray | None
    config: DomainConfig
    ignored: Mapping[str, Sequence[Path]] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def parts(self) -> tuple["Domain", ...]:
        """The domains that it is made of: itself alone, see `JointDomain`."""
        return (self,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the draws, of each of `parts`."""
        return (1.0,)

    @property
    def labelled(self) -> bool:
        return self.rule is not None

    def at(self, index: int) -> tuple["Domain", int]:
        """The domain that an image is of, and which one it is there."""
        return self, index

    def draw(self, rng: np.random.Generator) -> int:
        """The index of an image, drawn evenly."""
        return int(rng.integers(len(self)))

    @property
    def rows(self) -> Dataset:
        """The files alone: "image" and, if labelled, "label"."""
        return self.table.select_columns([name for name in ("image", "label") if name in self.table.column_names])

    @property
    def ids(self) -> np.ndarray | None:
        """(256,) uint8, id on disk -> class id of the run or 255; None without labels."""
        return None if self.rule is None else self.rule.ids

    def image(self, index: int) -> np.ndarray:
        """(H,W,3) uint8 RGB at the size of the file or the crop box, turned upright if its EXIF data says so."""
        row = self.table[index]
        return self.cut(read_image(row["image"], self.where(row, index), self.config.max_pixels))

    def labels(self, index: int) -> np.ndarray:
        """(H,W) uint8 class ids of the run, 255 ignored, at the size of the file or the crop box.

        Raises:
            ValueError: for a file that is not a map of ids, or for ids the data set does not define.
        """
        row = self.table[index]
        return self.labels_of(row, self.where(row, index))

    def labels_of(self, row: Mapping[str, Any], where: str) -> np.ndarray:
        """`labels` of a row."""
        if self.rule is None:
            raise ValueError(f"domain {self.name} was loaded without labels.")
        return self.kept(read_labels(row["label"], where, self.rule, self.config.max_pixels))

    def kept(self, labels: np.ndarray) -> np.ndarray:
        """Of the labels of a whole file those inside the crop box, without those where valid_mask is black."""
        labels = self.cut(labels)
        if self.valid is None:
            return labels
        valid = resize_labels(self.valid, (labels.shape[0], labels.shape[1]))
        return np.where(valid, labels, np.uint8(IGNORE_INDEX))

    def validity(self, size: Size) -> np.ndarray | None:
        """(H,W) bool at `size`, False where the domain's valid_mask is black; None without a mask."""
        return None if self.valid is None else resize_labels(self.valid, size)

    def working_size(self, size: Size) -> Size:
        """Size of an image of `size` after the domain's resize rule."""
        return size if self.config.resize is None else resized_size(size, self.config.resize, self.config.resize_mode)

    def input_size(self, index: int = 0) -> InputSize:
        """What images are brought to for inference, each by the resize rule of training."""
        wanted = self.config.resize
        return wanted if wanted is None or self.config.resize_mode == "exact" else KeepRatio(wanted)

    def resized_image(self, index: int) -> np.ndarray:
        image = self.image(index)
        return resize_image(image, self.working_size((image.shape[0], image.shape[1])))

    def where(self, row: Mapping[str, Any], index: int) -> str:
        """How messages call a row."""
        file = row.get("file_name") or (row["image"] or {}).get("path")
        return f"row {index}{f' ({file})' if file else ''} of {self.name}"

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The crop box of an image or a label map; all of it without one.

        Raises:
            ValueError: if the box reaches beyond it.
        """
        if self.config.crop_box is None:
            return array
        top, left, height, width = self.config.crop_box
        if top + height > array.shape[0] or left + width > array.shape[1]:
            raise ValueError(
                f"{self.name}: crop_box {self.config.crop_box} (top, left, height, width) reaches beyond an image of "
                f"{array.shape[1]}x{array.shape[0]} pixels. Make it smaller."
            )
        return array[top : top + height, left : left + width]


@dataclass(frozen=True)
class StreamedDomain(Domain):
    """Images alone, read while a run trains. `table` has the first rows: they are what is checked and compared.

    Attributes:
        shards: the files of all rows; their images come from an `ImageStream`.
    """

    shards: Shards


@dataclass(frozen=True)
class JointDomain:
    """Several domains of one role as one: their images counted through, each domain drawn by its share.

    Attributes:
        role: of all of them, for messages.
        parts: the domains, in the order of the config.
        shares: of the draws, of each of them; they sum to 1.
    """

    role: str
    parts: tuple[Domain, ...]
    shares: tuple[float, ...]

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    @property
    def labelled(self) -> bool:
        return all(part.labelled for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def at(self, index: int) -> tuple[Domain, int]:
        """The domain that an image is of, and which one it is there."""
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def draw(self, rng: np.random.Generator) -> int:
        """The index of an image: the domain by its share, and evenly in it."""
        place = int(rng.choice(len(self.parts), p=self.shares))
        return sum(map(len, self.parts[:place])) + self.parts[place].draw(rng)

    def image(self, index: int) -> np.ndarray:
        part, own = self.at(index)
        return part.image(own)

    def labels(self, index: int) -> np.ndarray:
        part, own = self.at(index)
        return part.labels(own)

    def resized_image(self, index: int) -> np.ndarray:
        part, own = self.at(index)
        return part.resized_image(own)

    def input_size(self, index: int = 0) -> InputSize:
        """That of the domain that an image is of."""
        return self.at(index)[0].input_size()


AnyDomain = Domain | JointDomain


class ImageStream:
    """Images of a streamed domain, each a function of the seed and of its place in the run, resized like any other.

    Parquet is read by whole *row groups*. In each of several *lanes* one of them is open, and its images are drawn in
    random order, as many as a usual row group has; then the next one follows. Batch number b draws in lane b modulo
    the number of lanes. So each process reads lanes of its own, and so does each data worker if their number divides
    `LANES`; whatever their number, the images are the same.

    Each file has its turn before one comes again. Where a row group is short, or is one of few in its file, it is taken
    as much more rarely, and another one is drawn at random instead, so that images are drawn equally often. What is
    usual the first file says. Unreadable images are left out and told: nobody looked at them before.

    Args:
        domain: with the files.
        seed: of the order.
        slots: micro-batches of a step, of all processes together.
        draws: images of a micro-batch.

    Raises:
        ValueError: if the first file cannot be read or is empty.
    """

    LANES = 4  # of each slot, at least

    def __init__(self, domain: StreamedDomain, seed: int, slots: int, draws: int) -> None:
        self._domain, self._seed, self._draws = domain, seed, draws
        with domain.shards.open(0) as first:
            rows = _rows_of_groups(first)
        if not any(rows):
            raise ValueError(f"the first file of {domain.name}, {domain.shards.names[0]}, has no rows: remove it.")
        self._usual, self._weight = max(rows), len(rows) * max(rows)
        self.lanes = slots * self.LANES * math.ceil(domain.config.shuffle_buffer / (self.LANES * self._usual))
        self._held: dict[int, tuple[int, RowGroup]] = {}  # lane -> what is open there, and the number of its visit

    def image(self, batch: int, draw: int) -> np.ndarray:
        """(H,W,3) uint8 RGB.

        Args:
            batch: number of the micro-batch, counted over the whole run and over all processes.
            draw: place in it, below `draws`.

        Raises:
            ValueError: if a file cannot be read, or no image of a row group.
        """
        lane, place = batch % self.lanes, batch // self.lanes * self._draws + draw
        visit = place // self._usual * self.lanes + lane
        held = self._held.get(lane)
        if held is None or held[0] != visit:
            self._held.pop(lane, None)  # before the next one is read
            held = self._held[lane] = visit, self._visited(visit)
        rows, order = held[1]
        domain, config, first = self._domain, self._domain.config, place % self._usual
        for index in dict.fromkeys((*order[first:], *order[:first])):
            row = rows.slice(index, 1).to_pylist()[0]
            cell = as_cell(row[config.image_column])
            where = f"an image {row.get('file_name') or (cell or {}).get('path') or ''}".strip() + f" of {domain.name}"
            try:
                image = domain.cut(read_image(at_home(cell, where, config), where, config.max_pixels))
            except ValueError as error:
                logger.warning("left out: %s", error)
                continue
            return resize_image(image, domain.working_size((image.shape[0], image.shape[1])))
        raise ValueError(f"{domain.name} has {len(rows)} images in one row group of which none can be read.")

    def _visited(self, visit: int) -> RowGroup:
        """The row group of a visit, and which of its rows are drawn one after the other."""
        shards, config = self._domain.shards, self._domain.config
        turn, place = divmod(visit, len(shards))
        number = int(self._random(0, turn).permutation(len(shards))[place])
        rng = self._random(1, visit)
        for _ in range(_TRIES):
            with shards.open(number) as opened:
                names = opened.schema_arrow.names
                if config.image_column not in names:  # the first file has it, or the run would not have begun
                    raise ValueError(
                        f"{self._domain.name}: its file number {number + 1} has no column {config.image_column!r}, but "
                        f"{', '.join(names)}. All files of a stream need the same columns."
                    )
                rows = _rows_of_groups(opened)
                group = int(self._random(2, number, turn // len(rows)).permutation(len(rows))[turn % len(rows)])
                if rng.random() * self._weight < len(rows) * rows[group]:
                    kept = [name for name in (config.image_column, "file_name") if name in names]
                    found = opened.read_row_group(group, columns=kept)
                    orders = [rng.permutation(len(found)) for _ in range(math.ceil(self._usual / len(found)))]
                    return found, np.concatenate(orders)[: self._usual].tolist()
            number, turn = int(rng.integers(len(shards))), int(rng.integers(2**31))
        raise ValueError(f"{self._domain.name} has hardly a row group as large as the first one of its first file.")

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, _ORDER_STREAM, *what])


def _rows_of_groups(opened: pq.ParquetFile) -> list[int]:
    """Rows of each row group; one without rows stands for none."""
    return [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)] or [0]


def load_domains(role: str, domains: DomainConfigs, classes: Sequence[str], labelled: bool = True) -> AnyDomain:
    """`load_domain` of a role: of a list of domains the joint one.

    Raises:
        ValueError: as `load_domain`, with the place and the path of a domain in a list, and for one that is streamed.
    """
    if not isinstance(domains, tuple):
        return load_domain(domains, classes, labelled)
    parts = []
    for place, config in enumerate(domains):
        named = place_in_list(role, domains, place)
        try:
            parts.append(load_domain(config, classes, labelled))
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from error
        if isinstance(parts[-1], StreamedDomain):
            raise ValueError(f"{named} is streamed, which only a single target can be. Set its num_images.")
    return JointDomain(role, tuple(parts), shares_of(domains))


def place_in_list(role: str, domains: Sequence[DomainConfig], place: int) -> str:
    """How messages call a domain of a list: "source 2 of 3 (its path)"."""
    return f"{role} {place + 1} of {len(domains)} ({domains[place].path})"


def load_domain(
    domain: str | DomainConfig, classes: Sequence[str] = CITYSCAPES_CLASSES, labelled: bool = True
) -> Domain:
    """Open a domain. Nothing is decoded yet; `check_domain` does that.

    Args:
        domain: what DomainConfig.path allows, or a full DomainConfig.
        classes: class names of the run.
        labelled: False drops the label column, if there is one, before anything can read it.

    Raises:
        ValueError: if there is no such data set or split, a column is missing, it is empty, or label names do not fit.
    """
    config = DomainConfig(path=domain) if isinstance(domain, str) else domain
    if config.streamed and labelled and (config.crop_box is not None or config.valid_mask):
        raise ValueError(
            f"{config.path!r} is streamed with its labels, and the class counts beside it are of whole images: "
            "crop_box and valid_mask would change them. Leave them out, or set num_images to fetch the first so many."
        )
    shards = open_shards(config) if config.streamed else None
    rows, space, ignored = load_rows(config, labelled, shards)
    name = f"{config.name or config.path} ({config.split})"
    columns = {"image": config.image_column} | ({"label": config.label_column} if labelled else {})
    for kind, column in columns.items():
        if column not in rows.column_names and len(rows):
            raise ValueError(
                f"{name} has no column {column!r}: it has {', '.join(rows.column_names)}. "
                f"Set {kind}_column to one of them."
            )
    if told := account(len(rows) * len(columns), ignored):
        logger.warning("%s: %s", name, told)
    if config.num_images is not None:
        rows = rows.select(range(min(config.num_images, len(rows))))
    if not len(rows):
        raise ValueError(f"{name} is empty: there is no image to train or test on. Check path and split.")
    own = ("file_name", COUNTS, SIZE, DIGEST) if config.streamed else ("file_name", COUNTS)
    kept = [column for column in own if column in rows.column_names and column not in columns.values()]
    rows = rows.select_columns([*columns.values(), *kept])
    for kind, column in columns.items():
        kept_as = rows.features[column]
        files = isinstance(kept_as, Image) or (isinstance(kept_as, dict) and "bytes" in kept_as)
        if not files and kept_as != Value("binary"):
            raise ValueError(
                f"{name}: column {column!r} holds {kept_as}, not images. Set {kind}_column to a column of image files."
            )
        rows = rows.cast_column(column, Image(decode=False))
        rows = rows if column == kind else rows.rename_column(column, kind)
    try:
        rule = label_rule(config, space, classes) if labelled else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if shards is not None and not labelled:
        return StreamedDomain(name, rows, None, _validity_mask(config), config, shards)
    return Domain(name, rows, rule, _validity_mask(config), config, ignored=ignored)


def label_names(config: DomainConfig, space: str) -> tuple[tuple[str, ...], dict[Color, int] | None]:
    """Names of the ids 0, 1, ... on disk ("" for an id that is not defined), and the ids of colours, if any."""
    if config.label_colors:
        names = tuple(dict.fromkeys(config.label_colors.values()))
        said: dict[Color, str] = {}
        for text, name in config.label_colors.items():
            if said.setdefault(_color(text), name) != name:
                raise ValueError(
                    f"label_colors calls one colour ({text}) both {said[_color(text)]} and {name}. Keep one."
                )
        return names, {color: names.index(name) for color, name in said.items()}
    if config.label_ids:
        return tuple(config.label_ids.get(label_id, "") for label_id in range(max(config.label_ids) + 1)), None
    if config.class_names:
        return config.class_names, None
    names = LABEL_SPACES[space]
    table = SPACE_COLORS.get(space)
    if table is None:
        return names, None
    ids = {color: names.index(name) if name in names else IGNORE_INDEX for color, name in table.items()}
    return names, ids


def label_rule(config: DomainConfig, space: str, classes: Sequence[str]) -> LabelRule:
    """What the label files of a domain mean for a run with `classes`.

    Raises:
        ValueError: see `labels.id_map`.
    """
    if not space and not (config.class_names or config.label_ids or config.label_colors):
        if tuple(classes) != CITYSCAPES_CLASSES:
            raise ValueError(
                "nothing says what the ids in the label maps mean. List their names in class_names (position = id) or "
                "label_ids, or set label_space, for example to cityscapes; for colours give label_colors."
            )
        space = "cityscapes"
    names, colors = label_names(config, space)
    ids = id_map(names, classes, config.label_map)
    if not space:
        _tell_other_names(config, names, classes)
    known = np.zeros(256, dtype=bool)
    known[[label_id for label_id, name in enumerate(names) if name]] = True
    if config.ignore_id is not None and config.ignore_id >= 0:  # -1 is ignored in any case
        if config.label_colors:
            raise ValueError("ignore_id is for ids, and label_colors says what colours mean: leave ignore_id out.")
        known[config.ignore_id] = True
        ids[config.ignore_id] = IGNORE_INDEX
    return LabelRule(ids, known, colors, bool(config.label_colors), space == "synthia")


def _tell_other_names(config: DomainConfig, names: Sequence[str], classes: Sequence[str]) -> None:
    """Names of a user's own that are ignored, if there are classes which nothing is called."""
    called = {config.label_map.get(name, name) for name in names}
    missing = {name.lower(): name for name in classes if name not in called}
    meant, others = set(), []
    for name in sorted({name for name in names if name and name not in classes and name not in config.label_map}):
        near = difflib.get_close_matches(name.lower(), missing, 1, 0.8)
        if near:
            meant.add(near[0])
            logger.warning(
                "%s: %r is no class of the run and is ignored. If it is %r, set label_map: {%s: %s}.",
                *(config.path, name, missing[near[0]], name, missing[near[0]]),
            )
        else:
            others.append(name)
    if others and (unnamed := [name for key, name in missing.items() if key not in meant]):
        logger.warning(
            "%s: %s %s no class of the run and ignored, and nothing is called %s. If two of these are the same, say so "
            "in label_map, for example {%s: %s}.",
            *(config.path, ", ".join(map(repr, others)), "is" if len(others) == 1 else "are"),
            *(" or ".join(map(repr, unnamed)), others[0], unnamed[0]),
        )


def _color(text: str) -> Color:
    """ "R,G,B", anything Pillow knows as a colour, such as "#804080", or "transparent"."""
    if text == "transparent":
        return TRANSPARENT
    try:
        parts = tuple(int(part) for part in text.split(",")) if "," in text and "(" not in text else None
        red, green, blue = ImageColor.getrgb(text)[:3] if parts is None else parts
    except ValueError as error:
        raise ValueError(
            f'label_colors has the key {text!r}, which is no colour. Write "R,G,B" with 0..255, "#RRGGBB", or '
            '"transparent".'
        ) from error
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise ValueError(f"label_colors has the key {text!r}; each of R, G and B must be in 0..255.")
    return red, green, blue


def _validity_mask(config: DomainConfig) -> np.ndarray | None:
    if not config.valid_mask:
        return None
    if not Path(config.valid_mask).is_file():
        raise ValueError(f"valid_mask {config.valid_mask!r} does not exist. Give a picture: black is never trusted.")
    pixels = read_image(
        {"bytes": None, "path": config.valid_mask}, f"valid_mask {config.valid_mask}", config.max_pixels
    )
    valid = np.asarray(pixels.any(axis=2))
    if not valid.any():
        raise ValueError(f"valid_mask {config.valid_mask!r} is black everywhere: no pixel would be left.")
    return valid


@dataclass(frozen=True)
class Reading:
    """What one pass over the files of a domain found.

    Attributes:
        counts: (images, K) int64 pixels per class at the labels' own resolution; zeros without labels. A domain that
            was prepared at a smaller size tells the numbers of its original files.
        sizes: (images, 2) int64 height and width of the files, upright.
        contents: of the images with their label maps, and of what the ids mean.
    """

    counts: np.ndarray
    sizes: np.ndarray
    contents: Contents

    @property
    def images(self) -> set[str]:
        """Digests of the images with their label maps."""
        return set(self.contents.digests[: len(self.counts)])

    def of(self, rows: Sequence[int]) -> "Reading":
        """What the same pass would have found in some of the rows."""
        parts = [*rows, *range(len(self.counts), len(self.contents.digests))]
        names, digests = ([held[part] for part in parts] for held in (self.contents.names, self.contents.digests))
        return Reading(self.counts[rows], self.sizes[rows], Contents(self.contents.unit, names, digests))


def joint_reading(parts: Sequence[Reading]) -> Reading:
    """Of several domains whose images are counted through; of one its own."""
    if len(parts) == 1:
        return parts[0]
    counts, sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("counts", "sizes"))
    names, digests = list[str](), list[str]()
    for images in (True, False):  # those of all domains first
        for part in parts:
            chosen = slice(0, len(part.counts)) if images else slice(len(part.counts), None)
            names += part.contents.names[chosen]
            digests += part.contents.digests[chosen]
    return Reading(counts, sizes, Contents(parts[0].contents.unit, names, digests))


def check_domain(domain: Domain, classes: Sequence[str]) -> np.ndarray:
    """The counts of `read_domain`, which says what it checks."""
    return read_domain(domain, classes).counts


def read_domain(domain: AnyDomain, classes: Sequence[str]) -> Reading:
    """Read every label map, every image header and the bytes of both once, before training; see `remembered`.

    Of a joint domain that of all its parts, counted through.

    Raises:
        ValueError: naming the first row that is not an image, has a label map of another size or orientation, or shows
            an id that the data set does not define; or if fewer than two classes occur in a labelled domain.
    """
    if isinstance(domain, JointDomain):
        return joint_reading([_read_part(domain, place, classes) for place in range(len(domain.parts))])
    if domain.rule is not None and domain.config.streamed:
        return _read_counted(domain, domain.rule, classes)
    stamps, names = _stamps(domain)
    key = ["pixels of classes, and ignored, and sizes", _settings(domain), _rules(domain), len(classes)]
    rows = remembered(domain.name, key, stamps, lambda index: _check_row(domain, index, len(classes)))
    counts = np.array([row["counts"] for row in rows], dtype=np.int64).reshape(len(domain), len(classes) + 1)
    _refuse_few_classes(domain, counts[:, :-1], bool(counts[:, -1].any()), classes)
    sizes = np.array([row["size"] for row in rows], dtype=np.int64).reshape(len(domain), 2)
    return Reading(counts[:, :-1], sizes, _contents(domain, names, [row["digest"] for row in rows]))


def _read_counted(domain: Domain, rule: LabelRule, classes: Sequence[str]) -> Reading:
    """Of a streamed domain with labels what the class counts beside it say, after a look at some of its images.

    Raises:
        ValueError: if these are others.
    """
    table = domain.table.with_format("arrow")[:]
    digests, names = (table[column].to_pylist() for column in (DIGEST, "file_name"))
    for index in np.unique(np.linspace(0, len(domain) - 1, LOOKED_AT).astype(int)).tolist():
        where = domain.where(domain.table[index], index)
        row = _read_files(domain, domain.table[index], where)
        if _digest(row) != digests[index]:
            raise ValueError(
                f"{where} is not the image that {counts_file(domain.config.split)} tells of: its class counts are of "
                "other files. Write it anew with `t2sda prepare`."
            )
        _checked(domain, row, where, len(classes))
    of_ids, sizes = (
        np.array(table[column].combine_chunks().flatten(), dtype=np.int64).reshape(len(domain), -1)
        for column in (COUNTS, SIZE)
    )
    counts = np.zeros((len(domain), len(classes)), dtype=np.int64)
    ids = rule.ids[: of_ids.shape[1]]
    for label_id in np.flatnonzero(ids != IGNORE_INDEX):
        counts[:, ids[label_id]] += of_ids[:, label_id]
    _refuse_few_classes(domain, counts, bool(of_ids[:, ids == IGNORE_INDEX].any()), classes)
    return Reading(counts, sizes, _contents(domain, names, digests))


def _refuse_few_classes(domain: Domain, counts: np.ndarray, ignored: bool, classes: Sequence[str]) -> None:
    """ValueError if a labelled domain shows fewer than two classes; those that it does not show are told."""
    present = [name for name, total in zip(classes, counts.sum(axis=0), strict=True) if total]
    if domain.rule is not None and len(present) < 2:
        raise ValueError(
            f"{domain.name} shows {'only the class ' + present[0] if present else 'none of the classes'}: "
            "at least two are needed. Check label_space and label_map."
        )
    if domain.rule is not None and len(present) < len(classes):
        absent = ", ".join(name for name in classes if name not in present)
        hint = f" {NOT_NAMED}" if ignored and may_hide_a_class(domain) else ""
        logger.warning(
            "%s shows no pixel of %s: nothing is learned or scored of it there.%s", domain.name, absent, hint
        )


def may_hide_a_class(domain: Domain) -> bool:
    """Whether ignored pixels can only be those of 255, as all that has a name is a class and nothing is masked."""
    rule = domain.rule
    if rule is None or rule.colors is not None or domain.valid is not None:
        return False
    return not rule.known[IGNORE_INDEX] and bool((rule.ids[rule.known] != IGNORE_INDEX).all())


def _read_part(domain: JointDomain, place: int, classes: Sequence[str]) -> Reading:
    try:
        return read_domain(domain.parts[place], classes)
    except ValueError as error:
        raise ValueError(
            f"{place_in_list(domain.role, [part.config for part in domain.parts], place)}: {error}"
        ) from error


def domain_contents(domain: Domain) -> Contents:
    """The contents of a domain as `read_domain` gives them, of files that need not be in order: nothing is decoded."""

    def digest_of(index: int) -> str:
        row = domain.table[index]
        try:
            return _digest(_read_files(domain, row, domain.where(row, index)))
        except ValueError:
            return digest(b"")

    stamps, names = _stamps(domain)
    key = ["digests", _settings(domain), domain.rule is None]
    return _contents(domain, names, remembered(domain.name, key, stamps, digest_of))


def _settings(domain: Domain) -> dict[str, Any]:
    """Of a domain, but for how often it is drawn."""
    return {name: value for name, value in settings_of(domain.config).items() if name != "share"}


def _check_row(domain: Domain, index: int, num_classes: int) -> dict[str, Any]:
    where = domain.where(domain.table[index], index)
    return _checked(domain, _read_files(domain, domain.table[index], where), where, num_classes)


def _checked(domain: Domain, row: dict[str, Any], where: str, num_classes: int) -> dict[str, Any]:
    size, orientation = read_header(row["image"], where, domain.config.max_pixels)
    counts = _count_row(row, where, domain, num_classes, size, orientation)
    return {"digest": _digest(row), "counts": counts, "size": list(size)}


def _read_files(domain: Domain, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with the bytes of its files."""
    columns = ("image",) if domain.rule is None else ("image", "label")
    read = {
        column: {"bytes": file_bytes(row[column], where, domain.config.max_pixels), "path": None} for column in columns
    }
    return dict(row) | read


def _digest(row: Mapping[str, Any]) -> str:
    return digest(*(row[column]["bytes"] for column in ("image", "label") if column in row))


def _contents(domain: Domain, names: Sequence[str], digests: Sequence[str]) -> Contents:
    """Of the rows, and of what makes classes of the bytes in them."""
    rules = [] if domain.rule is None else [digest(domain.rule.ids.tobytes())]
    rules += [] if domain.valid is None else [digest(np.packbits(domain.valid).tobytes())]
    names_of_rules = [] if domain.rule is None else ["what the ids mean"]
    names_of_rules += [] if domain.valid is None else ["valid_mask"]
    if isinstance(domain, StreamedDomain):
        rules.append(domain.shards.contents())
        names_of_rules.append("the list of its files")
    return Contents("images and label maps", [*names, *names_of_rules], [*digests, *rules])


def _rules(domain: Domain) -> list[Any]:
    """Whatever decides what is counted in a label map, for JSON."""
    arrays = [] if domain.rule is None else [domain.rule.ids, domain.rule.known]
    arrays += [] if domain.valid is None else [domain.valid]
    rest = None if domain.rule is None else [str(value) for value in vars(domain.rule).values()]
    return [*(digest(array.tobytes()) for array in arrays), rest]


def _stamps(domain: Domain) -> tuple[list[Any | None], list[str]]:
    """By what each row is known to be as it was (None: by nothing), and what messages call it."""
    table = domain.table
    held_in = [stamp(Path(file["filename"])) for file in table.cache_files]
    whole = digest(f"{table._fingerprint} {held_in}".encode())[:16] if held_in else None
    stamps: list[Any | None] = []
    names: list[str] = []
    columns = [name for name in ("image", "label") if name in table.column_names and (name == "image" or domain.rule)]
    kept = [name for name in (*columns, "file_name") if name in table.column_names]
    for batch in table.select_columns(kept).with_format("arrow").iter(1000):
        cells = {name: batch[name].combine_chunks() for name in columns}
        inside = {name: column.field("bytes").is_valid().to_pylist() for name, column in cells.items()}
        paths = {name: column.field("path").to_pylist() for name, column in cells.items()}
        files = batch["file_name"].to_pylist() if "file_name" in kept else paths["image"]
        for place, file in enumerate(files):
            index = len(stamps)
            parts = [_stamp(inside[name][place], paths[name][place], whole, index) for name in columns]
            stamps.append(None if None in parts else parts)
            names.append(file or f"row {index}")
    return stamps, names


def _stamp(inside: bool, path: str | None, table: str | None, index: int) -> Any | None:
    """Of one cell: its bytes are inside the table, which may lie in a file, or in a file of their own."""
    if inside:
        return None if table is None else [table, index]
    try:
        return None if path is None or "://" in path else stamp(Path(path))
    except OSError:
        return None


def _count_row(
    row: dict[str, Any], where: str, domain: Domain, num_classes: int, size: Size, orientation: int
) -> list[int]:
    if domain.rule is None:
        return [0] * (num_classes + 1)
    if orientation != 1:
        raise ValueError(
            f"{where}: the camera says that the photo must be turned (EXIF orientation {orientation}), which its label "
            "map cannot say. Save the photo upright, or turn both, and remove the EXIF entry."
        )
    whole = read_labels(row["label"], where, domain.rule, domain.config.max_pixels)
    if whole.shape != size:
        raise ValueError(
            f"{where}: the image has {size[1]}x{size[0]} pixels, its label map {whole.shape[1]}x{whole.shape[0]}. "
            "They must be equal; resize or re-export the label map (nearest neighbour)."
        )
    labels = domain.kept(whole)
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)
    ignored = int(counts[IGNORE_INDEX])
    if COUNTS in row and domain.valid is None and domain.config.crop_box is None:
        counts = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
        np.add.at(counts, domain.rule.ids[: len(row[COUNTS])], row[COUNTS])
    return [*counts[:num_classes].tolist(), ignored]
