"""Make a table of the paper, or a fair one of your config: train the cells that are missing, and print the figures.

    t2sda tables table07 --seeds 0..2 --scale demo
    t2sda tables table07 table08 --scale camvid --dry-run
    t2sda tables table12 --train.max_steps 400 --num_processes 2
    t2sda tables fair --config mine.yaml --rates 1e-4,3e-4,1e-3 --seeds 0..4
    t2sda tables labels --config mine.yaml --labels 0,8,16,32,all --rates 1e-4,3e-4,1e-3 --seeds 0..2

TABLE is one of table02 ... table17, or encoders, pull or small_data, which are none of the paper's, or the path of your
own file with the same form as those in configs/ablations/.

A cell is one row of the table with one seed, and it is one run of `t2sda train`. It is stored in
outputs/ablations/SCALE/, in a folder whose name is a number computed from its config. So a run that belongs to several
tables is trained only once. If you change the config of a row, this makes a new cell.

A finished cell is not trained again. A cell that was interrupted continues from its checkpoint. Every key of a config
is also a flag, and applies to every cell of this call. After Ctrl-C or SIGTERM the running cell first writes its
checkpoint.

The files TABLE.md and TABLE.json are written beside the cells. They have the mean and sd (sample standard deviation)
over the seeds. A file that names one of its rows as `reference` gets the difference of every other row to it, seed by
seed, with a 95 % interval.

The table "fair" compares four trainings of one config: on the source alone, self-training (loss_weights.pull 0), T2S-DA
(the config itself), and the upper bound, which learns the labels of the target (method target_only). Each of them is
first trained at the same learning rates with the first seed, and then at its own best one with all seeds. Half of the
test images choose the rates, and all figures are of the other half. The headline is the share of the gap between
source-only and upper bound that T2S-DA closes. The cells are stored in outputs/fair/CONFIG/. Several calls may work at
the same time, with different --rows, or with different --seeds and the same --search_seeds: a cell is made by one of
them, and the others wait for it. The same call with all rows and seeds then trains nothing and prints the whole table.

The table "labels" draws the curve over labels of target images: the config itself, and source-only with the same
labels, at each number of --labels (see target_labels in `t2sda config`). Every row at every number has its own best
learning rate, found as in the table "fair". The cells are stored in outputs/labels/CONFIG/, and the curve is labels.png
beside them.

Exit codes:
    0     all cells are there
    1     some cells failed; the other cells were still run
    2     the input is wrong
    130   the command was stopped by Ctrl-C
    143   the command was stopped by SIGTERM
"""

import hashlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..analysis.fair import (
    CHOOSING,
    DIFFERENT_TESTS,
    ROWS,
    SHOWN,
    best,
    fair_text,
    figures,
    figures_over_labels,
    halves_of_images,
    label_curve_text,
    said_of_absent,
    tried,
)
from ..analysis.plots import save_steps
from ..analysis.statistics import paired_difference
from ..config import RECIPES, RunConfig, changes, differences, find_recipe, load_config, only, plain_name, read_yaml
from ..data.domains import Domain, load_domain, load_domains, read_domain
from ..data.streets import SCENES
from ..evaluation.table import CLASS_SETS, markdown, spread, subset_miou
from ..labels import THING_CLASSES
from ..launching import Runner, refuse_keys, words_of
from ..storage import foreign_json, read_json, write_json, write_text
from ..training.build import lengths_of, open_labelled_target
from ..training.derive import Facts, derive, without_data
from ..training.estimate import count_update, this_machine
from ..training.resume import locked

