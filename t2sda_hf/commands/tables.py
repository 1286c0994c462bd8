"""Make a table of the paper: train the cells that are missing, and print our figures beside the paper's.

    t2sda tables table07 --seeds 0..2 --scale demo
    t2sda tables table07 table08 --scale camvid --dry-run
    t2sda tables table12 --train.max_steps 400 --num_processes 2

TABLE is one of table02 ... table17, or the path of your own file with the same form as those in configs/ablations/.

A cell is one row of the table with one seed, and it is one run of `t2sda train`. It is stored in
outputs/ablations/SCALE/, in a folder whose name is a number computed from its config. So a run that belongs to several
tables is trained only once. If you change the config of a row, this makes a new cell.

A finished cell is not trained again. A cell that was interrupted continues from its checkpoint. Every key of a config
is also a flag, and applies to every cell of this call. After Ctrl-C or SIGTERM the running cell first writes its
checkpoint.

The files TABLE.md and TABLE.json are written beside the cells. They have the mean and sd (sample standard deviation)
over the seeds.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import RECIPES, RunConfig, changes, differences, find_recipe, load_config, read_yaml
from ..evaluation.table import CLASS_SETS, markdown, spread, subset_miou
from ..labels import THING_CLASSES
from ..launching import Runner, refuse_keys, words_of
from ..storage import foreign_json, read_json, write_json, write_text

# One run of the base config, until there are cells to measure: two CPU cores for the first two; a GPU of 2019 for
# "paper" (DAFormer's 16 hours, times 1.45 for the two more passes of T2S-DA).
SECONDS = {"demo": 120, "camvid": 3600, "paper": 16 * 3600 * 1.45}
# The nine rarest classes of Cityscapes: their mean is the paper's "tail" (Table 9).
TAIL = ("wall", "traffic light", "traffic sign", "rider", "truck", "bus", "train", "motorcycle", "bicycle")
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
    tables = [read_table(name, args.scale, args.overrides) for name in args.tables]
    folder = args.output.resolve() / args.scale
    for table in tables:
        if not args.dry_run:
            refuse_foreign_table(table, folder)
    failed: list[str] = []
    with Runner() as runner:
        for table in tables:
            # Seed after seed, so that an early look shows every row.
            runnable = [row for row in table.rows if row.config is not None]
            cells = [cell_of(row, seed, folder) for seed in args.seeds for row in runnable]
            if args.dry_run:
                print(plan_text(table, cells, *estimate(folder, args.scale)))
                continue
            for cell in cells:
                code = make_cell(cell, table, runner, words_of(args))
                if code:
                    failed.append(f"{table.name} {' | '.join(cell.row.label)} seed {cell.seed}: exit code {code}")
                    print(f"failed: {failed[-1]}", file=sys.stderr)
                write(table, args.seeds, folder)
            print(f"\n{table.name}: {table.question}\n\n{write(table, args.seeds, folder)}")
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
class Table:
    name: str
    question: str
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    across: bool  # rows stand as columns in the paper
    evaluate: tuple[str, ...]  # words of `t2sda evaluate`, if the score is not the run's own
    rows: tuple[Row, ...]


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


def read_table(name: str, scale: str, overrides: Sequence[str] = ()) -> Table:
    """A table at one scale, with every row's config checked.

    Raises:
        ValueError: for an unknown table, a scale it does not have, or a row whose config is not valid.
    """
    known = sorted(file.stem for file in (RECIPES / "ablations").glob("*.yaml"))
    path = find_recipe(name, "ablations", known)
    content = read_yaml(path)
    missing = [name for name in ("question", "labels", "scores", "base", "rows") if not content.get(name)]
    if missing or not isinstance(content["base"], dict) or not isinstance(content["rows"], list):
        raise ValueError(
            f"{path} is no table: it needs {', '.join(missing) or 'base by scale, and a list of rows'}. "
            f"{known[0]} is one."
        )
    if scale not in content["base"]:
        raise ValueError(f"{path.stem} has no scale {scale!r}: it has {', '.join(content['base'])}.")
    if "evaluate" in content and scale not in content["evaluate"]:
        raise ValueError(f"{path.stem} does not say what to evaluate at scale {scale!r}.")
    rows = []
    for number, entry in enumerate(content["rows"], 1):
        paper = entry.get("paper") if isinstance(entry, dict) else None
        if not isinstance(paper, list) or len(paper) != len(content["scores"]) or not all(map(bool, paper)):
            raise ValueError(f"row {number} of {path} needs under paper one list for each of {content['scores']}.")
        if not {"label", "set"} <= entry.keys() and not entry.get("quoted"):
            raise ValueError(f"row {number} of {path} needs label and set, or quoted.")
        config: str | None = None
        cfg: RunConfig | None = None
        arguments: tuple[str, ...] = ()
        if not entry.get("quoted"):
            config = (content["base"] | entry.get("base", {}))[scale]
            changed = entry["set"] | entry.get("set_at", {}).get(scale, {})
            texts = (f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changed.items())
            arguments = (*texts, "--baseline=none", *overrides)
            cfg = load_config(config, arguments)
            named = cfg.translate.trained.architecture
            if named != load_config(config, overrides).translate.trained.architecture:
                raise ValueError(f"row {number} of {path} names code to run, {named!r}, which no file may do.")
        cells = tuple((cell[0], cell[1] if len(cell) > 1 else None) for cell in paper)
        rows.append(Row(tuple(entry["label"]), cells, config, arguments, cfg))
    return Table(
        path.stem,
        content["question"],
        tuple(content["labels"]),
        tuple(content["scores"]),
        content.get("across", False),
        tuple(str(word) for word in content.get("evaluate", {}).get(scale, ())),
        tuple(rows),
    )


def refuse_foreign_table(table: Table, folder: Path) -> None:
    """ValueError for a TABLE.md or TABLE.json that this command did not write. A damaged JSON file is made again."""
    figures = folder / f"{table.name}.json"
    text = figures.with_suffix(".md")
    if foreign_json(figures, {"question", "seeds", "rows"}):
        raise ValueError(f"{figures} exists, and `t2sda tables` did not write it: pass another --output.")
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
    subsets = {"mIoU16": CLASS_SETS["syn16"], "mIoU13": CLASS_SETS["syn13"], "tail": TAIL}
    values: list[float | None] = []
    for name in table.scores:
        members = [known for known in subsets.get(name, ()) if known in result["iou"]]
        values.append(result["miou"] if name == "mIoU" else subset_miou(result, members) if members else None)
    return values


def make_cell(cell: Cell, table: Table, runner: Runner, launch_words: Sequence[str]) -> int:
    """Train, go on with, or score one cell; the exit code."""
    if cell.state != "done":
        # Where a run stops early it leaves checkpoints, and "auto" also starts one that has none.
        own = f"--seed={cell.seed}", f"--output_dir={cell.folder}", "--resume=auto"
        code = runner.t2sda("train", "--config", str(cell.row.config), *cell.row.arguments, *own, *launch_words)
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


def summary_of(table: Table, seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """One entry per row and score: label, values by seed, mean, sd (sample), n, and the paper's mean and sd."""
    entries = []
    for row in table.rows:
        scores = {}
        if row.config is not None:
            scores = {seed: score(cell_of(row, seed, folder), table) for seed in seeds}
        for position, name in enumerate(table.scores):
            values = {seed: found[position] for seed, found in scores.items() if found is not None}
            mean, sd = row.paper[position]
            entry: dict[str, Any] = {"label": list(row.label), "score": name, "quoted": row.config is None}
            entry |= {"values": values} | spread(list(values.values())) | {"paper_mean": mean, "paper_sd": sd}
            entries.append(entry)
    return entries


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

    per_row = len(table.scores)
    lines = [[*table.labels, *(word for name in table.scores for word in (f"{name}, ours (seeds)", f"{name}, paper"))]]
    for position in range(0, len(entries), per_row):
        line = list(entries[position]["label"])
        for entry in entries[position : position + per_row]:
            line += [ours(entry), papers(entry)]
        lines.append(line)
    if table.across:
        lines = [list(column) for column in zip(*lines, strict=True)]
    return markdown(lines[0], lines[1:])


