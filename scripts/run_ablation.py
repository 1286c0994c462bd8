"""Make a table of the paper: train its missing cells, print it with mean, sd and the paper's figure.

    python scripts/run_ablation.py table07 --seeds 0,1,2 --scale demo
    python scripts/run_ablation.py table07 table08 --scale camvid --dry-run
    python scripts/run_ablation.py table12 --set train.max_steps=400 --launch=--num_processes --launch=2

TABLE is a file of configs/ablations/ (or its path). A cell is one row with one seed: a run of scripts/train_uda.py
through accelerate launch, in outputs/ablations/SCALE/ under a number made of its config. So rows that are the
same run in several tables are trained once, and a changed config is another cell. A finished cell is left alone; an
interrupted one goes on where its checkpoint is. Ctrl-C or SIGTERM lets the running cell write its checkpoint.

Written beside the cells: TABLE.md and TABLE.json. Exit code 0; 1 if cells failed (the others were still run); 2 when
the input is at fault; 130 or 143 after a signal.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.evaluation.table import CLASS_SETS, markdown, spread, subset_miou
from t2sda_hf.masking import run_masked

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "configs" / "ablations"
# One run of the base config, until there are cells to measure: two CPU cores for the first two; a GPU of 2019 for
# "paper" (DAFormer's 16 hours, times 1.45 for the two more passes of T2S-DA).
SECONDS = {"demo": 120, "camvid": 3600, "paper": 16 * 3600 * 1.45}
# The nine rarest classes of Cityscapes: their mean is the paper's "tail" (Table 9).
TAIL = ("wall", "traffic light", "traffic sign", "rider", "truck", "bus", "train", "motorcycle", "bicycle")
# Keys that change neither what is learned nor how it is scored.
FREE = ("output_dir", "seed", "baseline", "resume", "allow_changes", "push_to_hub", "data.num_workers", "train.log_")
FREE += ("train.num_threads", "train.save_every", "train.evaluate_every", "train.keep_checkpoints", "train.timeout")


@dataclass(frozen=True)
class Row:
    """One line of a table: `config` and `arguments` make it, None if it is quoted from the paper alone."""

    label: tuple[str, ...]
    paper: tuple[tuple[float | None, float | None], ...]  # (mean, sd) per score
    config: str | None
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    name: str
    question: str
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    across: bool  # rows stand as columns in the paper
    evaluate: tuple[str, ...]  # of scripts/evaluate.py, if the score is not the run's own
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Cell:
    """One run. `folder` is a function of the config, without the seed, the seed, and nothing else."""

    row: Row
    seed: int
    folder: Path

    @property
    def state(self) -> str:
        if (self.folder / "summary.json").is_file():
            return "done"
        return "interrupted" if self.folder.exists() else "missing"


def read_table(name: str, scale: str, overrides: Sequence[str] = ()) -> Table:
    """A table at one scale, with every row's config checked.

    Raises:
        ValueError: for an unknown table, a scale it does not have, or a row whose config is not valid.
    """
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TABLES.glob("*.yaml")))
        raise ValueError(f"there is no table {name!r}. Give a path, or one of {known}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if scale not in content["base"]:
        raise ValueError(f"{path.stem} has no scale {scale!r}: it has {', '.join(content['base'])}.")
    if "evaluate" in content and scale not in content["evaluate"]:
        raise ValueError(f"{path.stem} does not say what to evaluate at scale {scale!r}.")
    rows = []
    for entry in content["rows"]:
        config, arguments = None, ()
        if not entry.get("quoted"):
            config = str(ROOT / (content["base"] | entry.get("base", {}))[scale])
            changes = entry["set"] | entry.get("set_at", {}).get(scale, {})
            texts = (f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items())
            arguments = (*texts, "--baseline=none", *overrides)
            load_config(config, arguments)
        paper = tuple((cell[0], cell[1] if len(cell) > 1 else None) for cell in entry["paper"])
        rows.append(Row(tuple(entry["label"]), paper, config, arguments))
    return Table(
        path.stem,
        content["question"],
        tuple(content["labels"]),
        tuple(content["scores"]),
        content.get("across", False),
        tuple(str(word) for word in content.get("evaluate", {}).get(scale, ())),
        tuple(rows),
    )


def config_of(row: Row) -> RunConfig:
    assert row.config is not None
    return load_config(row.config, row.arguments)


def cell_of(row: Row, seed: int, folder: Path) -> Cell:
    """The cell's folder is named by what its config changes, so a new key of the config moves no finished cell."""
    default, content = (flat(asdict(config)) for config in (RunConfig(), config_of(row)))
    changed = {key: value for key, value in content.items() if default.get(key) != value and not key.startswith(FREE)}
    number = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]
    return Cell(row, seed, folder / number / f"seed_{seed}")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def score(cell: Cell, table: Table) -> list[float | None] | None:
    """The cell's scores in %, in the order of the table; None if it is not finished."""
    if cell.state != "done":
        return None
    cfg = config_of(cell.row)
    if table.evaluate:
        evaluated = cell.folder / f"{table.name}.json"
        if not evaluated.is_file():
            return None
        result = json.loads(evaluated.read_text(encoding="utf-8"))
    else:
        summary = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))[cfg.method]
        result = {"miou": summary["miou"], "iou": dict(zip(cfg.classes, summary["iou"], strict=True))}
    subsets = {"mIoU16": CLASS_SETS["syn16"], "mIoU13": CLASS_SETS["syn13"], "tail": TAIL}
    values: list[float | None] = []
    for name in table.scores:
        members = [known for known in subsets.get(name, ()) if known in result["iou"]]
        values.append(result["miou"] if name == "mIoU" else subset_miou(result, members) if members else None)
    return values