# One run of the base config, until there are cells to measure: two CPU cores for the first two; a GPU of 2019 for
# "paper" (DAFormer's 16 hours, times 1.45 for the two more passes of T2S-DA).
SECONDS = {"demo": 120, "camvid": 3600, "paper": 16 * 3600 * 1.45}
# The nine rarest classes of Cityscapes: their mean is the paper's "tail" (Table 9).
TAIL = ("wall", "traffic light", "traffic sign", "rider", "truck", "bus", "train", "motorcycle", "bicycle")
_CHECKED = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
_RULES = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is no key that it may have",
    "tuple_type": "must be a list",
    "dict_type": "must map keys to values",
    "dataclass_type": "must map keys to values",
    "string_type": "must be a text",
}
_OF_A_RUN = ("summary", "data", "run")  # JSON files that every run has
SUBSETS = {"mIoU16": CLASS_SETS["syn16"], "mIoU13": CLASS_SETS["syn13"], "tail": TAIL}
# So many times the bound of `estimate` does an update take: two to three.
ABOVE_BOUND = 2.5
# What makes a run of a config that of a row of the table "fair".
FAIR: dict[str, tuple[str, ...]] = {
    "source_only": ("--method=source_only",),
    "self_training": ("--loss_weights.pull=0",),
    "t2sda": (),
    "target_only": ("--method=target_only",),
}
LABELLED_ROWS = {"t2sda": "T2S-DA", "source_only": "source-only + labels"}
# Defaults of the first release that are others today. A cell is numbered by what its config changes against that
# release, so that no change of a default moves a cell that somebody has trained.
FIRST_RELEASE: dict[str, Any] = {
    "uda.ignore_top": 15,
    "uda.ignore_bottom": 120,
    "loss_weights.feature_distance": 0.005,
    "feature_distance.classes": THING_CLASSES,
    "data.crop_size": (512, 512),
    "data.outer_crop_size": (512, 1024),
    "hrda.crop_size": (512, 512),
    "rcs.temperature": 0.01,
    "rcs.min_pixels": 3000,
    "rcs.min_crop_ratio": 0.5,
    "uda.ema_momentum": 0.999,
    "patch_mask.block_size": 64,
    "translate.fda.beta": 0.01,
    "optim.warmup_steps": 1500,
}
# Keys that change nothing of the result, but have always counted for the number.
COUNTED = (
    "model.activation_checkpointing",
    "hrda.crops_at_once",
    "train.non_finite",
    "train.max_skipped_steps",
)