def estimate(folder: Path, scale: str) -> tuple[float, int]:
    """Seconds of one run, and the number of finished runs that says so (0: a figure of the past)."""
    found = [read_json(file) for file in folder.glob("*/seed_*/summary.json")]
    done = [summary["seconds"] for summary in found if summary]
    return (sum(done) / len(done), len(done)) if done else (SECONDS[scale], 0)


def plan_text(table: Table, cells: Sequence[Cell], each: float, measured: int) -> str:
    lines = [f"{table.name}: {table.question}"]
    for cell in cells:
        where = os.path.relpath(cell.folder)
        time = "" if cell.state == "done" else f", about {each / 60:.0f} min"
        lines.append(f"  {' | '.join(cell.row.label)}  seed {cell.seed}: {cell.state}{time}  {where}")
    left = len({cell.folder for cell in cells if cell.state != "done"})
    source = f"the mean of {measured} finished runs" if measured else "a rough figure, nothing is measured yet"
    lines.append(f"  {left} runs to make, about {left * each / 3600:.1f} h ({source})")
    return "\n".join(lines)


def write(table: Table, seeds: Sequence[int], folder: Path) -> str:
    """TABLE.md and TABLE.json as far as there are cells; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = summary_of(table, seeds, folder)
    text = layout(table, entries)
    content = {"table": table.name, "question": table.question, "seeds": list(seeds), "rows": entries}
    write_json(folder / f"{table.name}.json", content)  # first: by it the other is known as ours
    write_text(folder / f"{table.name}.md", f"{table.question}\n\n{text}\n")
    return text