class Runner:
    """Runs one command at a time in a group of its own, and passes signals on to it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped_by = 0

    def __enter__(self) -> "Runner":
        self.before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.stopped_by = number
        if self.child is not None and self.child.poll() is None:
            os.killpg(self.child.pid, number)

    def run(self, command: Sequence[str]) -> int:
        """Exit code of the command; it is not started after a signal."""
        if self.stopped_by:
            return 128 + self.stopped_by
        self.child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        code = self.child.wait()
        while self.stopped_by and _alive(self.child.pid):
            time.sleep(0.1)  # the launcher dies of a signal at once, the run behind it writes its checkpoint first
        return code


def _alive(group: int) -> bool:
    """Whether a process of the group still works (one that ended and was not fetched does not)."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def launch(arguments: Sequence[str], script: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(ROOT / "scripts" / script), *words]


def make_cell(cell: Cell, table: Table, runner: Runner, launch_arguments: Sequence[str]) -> int:
    """Train, go on with, or score one cell; the exit code."""
    if cell.state != "done":
        # Where a run stops early it leaves checkpoints, and "auto" also starts one that has none.
        words = ["--config", str(cell.row.config), *cell.row.arguments, "--seed", str(cell.seed)]
        words += ["--output_dir", str(cell.folder), "--resume", "auto"]
        code = runner.run(launch(launch_arguments, "train_uda.py", *words))
        if code:
            return code
    evaluated = cell.folder / f"{table.name}.json"
    if table.evaluate and not evaluated.is_file():
        model = cell.folder / config_of(cell.row).method / "student"
        return runner.run(
            launch(launch_arguments, "evaluate.py", str(model), *table.evaluate, "--output", str(evaluated))
        )
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
    done = [json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in folder.glob("*/seed_*/summary.json")]
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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas")
    parser.add_argument("--scale", choices=tuple(SECONDS), default="paper")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every cell of this call")
    parser.add_argument("--launch", action="append", default=[], metavar="WORD", help="of accelerate launch")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablations"))
    parser.add_argument("--dry-run", action="store_true", help="list the cells and their estimated time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code, see above."""
    args = parse_arguments(arguments)
    try:
        if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
            raise ValueError(f"--seeds must be whole numbers with commas between them, like 0,1,2; got {args.seeds!r}.")
        seeds = [int(word) for word in args.seeds.split(",")]
        tables = [read_table(name, args.scale, [f"--{change}" for change in args.set]) for name in args.tables]
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    folder = args.output_dir.resolve() / args.scale
    failed: list[str] = []
    with Runner() as runner:
        for table in tables:
            # Seed after seed, so that an early look shows every row.
            runnable = [row for row in table.rows if row.config is not None]
            cells = [cell_of(row, seed, folder) for seed in seeds for row in runnable]
            if args.dry_run:
                print(plan_text(table, cells, *estimate(folder, args.scale)))
                continue
            for cell in cells:
                code = make_cell(cell, table, runner, args.launch)
                if runner.stopped_by:
                    print(
                        f"stopped by signal {runner.stopped_by}; the same command goes on from here.", file=sys.stderr
                    )
                    return 128 + runner.stopped_by
                if code:
                    failed.append(f"{table.name} {' | '.join(cell.row.label)} seed {cell.seed}: exit code {code}")
                    print(f"failed: {failed[-1]}", file=sys.stderr)
                write(table, seeds, folder)
            print(f"\n{table.name}: {table.question}\n\n{write(table, seeds, folder)}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def write(table: Table, seeds: Sequence[int], folder: Path) -> str:
    """TABLE.md and TABLE.json as far as there are cells; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = summary_of(table, seeds, folder)
    text = layout(table, entries)
    (folder / f"{table.name}.md").write_text(f"{table.question}\n\n{text}\n", encoding="utf-8")
    content = {"table": table.name, "question": table.question, "seeds": list(seeds), "rows": entries}
    (folder / f"{table.name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(run_masked(main))