def run(args: Namespace) -> int:
    refuse_keys(args.overrides, seed="use --seeds", output_dir="use --output", resume="a cell always goes on")
    if args.tables == ["fair"]:
        tables, seeds = [fair_table(args)], args.seeds or [0, 1, 2, 3, 4]
        folder = (args.output or Path("outputs/fair")) / plain_name(args.config)
    elif args.tables == ["labels"]:
        tables, seeds = [labels_table(args)], args.seeds or [0, 1, 2]
        folder = (args.output or Path("outputs/labels")) / plain_name(args.config)
    elif {"fair", "labels"} & {*args.tables} or any(
        (args.config, args.rates, args.search_seeds, args.rows, args.labels)
    ):
        raise ValueError(
            "--config, --rates, --search_seeds, --rows and --labels are of the tables fair and labels, which are given "
            "alone."
        )
    else:
        scale, seeds = args.scale or "paper", args.seeds or [0, 1, 2]
        tables = [read_table(name, scale, args.overrides) for name in args.tables]
        folder = (args.output or Path("outputs/ablations")) / scale
    folder = folder.resolve()
    for table in tables:
        if not args.dry_run:
            refuse_foreign_table(table, folder)
    failed: list[str] = []
    with Runner() as runner:
        for table in tables:
            cells = cells_of(table, seeds, folder)
            if table.search is None:
                summary_of(table, seeds, folder)  # what is there must fit together before more is made
            else:
                for sentence in said_of_absent(table.search.absent):
                    print(f"warning: {sentence}", file=sys.stderr)
            if args.dry_run:
                planned = list(cells)
                print(plan_text(table, planned, later(table, seeds, folder), *estimate(table, folder)))
                continue
            for cell in cells:
                code = make_cell(cell, table, runner, words_of(args))
                if code:
                    failed.append(f"{table.name} {' | '.join(cell.row.label)} seed {cell.seed}: exit code {code}")
                    print(f"failed: {failed[-1]}", file=sys.stderr)
                write(table, seeds, folder)
            print(f"\n{table.name}: {table.question}\n\n{write(table, seeds, folder)}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


@dataclass(frozen=True)
class Row:
    """One line of a table: `config` and `arguments` make `cfg`; None if it is quoted from the paper alone."""

    label: tuple[str, ...]
    paper: tuple[tuple[float | None, float | None], ...]  # (mean, sd) per score
    config: str | None
    arguments: tuple[str, ...]
    cfg: RunConfig | None


@dataclass(frozen=True)
class Search:
    """How the tables "fair" and "labels" find the learning rate of each of their rows.

    Attributes:
        rows: name -> rate -> the row at this rate.
        trained: names of those that this call trains.
        seeds: with which the rates are compared.
        absent: classes that none of the test images shows that choose the rates, and none of those of the figures.
    """

    rows: Mapping[str, Mapping[float, Row]]
    trained: tuple[str, ...]
    seeds: tuple[int, ...]
    absent: tuple[list[str], list[str]]


@dataclass(frozen=True)
class Table:
    name: str
    question: str
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    across: bool  # rows stand as columns in the paper
    evaluate: tuple[str, ...]  # words of `t2sda evaluate`, if the score is not the run's own
    rows: tuple[Row, ...]
    search: Search | None = None
    reference: tuple[str, ...] | None = None  # label of the row that all others are compared with, seed by seed


@dataclass(frozen=True)
class Cell:
    """One run. `folder` is a function of the config, without the seed, the seed, and nothing else."""

    row: Row
    seed: int
    folder: Path

    @property
    def state(self) -> str:
        if read_json(self.folder / "summary.json"):
            return "done"
        return "interrupted" if self.folder.exists() else "missing"


@dataclass(frozen=True)
class _RowFile:
    """A row in the file of a table."""

    __pydantic_config__ = _CHECKED

    label: tuple[str, ...]
    set: dict[str, Any] | None = None  # keys of a run
    set_at: dict[str, dict[str, Any]] = field(default_factory=dict)  # scale -> more of them
    base: dict[str, str] = field(default_factory=dict)  # scale -> config, in the place of the table's
    quoted: bool = False
    paper: tuple[tuple[float | None, ...], ...] = ()  # of each score: the mean, and perhaps the sd


@dataclass(frozen=True)
class _TableFile:
    """The file of a table."""

    __pydantic_config__ = _CHECKED

    question: str
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    base: dict[str, str]  # scale -> config
    rows: tuple[_RowFile, ...]
    table: int | None = None  # its number in the paper
    across: bool = False
    evaluate: dict[str, tuple[str, ...]] = field(default_factory=dict)  # scale -> words of `t2sda evaluate`
    reference: tuple[str, ...] | None = None


def _written(path: Path, example: str) -> _TableFile:
    """What the file of a table says.

    Raises:
        ValueError: naming the first key that is missing, or holds something else than it must.
    """
    if path.stem in _OF_A_RUN:
        raise ValueError(f"a cell of a table keeps its scores under the table's name, so {path} needs another name.")
    try:
        return TypeAdapter(_TableFile).validate_python(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        rule = _RULES.get(first["type"], first["msg"].lower())
        given = "" if first["type"] in ("missing", "unexpected_keyword_argument") else f", got {first['input']!r}"
        raise ValueError(f"{path} is no table: {place} {rule}{given}. {example} is one.") from error


def read_table(name: str, scale: str, overrides: Sequence[str] = ()) -> Table:
    """A table at one scale, with every row's config checked.

    Raises:
        ValueError: for an unknown table, a scale it does not have, or a row whose config is not valid.
    """
    known = sorted(file.stem for file in (RECIPES / "ablations").glob("*.yaml"))
    path = find_recipe(name, "ablations", known)
    content = _written(path, known[0])
    if scale not in content.base:
        raise ValueError(f"{path.stem} has no scale {scale!r}: it has {', '.join(content.base)}.")
    if content.evaluate and scale not in content.evaluate:
        raise ValueError(f"{path.stem} does not say what to evaluate at scale {scale!r}.")
    rows = []
    own = not any(entry.paper for entry in content.rows)  # a table that is in no paper
    for number, entry in enumerate(content.rows, 1):
        paper = ((None,),) * len(content.scores) if own else entry.paper
        if len(paper) != len(content.scores) or not all(paper):
            raise ValueError(f"row {number} of {path} needs under paper one list for each of {list(content.scores)}.")
        if entry.set is None and not entry.quoted:
            raise ValueError(f"row {number} of {path} needs set, or quoted.")
        config: str | None = None
        cfg: RunConfig | None = None
        arguments: tuple[str, ...] = ()
        if not entry.quoted:
            config = (content.base | entry.base)[scale]
            changed = (entry.set or {}) | entry.set_at.get(scale, {})
            if of_cell := sorted({"seed", "output_dir", "resume"} & changed.keys()):
                raise ValueError(f"row {number} of {path} sets {of_cell[0]}, which the command sets for each cell.")
            texts = (f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changed.items())
            arguments = (*texts, "--baseline=none", *overrides)
            cfg = load_config(config, arguments)
            named = cfg.translate.trained.architecture
            if named != load_config(config, overrides).translate.trained.architecture:
                raise ValueError(f"row {number} of {path} names code to run, {named!r}, which no file may do.")
        cells = tuple((cell[0], cell[1] if len(cell) > 1 else None) for cell in paper)
        rows.append(Row(entry.label, cells, config, arguments, cfg))
    reference = content.reference
    if reference is not None and [row.label for row in rows if row.cfg is not None].count(reference) != 1:
        raise ValueError(f"{path} must have one row, not quoted, with the label of its reference, {list(reference)}.")
    scores = {"mIoU", *SUBSETS, *(name for row in rows if row.cfg is not None for name in row.cfg.classes)}
    if unknown := [name for name in content.scores if name not in scores]:
        raise ValueError(f"{path} asks for scores that none of its rows has: {', '.join(map(str, unknown))}.")
    return Table(
        path.stem,
        content.question,
        content.labels,
        content.scores,
        content.across,
        content.evaluate.get(scale, ()),
        tuple(rows),
        reference=reference,
    )


def fair_table(args: Namespace) -> Table:
    """The table "fair" of a config, of which every row is checked: what would end one of its runs is said now.

    Raises:
        ValueError: for a row whose config or labels are not valid, or for too few test images.
    """
    reason = "the table fair sets it for each row"
    refuse_keys(args.overrides, method=reason, baseline=reason, **{"optim.lr": "use --rates"})
    if not args.config or args.scale:
        raise ValueError("the table fair needs --config, a file or the name of a recipe, and has no --scale.")
    cfg = load_config(args.config, args.overrides)
    if cfg.method != "t2sda":
        raise ValueError(
            f"the table fair is of an adaptation, so the method of its config must be t2sda: {cfg.method}."
        )
    trained = tuple(args.rows or FAIR)
    if unknown := [name for name in trained if name not in FAIR]:
        raise ValueError(f"--rows must be some of {','.join(FAIR)}, got {', '.join(unknown)}.")
    always = ("--baseline=none", '--push_to_hub.repo_id=""', *crops_of(cfg))
    rows: dict[str, dict[float, Row]] = {}
    for name, own in FAIR.items():
        rows[name] = {}
        for rate in rates_of(args, cfg):
            arguments = (*args.overrides, *own, f"--optim.lr={rate!r}", *always)
            label = ROWS[name], f"rate {rate:g}"
            rows[name][rate] = Row(label, (), args.config, arguments, load_config(args.config, arguments))
    test, absent = images_to_halve(cfg, "fair")
    if "target_only" in trained:
        bound = next(iter(rows["target_only"].values())).cfg
        assert bound is not None
        others = ",".join(name for name in trained if name != "target_only") or "source_only,self_training,t2sda"
        try:
            learned = read_domain(load_domains("target", bound.labelled, bound.classes), bound.classes)
        except ValueError as error:
            raise ValueError(
                f"the upper bound learns the labels of the target, and these cannot be read: {error} Or leave it out "
                f"with --rows {others}."
            ) from error
        if shared := learned.images & read_domain(test, cfg.classes).images:
            raise ValueError(
                f"{len(shared)} of the images that the upper bound would learn are test images. Give target and test "
                f"different images, or leave it out with --rows {others}."
            )
    question = f"How much of the gap between source-only and upper bound does T2S-DA close with {args.config}?"
    if not cfg.loss_weights.pull:
        question += " (Its loss_weights.pull is 0, so it is the self-training itself.)"
    return Table("fair", question, (), (), False, (), flat(rows), Search(rows, trained, search_seeds(args), absent))


def labels_table(args: Namespace) -> Table:
    """The table "labels" of a config: what would end one of its runs is said now.

    Raises:
        ValueError: for a row whose config or labels are not valid.
    """
    reason = "the table labels sets it for each row"
    refuse_keys(
        args.overrides, method=reason, baseline=reason, target_labels="use --labels", **{"optim.lr": "use --rates"}
    )
    if not args.config or args.scale:
        raise ValueError("the table labels needs --config, a file or the name of a recipe, and has no --scale.")
    cfg = load_config(args.config, args.overrides)
    if cfg.method != "t2sda":
        raise ValueError(
            f"the table labels is of an adaptation, so the method of its config must be t2sda: {cfg.method}."
        )
    trained = tuple(args.rows or LABELLED_ROWS)
    if unknown := [name for name in trained if name not in LABELLED_ROWS]:
        raise ValueError(f"--rows must be some of {','.join(LABELLED_ROWS)}, got {', '.join(unknown)}.")
    _, absent = images_to_halve(cfg, "labels")
    always = ("--baseline=none", '--push_to_hub.repo_id=""', *crops_of(cfg))
    rows: dict[str, dict[float, Row]] = {}
    for number in args.labels or ["0", "8", "16", "32", "all"]:
        asked = f"--target_labels={'1/1' if number == 'all' else number}"
        for name, own in LABELLED_ROWS.items():
            of_rate = rows[f"{name} {number}"] = {}
            for rate in rates_of(args, cfg):
                arguments = (*args.overrides, *FAIR[name], asked, f"--optim.lr={rate!r}", *always)
                own_cfg = load_config(args.config, arguments)
                of_rate[rate] = Row((own, number, f"rate {rate:g}"), (), args.config, arguments, own_cfg)
            if own_cfg.labelled_target is not None:
                open_labelled_target(own_cfg, own_cfg.labelled_target)
    question = f"What do labels of a few target images add to {args.config}?"
    wanted = tuple(name for name in rows if name.split()[0] in trained)
    return Table("labels", question, (), (), False, (), flat(rows), Search(rows, wanted, search_seeds(args), absent))


def rates_of(args: Namespace, cfg: RunConfig) -> list[float]:
    return args.rates or [float(f"{cfg.optim.lr * factor:.3g}") for factor in (1 / 3, 1, 3)]


def search_seeds(args: Namespace) -> tuple[int, ...]:
    return tuple(args.search_seeds or (args.seeds or [0])[:1])


def flat(rows: Mapping[str, Mapping[float, Row]]) -> tuple[Row, ...]:
    return tuple(row for of_name in rows.values() for row in of_name.values())


def images_to_halve(cfg: RunConfig, table: str) -> tuple[Domain, tuple[list[str], list[str]]]:
    """The test domain, and the classes that one half of its images alone shows: see `Search.absent`.

    Raises:
        ValueError: if it has too few images to choose rates by a half of them.
    """
    test = load_domain(only(cfg.test, f"the table {table} halves one test domain"), cfg.classes)
    images = min(len(test), cfg.evaluation.limit or sys.maxsize)
    if images < 2:
        raise ValueError(
            f"the test domain has {images} image to be scored, and the table {table} needs at least two: one half of "
            "them chooses the learning rates, the other one makes the figures."
        )
    counts, of_image = read_domain(test, cfg.classes).counts[:images], halves_of_images(images)
    choosing, shown = (counts[of_image == half].any(axis=0) for half in (CHOOSING, SHOWN))
    names = np.array(cfg.classes)
    return test, (names[shown & ~choosing].tolist(), names[choosing & ~shown].tolist())


def crops_of(cfg: RunConfig) -> tuple[str, ...]:
    """The crop of an adaptation as flags, where it is left open: all rows have that one, also the upper bound, which
    does not look at the source.
    """
    if cfg.data.crop_size is not None and cfg.data.outer_crop_size is not None:
        return ()
    source = load_domains("source", cfg.source, cfg.classes)
    target = load_domains("target", cfg.target, cfg.classes, labelled=False)
    learned, seen = read_domain(source, cfg.classes), read_domain(target, cfg.classes)
    facts = Facts(learned.counts, learned.sizes, seen.sizes, None, lengths_of(source), lengths_of(target))
    data = derive(cfg, facts, 1).cfg.data
    return f"--data.crop_size={list(data.crop_size)}", f"--data.outer_crop_size={list(data.outer_crop_size)}"


def cells_of(table: Table, seeds: Sequence[int], folder: Path) -> Iterator[Cell]:
    """The cells of a call, seed after seed, so that an early look shows every row.

    Those at the best learning rates, where there is a search, come last, and are known when the others have been made.
    """
    search = table.search
    if search is None:
        yield from (cell_of(row, seed, folder) for seed in seeds for row in table.rows if row.config is not None)
        return
    for seed in search.seeds:
        for name in search.trained:
            yield from (cell_of(row, seed, folder) for row in search.rows[name].values())
    chosen = {name: chosen_rate(search, name, folder) for name in search.trained}
    for seed in (seed for seed in seeds if seed not in search.seeds):
        for name, rate in chosen.items():
            if rate is not None:
                yield cell_of(search.rows[name][rate], seed, folder)


def chosen_rate(search: Search, name: str, folder: Path) -> float | None:
    """The best rate of a row; None while cells that say so were never tried."""
    of_search = [cell_of(row, seed, folder) for row in search.rows[name].values() for seed in search.seeds]
    if any(cell.state == "missing" for cell in of_search):
        return None
    return best(tried(results_of(search, name, search.seeds, folder), search.seeds))


def results_of(
    search: Search, name: str, seeds: Sequence[int], folder: Path
) -> dict[float, dict[int, Mapping[str, Any]]]:
    """Rate -> seed -> result of the student, of the finished cells of a row."""
    found: dict[float, dict[int, Mapping[str, Any]]] = {}
    for rate, row in search.rows[name].items():
        assert row.cfg is not None
        cells = {seed: cell_of(row, seed, folder) for seed in seeds}
        scored = {
            seed: read_json(cell.folder / row.cfg.method / "metrics.json")
            for seed, cell in cells.items()
            if cell.state == "done"
        }
        found[rate] = {seed: metrics["student"] for seed, metrics in scored.items() if metrics}
    return found


def later(table: Table, seeds: Sequence[int], folder: Path) -> int:
    """How many cells come when the rates are chosen."""
    if table.search is None:
        return 0
    open_rows = [name for name in table.search.trained if chosen_rate(table.search, name, folder) is None]
    return len(open_rows) * len(set(seeds) - set(table.search.seeds))


def refuse_foreign_table(table: Table, folder: Path) -> None:
    """ValueError for a TABLE.md or TABLE.json that this command did not write. A damaged JSON file is made again."""
    figures = folder / f"{table.name}.json"
    text = figures.with_suffix(".md")
    if foreign_json(figures, {"question", "seeds", "rows"}):
        raise ValueError(f"{figures} exists, and `t2sda tables` did not write it: pass another --output.")
    other = (read_json(figures) or {}).get("question", table.question)
    if table.name in ("fair", "labels") and other != table.question:
        raise ValueError(f"{figures} is of another config ({other!r}): pass another --output.")
    # Earlier releases wrote the Markdown first, and may have been ended after it.
    if text.exists() and not figures.exists() and not text.read_bytes().startswith(table.question.encode()):
        raise ValueError(f"{text} exists, and `t2sda tables` did not write it: pass another --output.")


def cell_of(row: Row, seed: int, folder: Path) -> Cell:
    """The cell's folder is named by what its config changes, so a new key of the config moves no finished cell."""
    cfg = row.cfg
    assert cfg is not None
    changed = {
        key: value
        for key, (_, value) in differences(FIRST_RELEASE, asdict(cfg)).items()
        if (changes(key) != "nothing" or key in COUNTED) and key != "seed"
    }
    if any(domain.path.startswith("streets-") for domain in (*cfg.sources, *cfg.targets, *cfg.tests)):
        changed["scenes"] = SCENES
    number = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]
    return Cell(row, seed, folder / number / f"seed_{seed}")


def score(cell: Cell, table: Table) -> list[float | None] | None:
    """The cell's scores in %, in the order of the table; None if it is not finished."""
    if cell.state != "done":
        return None
    cfg = cell.row.cfg
    assert cfg is not None
    if table.evaluate:
        evaluated = cell.folder / f"{table.name}.json"
        result = read_json(evaluated)
        if not result:
            return None
    else:
        summary = read_json(cell.folder / "summary.json")[cfg.method]
        result = {"miou": summary["miou"], "iou": dict(zip(cfg.classes, summary["iou"], strict=True))}
    values: list[float | None] = []
    for name in table.scores:
        members = [known for known in SUBSETS.get(name, (name,)) if known in result["iou"]]
        values.append(result["miou"] if name == "mIoU" else subset_miou(result, members) if members else None)
    return values


@contextmanager
def alone(cell: Cell, runner: Runner) -> Iterator[None]:
    """Inside, no other call makes this cell: one that does is waited for."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    waits = False
    while not runner.stopped_by:
        try:
            lock = locked(cell.folder.with_name(f".{cell.folder.name}.lock"), timeout=1)
        except Timeout:
            if not waits:
                print(f"waiting for another call that makes {os.path.relpath(cell.folder)}", flush=True)
            waits = True
            continue
        try:
            yield
        finally:
            lock.release()
        return
    yield  # nothing is started any more


def make_cell(cell: Cell, table: Table, runner: Runner, launch_words: Sequence[str]) -> int:
    """Train, go on with, or score one cell; the exit code."""
    if cell.state != "done":
        with alone(cell, runner):
            code = 0 if cell.state == "done" else train_cell(cell, runner, launch_words)
        if code:
            return code
    evaluated = cell.folder / f"{table.name}.json"
    if table.evaluate and not read_json(evaluated):
        for file in (evaluated, evaluated.with_suffix(".csv")):  # what an interrupted write left
            file.unlink(missing_ok=True)
        assert cell.row.cfg is not None
        model = cell.folder / cell.row.cfg.method / "student"
        return runner.t2sda("evaluate", str(model), *table.evaluate, "--output", str(evaluated), *launch_words)
    return 0


def train_cell(cell: Cell, runner: Runner, launch_words: Sequence[str]) -> int:
    # Where a run stops early it leaves checkpoints, and "auto" also starts one that has none.
    own = f"--seed={cell.seed}", f"--output_dir={cell.folder}", "--resume=auto"
    return runner.t2sda("train", "--config", str(cell.row.config), *cell.row.arguments, *own, *launch_words)


def summary_of(table: Table, seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """One entry per row and score: label, values by seed, mean, sd (sample), n, and the paper's mean and sd.

    Raises:
        ValueError: if cells that have the same test in their config were scored on different images or label maps.
    """
    entries = []
    scored_on: dict[str, set[str | None]] = {}
    for row in table.rows:
        scores = {}
        if row.cfg is not None:
            cells = [cell_of(row, seed, folder) for seed in seeds]
            scores = {cell.seed: score(cell, table) for cell in cells}
            scored_on.setdefault(repr((row.cfg.test, row.cfg.classes)), set()).update(
                _scored_on(cell, table) for cell in cells
            )
        for position, name in enumerate(table.scores):
            values = {seed: found[position] for seed, found in scores.items() if found is not None}
            mean, sd = row.paper[position]
            entry: dict[str, Any] = {"label": list(row.label), "score": name, "quoted": row.config is None}
            entry |= {"values": values} | spread(list(values.values())) | {"paper_mean": mean, "paper_sd": sd}
            entries.append(entry)
    if any(len(found - {None}) > 1 for found in scored_on.values()):
        raise ValueError(DIFFERENT_TESTS)
    return entries


def _scored_on(cell: Cell, table: Table) -> str | None:
    """The test images and label maps of a cell's scores; None if nothing says which."""
    if table.evaluate:
        return ((read_json(cell.folder / f"{table.name}.json") or {}).get("inputs") or {}).get("data")
    return (read_json(cell.folder / "summary.json") or {}).get("test_data")


def layout(table: Table, entries: Sequence[Mapping[str, Any]]) -> str:
    """The table in the paper's layout; for every score ours, with the number of seeds, and the paper's."""

    def ours(entry: Mapping[str, Any]) -> str:
        if entry["quoted"] or entry["mean"] is None:
            return "quoted" if entry["quoted"] else "–"
        spread_text = "" if entry["sd"] is None else f" ± {entry['sd']:.2f}"
        return f"{entry['mean']:.2f}{spread_text} ({entry['n']})"

    def papers(entry: Mapping[str, Any]) -> str:
        mean, sd = entry["paper_mean"], entry["paper_sd"]
        return "–" if mean is None else f"{mean:.1f}{'' if sd is None else f' ± {sd:.1f}'}"

    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [("ours (seeds)", ours)]
    if any(entry["paper_mean"] is not None for entry in entries):
        columns.append(("paper", papers))
    per_row = len(table.scores)
    lines = [[*table.labels, *(f"{name}, {column}" for name in table.scores for column, _ in columns)]]
    for position in range(0, len(entries), per_row):
        of_row = entries[position : position + per_row]
        lines.append([*of_row[0]["label"], *(told(entry) for entry in of_row for _, told in columns)])
    if table.across:
        lines = [list(column) for column in zip(*lines, strict=True)]
    text = markdown(lines[0], lines[1:])
    if table.reference is None:
        return text
    of_first = {tuple(entry["label"]): _scored(entry) for entry in entries[::per_row]}
    others = of_first.pop(table.reference)
    compared = [
        f"- {' | '.join(label)}: {paired_difference(values, others)}"
        for label, values in of_first.items()
        if len(values.keys() & others.keys()) > 1
    ]
    said = f"{table.scores[0]} minus that of {' | '.join(table.reference)}, seed by seed:"
    return "\n".join([text, "", said, "", *compared]) if compared else text


def _scored(entry: Mapping[str, Any]) -> dict[int, float]:
    """The values of a row by seed, without those that are undefined."""
    return {seed: value for seed, value in entry["values"].items() if value is not None}


def estimate(table: Table, folder: Path) -> tuple[float, int]:
    """Seconds of one run, and the number of finished runs that says so; 0: a figure of the past, or a count."""
    found = [read_json(file) for file in folder.glob("*/seed_*/summary.json")]
    done = [summary["seconds"] for summary in found if summary]
    if done:
        return sum(done) / len(done), len(done)
    if table.name not in ("fair", "labels"):
        return SECONDS[folder.name], 0
    assert table.search is not None
    cfg = next(row.cfg for name, rows in table.search.rows.items() if name.startswith("t2sda") for row in rows.values())
    assert cfg is not None
    cfg = without_data(cfg)
    if cfg.train.num_threads is not None:
        torch.set_num_threads(cfg.train.num_threads)
    return ABOVE_BOUND * count_update(cfg).seconds(this_machine(), cfg.train.precision) * cfg.train.max_steps, 0


def plan_text(table: Table, cells: Sequence[Cell], later: int, each: float, measured: int) -> str:
    lines = [f"{table.name}: {table.question}"]
    for cell in cells:
        where = os.path.relpath(cell.folder)
        time = "" if cell.state == "done" else f", about {each / 60:.0f} min"
        lines.append(f"  {' | '.join(cell.row.label)}  seed {cell.seed}: {cell.state}{time}  {where}")
    if later:
        lines.append(f"  and {later} runs at the learning rates that will be the best")
    left = len({cell.folder for cell in cells if cell.state != "done"}) + later
    source = f"the mean of {measured} finished runs" if measured else "a rough figure, nothing is measured yet"
    lines.append(f"  {left} runs to make, about {left * each / 3600:.1f} h ({source})")
    return "\n".join(lines)


def write(table: Table, seeds: Sequence[int], folder: Path) -> str:
    """TABLE.md and TABLE.json as far as there are cells; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"table": table.name, "question": table.question, "seeds": list(seeds)}
    if table.search is None:
        content["rows"] = summary_of(table, seeds, folder)
        text = layout(table, content["rows"])
    else:
        search, wanted = table.search, sorted({*seeds, *table.search.seeds})
        content["absent"] = search.absent
        results = {name: results_of(search, name, wanted, folder) for name in search.rows}
        if table.name == "fair":
            content |= figures(results, search.seeds, seeds)
            text = fair_text(content)
        else:
            content |= figures_over_labels(results, search.seeds, seeds)
            text = label_curve_text(content)
            curve = {
                title: {number: content["rows"][f"{name} {number}"] for number in content["numbers"]}
                for name, title in LABELLED_ROWS.items()
            }
            save_steps(folder / "labels.png", curve, "labelled images of the target", "mIoU in %")
        text = "\n\n".join([text, *said_of_absent(search.absent)])
    write_json(folder / f"{table.name}.json", content)  # first: by it the other is known as ours
    write_text(folder / f"{table.name}.md", f"{table.question}\n\n{text}\n")
    return text
