"""t2sda tables: missing cells only, nothing lost by an interruption, tables as in the paper."""

import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from running import TINY_RUN

from t2sda_hf.cli import main
from t2sda_hf.commands import tables
from t2sda_hf.errors import heard
from t2sda_hf.evaluation.gain import pack
from t2sda_hf.launching import Runner
from t2sda_hf.training.resume import locked

ROWS = """
table: 99
question: Does it print?
labels: [what, how]
scores: [mIoU, tail]
base: {demo: %s}
rows:
  - {label: [plain, "–"], set: {loss_weights.pull: 0}, paper: [[68.3, 0.5], [62.0]]}
  - {label: [pulled, "✓"], set: {}, paper: [[70.0, 0.6], [63.7, 0.8]]}
  - {label: [elsewhere, "–"], quoted: true, paper: [[45.3], [null]]}
  - {label: [pulled again, "✓"], set: {pull.temperature: 0.2}, paper: [[70.0, 0.6], [63.7, 0.8]]}
"""

COMPARED = """
question: Does it compare?
labels: [what]
scores: [mIoU, bus]
base: {demo: %s}
reference: [plain]
rows:
  - {label: [plain], set: {loss_weights.pull: 0}}
  - {label: [pulled], set: {}}
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(TINY_RUN + "baseline: source_only\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(ROWS % (tmp_path / "run.yaml"), encoding="utf-8")
    return str(tmp_path / "mine.yaml")


def value(command: Sequence[str], flag: str) -> str:
    return next(word.removeprefix(f"{flag}=") for word in command if word.startswith(f"{flag}="))


class Trainer:
    """Stands for the processes: "trains" by writing the summary that `t2sda train` would, or fails, or is stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.codes: dict[int, int] = {}  # call number: exit code
        self.stop_at: int | None = None
        trainer = self

        def run(runner: object, command: Sequence[str]) -> int:
            return trainer.call(runner, list(command))

        monkeypatch.setattr(Runner, "run", run)

    def call(self, runner: object, command: list[str]) -> int:
        number = len(self.commands)
        self.commands.append(command)
        folder = Path(value(command, "--output_dir"))
        folder.mkdir(parents=True, exist_ok=True)
        if number == self.stop_at:
            runner.stopped_by = signal.SIGTERM  # type: ignore[attr-defined]
            return 143
        if self.codes.get(number):
            return self.codes[number]
        seed = int(value(command, "--seed"))
        pulled = "--loss_weights.pull=0" not in command
        iou = [10.0 + seed, 20.0, None, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 30.0 + 10 * pulled + seed]
        summary = {"t2sda": {"miou": 40.0 + 2 * seed + 5 * pulled, "iou": iou}, "seconds": 100.0 + 20 * pulled}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return 0


def call(table: str, tmp_path: Path, *arguments: str) -> int:
    return main(["tables", table, "--scale", "demo", "--output", str(tmp_path / "out"), *arguments])


def test_missing_cells_are_trained_as_they_are_to_be_launched_and_once(table, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    assert call(table, tmp_path, "--seeds", "0,1", "--num_processes", "2", "--cpu") == 0
    assert len(trainer.commands) == 4  # 2 seeds x 2 runs: the last row is the second one, and one is quoted
    for command in trainer.commands:
        assert command[:4] == [sys.executable, "-m", "t2sda_hf", "train"]
        assert "--baseline=none" in command
        assert command[-3:] == ["--resume=auto", "--num_processes=2", "--cpu"]
    assert [value(command, "--seed") for command in trainer.commands] == ["0", "0", "1", "1"]
    assert len({value(command, "--output_dir") for command in trainer.commands}) == 4
    first = capsys.readouterr().out
    assert call(table, tmp_path, "--seeds", "0,1") == 0
    assert len(trainer.commands) == 4
    assert capsys.readouterr().out == first
    assert call(table, tmp_path, "--seeds", "0,1,2") == 0
    assert len(trainer.commands) == 6


def unaligned(text: str) -> str:
    """Tables in a text without the blanks and colons that align their columns."""
    return re.sub(r"(?<=\| ):?-+:?(?= \|)", "---", re.sub(r"(?<=\|) +| +(?=\|)", " ", text))


def test_the_table_has_mean_sample_deviation_and_the_papers_figure(table, tmp_path, monkeypatch, capsys):
    Trainer(monkeypatch)
    assert call(table, tmp_path, "--seeds", "0,1,2") == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [unaligned(line) for line in lines] == [
        "| what | how | mIoU, ours (seeds) | mIoU, paper | tail, ours (seeds) | tail, paper |",
        "| --- | --- | --- | --- | --- | --- |",
        # mIoU 40, 42, 44; the tail are sign and bus: (50 + 30 + seed) / 2
        "| plain | – | 42.00 ± 2.00 (3) | 68.3 ± 0.5 | 40.50 ± 0.50 (3) | 62.0 |",
        "| pulled | ✓ | 47.00 ± 2.00 (3) | 70.0 ± 0.6 | 45.50 ± 0.50 (3) | 63.7 ± 0.8 |",
        "| elsewhere | – | quoted | 45.3 | quoted | – |",
        "| pulled again | ✓ | 47.00 ± 2.00 (3) | 70.0 ± 0.6 | 45.50 ± 0.50 (3) | 63.7 ± 0.8 |",
    ]
    written = (tmp_path / "out" / "demo" / "mine.md").read_text(encoding="utf-8")
    assert written == "Does it print?\n\n" + "\n".join(lines) + "\n"
    content = json.loads((tmp_path / "out" / "demo" / "mine.json").read_text(encoding="utf-8"))
    assert content["rows"][0] == {
        "label": ["plain", "–"],
        "score": "mIoU",
        "quoted": False,
        "values": {"0": 40.0, "1": 42.0, "2": 44.0},
        "mean": 42.0,
        "sd": 2.0,
        "sd_population": pytest.approx((8 / 3) ** 0.5),
        "n": 3,
        "paper_mean": 68.3,
        "paper_sd": 0.5,
    }


def test_rows_stand_as_columns_where_the_paper_has_them_so(table, tmp_path, monkeypatch, capsys):
    Path(table).write_text(Path(table).read_text(encoding="utf-8") + "across: true\n", encoding="utf-8")
    Trainer(monkeypatch)
    assert call(table, tmp_path, "--seeds", "0") == 0
    lines = [line for line in unaligned(capsys.readouterr().out).splitlines() if line.startswith("|")]
    assert lines[0] == "| what | plain | pulled | elsewhere | pulled again |"
    assert lines[2] == "| how | – | ✓ | – | ✓ |"
    assert lines[3] == "| mIoU, ours (seeds) | 40.00 (1) | 45.00 (1) | quoted | 45.00 (1) |"
    assert lines[4] == "| mIoU, paper | 68.3 ± 0.5 | 70.0 ± 0.6 | 45.3 | 70.0 ± 0.6 |"


def test_rows_are_compared_with_one_of_them_seed_by_seed(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(TINY_RUN + "baseline: source_only\n", encoding="utf-8")
    own = tmp_path / "own.yaml"
    own.write_text(COMPARED % (tmp_path / "run.yaml"), encoding="utf-8")
    Trainer(monkeypatch)
    assert call(str(own), tmp_path, "--seeds", "0,1,2") == 0
    printed = unaligned(capsys.readouterr().out)
    assert "| what | mIoU, ours (seeds) | bus, ours (seeds) |\n" in printed  # nobody's paper has figures
    assert "| plain | 42.00 ± 2.00 (3) | 31.00 ± 1.00 (3) |" in printed
    text = "mIoU minus that of plain, seed by seed:\n\n- pulled: +5.00 [+5.00, +5.00] (95% interval, n = 3): higher"
    assert text in printed
    assert call(str(own), tmp_path / "one", "--seeds", "0") == 0
    assert "minus" not in capsys.readouterr().out  # one seed has no interval
    own.write_text(own.read_text(encoding="utf-8").replace("[plain]\nrows", "[plane]\nrows"), encoding="utf-8")
    assert call(str(own), tmp_path, "--seeds", "0") == 2
    assert "must have one row, not quoted, with the label of its reference, ['plane']" in capsys.readouterr().err
    own.write_text(COMPARED.replace("bus]", "buss]") % (tmp_path / "run.yaml"), encoding="utf-8")
    assert call(str(own), tmp_path, "--seeds", "0") == 2
    assert "asks for scores that none of its rows has: buss" in capsys.readouterr().err


def test_a_score_that_is_undefined_is_compared_with_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(TINY_RUN + "baseline: source_only\n", encoding="utf-8")
    own = tmp_path / "own.yaml"
    own.write_text((COMPARED % (tmp_path / "run.yaml")).replace("[mIoU, bus]", "[NOWHERE, mIoU]"), encoding="utf-8")
    Trainer(monkeypatch)
    classes = tables.read_table("pull", "demo").rows[0].cfg.classes
    own.write_text(own.read_text(encoding="utf-8").replace("NOWHERE", classes[2]), encoding="utf-8")  # its IoU is None
    assert call(str(own), tmp_path, "--seeds", "0,1,2") == 0
    assert "minus" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pull", "small_data"])
@pytest.mark.parametrize("scale", ["demo", "camvid"])
def test_tables_of_small_data_have_one_run_for_each_row(name, scale, tmp_path):
    rows = tables.read_table(name, scale).rows
    assert len({tables.cell_of(row, 0, tmp_path).folder for row in rows}) == len(rows) > 10


def test_dry_run_lists_cells_and_time_and_makes_nothing(table, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    assert call(table, tmp_path, "--seeds", "0", "--dry-run") == 0
    assert trainer.commands == []
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "plain | –  seed 0: missing, about 2 min" in text
    assert "2 runs to make, about 0.1 h (a rough figure, nothing is measured yet)" in text
    assert call(table, tmp_path, "--seeds", "0") == 0
    assert call(table, tmp_path, "--seeds", "0,1", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "plain | –  seed 0: done  " in text
    assert "plain | –  seed 1: missing, about 2 min" in text  # 100 and 120 seconds were measured
    assert "2 runs to make, about 0.1 h (the mean of 2 finished runs)" in text


def test_an_interruption_loses_nothing(table, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    trainer.stop_at = 1
    assert call(table, tmp_path, "--seeds", "0,1") == 143
    assert len(trainer.commands) == 2
    assert "the same command goes on from here" in capsys.readouterr().err
    call(table, tmp_path, "--seeds", "0,1", "--dry-run")
    assert re.findall(r"seed \d: (\w+)", capsys.readouterr().out) == ["done"] + ["interrupted"] * 2 + ["missing"] * 3
    trainer.stop_at = None
    assert call(table, tmp_path, "--seeds", "0,1") == 0
    assert len(trainer.commands) == 5
    assert trainer.commands[2] == trainer.commands[1]  # the interrupted one first, by the same command


def test_cut_files_are_made_again_and_foreign_ones_refused(table, tmp_path, monkeypatch, capsys):
    trainer, out = Trainer(monkeypatch), tmp_path / "out" / "demo"
    assert call(table, tmp_path, "--seeds", "0") == 0
    summary, figures, text = next(out.rglob("summary.json")), out / "mine.json", out / "mine.md"
    whole, table_before = summary.read_text(), text.read_text()
    for cut in ("", whole[:20], "{}"):
        summary.write_text(cut)
        figures.write_text(cut if cut != "{}" else "{")
        assert call(table, tmp_path, "--seeds", "0") == 0
        assert (summary.read_text(), text.read_text()) == (whole, table_before)
    assert len(trainer.commands) == 2 + 3
    figures.unlink()  # an earlier release wrote the Markdown first
    assert call(table, tmp_path, "--seeds", "0") == 0
    figures.unlink()
    text.write_text("my notes")
    assert call(table, tmp_path, "--seeds", "0") == 2
    assert "mine.md exists, and `t2sda tables` did not write it" in capsys.readouterr().err
    text.unlink()
    figures.write_text('{"table": "of mine"}')
    assert call(table, tmp_path, "--seeds", "0") == 2
    assert (text.exists(), figures.read_text()) == (False, '{"table": "of mine"}')


def test_a_failed_cell_does_not_keep_the_others_from_running(table, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    trainer.codes = {0: 2}
    assert call(table, tmp_path, "--seeds", "0") == 1
    printed = capsys.readouterr()
    assert "failed: mine plain | – seed 0: exit code 2" in printed.err
    assert "| plain | – | – | 68.3 ± 0.5 |" in unaligned(printed.out)
    assert "| pulled | ✓ | 45.00 (1) |" in unaligned(printed.out)


def test_cells_follow_the_config_and_nothing_else(table, tmp_path):
    def folders(*overrides: str) -> list[Path]:
        rows = tables.read_table(table, "demo", overrides).rows
        return [tables.cell_of(row, 0, tmp_path).folder for row in rows if row.config]

    plain, pulled, again = folders()
    assert pulled == again != plain
    assert folders("--train.log_every=7", "--output_dir=elsewhere", "--seed=5", "--train.num_threads=2") == folders()
    assert not set(folders("--train.max_steps=7")) & set(folders())
    assert tables.cell_of(tables.read_table(table, "demo").rows[0], 3, tmp_path).folder == plain.parent / "seed_3"


def test_scores_can_be_those_of_another_domain(table, tmp_path, monkeypatch, capsys):
    evaluate = "evaluate:\n  demo: [--domain, streets-source, --split, validation]\n"
    Path(table).write_text(Path(table).read_text(encoding="utf-8") + evaluate, encoding="utf-8")
    trainer = Trainer(monkeypatch)
    train = trainer.call

    def run(runner: object, command: list[str]) -> int:
        if "evaluate" not in command:
            return train(runner, command)
        assert command[4].endswith("t2sda/student")
        assert command[5:9] == ["--domain", "streets-source", "--split", "validation"]
        Path(command[-1]).write_text(json.dumps({"miou": 81.0, "iou": {"bus": 70.0, "road": 99.0}}), encoding="utf-8")
        return 0

    trainer.call = run  # type: ignore[method-assign]
    assert call(table, tmp_path, "--seeds", "0") == 0
    assert "| plain | – | 81.00 (1) | 68.3 ± 0.5 | 70.00 (1) | 62.0 |" in unaligned(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "other", "place"),
    [
        ("scores: [mIoU, tail]", "scores: 5", "scores"),
        ("base: {demo: %s}", "base: {demo: [5]}", "base.demo"),
        ("set: {loss_weights.pull: 0}", "set: 5", "rows.1.set"),
        ("set: {}, paper", "set: {}, set_at: [1], paper", "rows.2.set_at"),
        ("[[68.3, 0.5], [62.0]]", "[5]", "rows.1.paper"),
        ("set: {}, paper", "set: {}, papr: 5, paper", "rows.2.papr is no key"),
        ("question: Does it print?", "", "question is missing"),
        ('label: [plain, "–"]', "label: plain", "rows.1.label"),
        ("table: 99", 'evaluate: {demo: "--limit 2"}', "evaluate.demo"),
        ("table: 99", "evaluate: [demo]", "evaluate"),
    ],
)
def test_a_file_that_is_no_table_is_told_where(table, tmp_path, monkeypatch, capsys, line, other, place):
    trainer = Trainer(monkeypatch)
    text = Path(table).read_text(encoding="utf-8").replace(str(tmp_path / "run.yaml"), "%s")
    assert line in text
    Path(table).write_text(text.replace(line, other).replace("%s", str(tmp_path / "run.yaml")), encoding="utf-8")
    assert call(table, tmp_path) == 2
    said = capsys.readouterr().err
    assert f"mine.yaml is no table: {place}" in said
    assert trainer.commands == []


@pytest.mark.parametrize("key", ["seed", "output_dir", "resume"])
def test_no_row_sets_what_the_command_sets_for_each_cell(table, tmp_path, monkeypatch, capsys, key):
    trainer = Trainer(monkeypatch)
    text = Path(table).read_text(encoding="utf-8")
    Path(table).write_text(text.replace("set: {}", f"set: {{{key}: 1}}"), encoding="utf-8")
    assert call(table, tmp_path, "--dry-run") == 2
    assert f"row 2 of {table} sets {key}, which the command sets for each cell." in capsys.readouterr().err
    assert trainer.commands == []


def test_a_table_is_not_called_like_a_file_of_its_cells(table, tmp_path, monkeypatch, capsys):
    Trainer(monkeypatch)
    other = Path(table).rename(Path(table).with_name("summary.yaml"))
    assert call(str(other), tmp_path) == 2
    assert "needs another name" in capsys.readouterr().err


def test_scores_on_other_images_are_not_averaged(table, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    train = trainer.call

    def on(data):
        def run(runner: object, command: list[str]) -> int:
            code = train(runner, command)
            summary = Path(value(command, "--output_dir")) / "summary.json"
            summary.write_text(json.dumps(json.loads(summary.read_text()) | {"test_data": data}), encoding="utf-8")
            return code

        return run

    trainer.call = on("first")  # type: ignore[method-assign]
    assert call(table, tmp_path, "--seeds", "0") == 0
    trainer.call = on("second")  # type: ignore[method-assign]
    assert call(table, tmp_path, "--seeds", "0,1") == 2
    assert "scored on different test images or label maps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table99"], "'table99' does not exist"),
        (["table03", "--scale", "demo"], "table03 has no scale 'demo': it has paper"),
        (["table08", "--seeds", "0, a"], "a list like 0,3,7 of different seeds, got '0, a'"),
        (["table08", "--set", "pull.temprature=1"], "pull.temperature"),
        (["table08", "--set", "pull.temperature=-1"], "must be at least 0.001"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    assert main(["tables", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert trainer.commands == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_run_behind_the_launcher_and_is_waited_for(tmp_path, number):
    """The launcher dies at once; the run behind it, in the same group, takes its time to write what it has."""
    written = tmp_path / "checkpoint"
    behind = f"""
import os, pathlib, signal, sys
def save(number, frame):
    pathlib.Path({str(written)!r}).write_text("saved")
    sys.exit(128 + number)
signal.signal({int(number)}, save)
os.kill({{tester}}, {int(number)})
while True:
    signal.pause()
"""
    launcher = f"""
import os, subprocess, sys
behind = {behind!r}.replace("{{tester}}", str(os.getppid()))
subprocess.Popen([sys.executable, "-c", behind]).wait()
"""
    before = signal.getsignal(number)
    with Runner() as runner:
        assert runner.run([sys.executable, "-c", launcher]) != 0
        assert runner.stopped_by == number
        assert written.read_text() == "saved"
        assert runner.run([sys.executable, "-c", "raise SystemExit(0)"]) == 128 + number  # nothing is started any more
    assert signal.getsignal(number) == before


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Runner() as runner:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert runner.run([sys.executable, "-S", "-c", "raise SystemExit(7)"]) == 7
        assert signal.SIGHUP not in heard()
        assert signal.SIGTERM in heard()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_cell_for_real(table, tmp_path, capsys):
    """In a process of its own, with a finished run at the end of it."""
    (tmp_path / "one.yaml").write_text(
        (ROWS % (tmp_path / "run.yaml")).split("  - {label: [pulled,")[0], encoding="utf-8"
    )
    arguments = ["--seeds", "3", "--cpu", "--num_processes=1", "--set", "train.max_steps=1"]
    assert call(str(tmp_path / "one.yaml"), tmp_path, *arguments) == 0
    (summary,) = (tmp_path / "out").rglob("summary.json")
    assert summary.parent.name == "seed_3"
    miou = json.loads(summary.read_text(encoding="utf-8"))["t2sda"]["miou"]
    assert f"| plain | – | {miou:.2f} (1) | 68.3 ± 0.5 |" in unaligned(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- the table "fair"


def kind(command: Sequence[str]) -> str:
    """The row of the table that a command is of."""
    method = next((word.removeprefix("--method=") for word in command if word.startswith("--method=")), "t2sda")
    return "self_training" if method == "t2sda" and "--loss_weights.pull=0" in command else method


class FairTrainer(Trainer):
    """Its runs score, in %, level + seed on both halves at the rate of their row, and less at the others."""

    LEVEL: ClassVar = {"source_only": 20, "self_training": 30, "t2sda": 40, "target_only": 60}
    RATE: ClassVar = {"source_only": 0.1, "self_training": 0.2, "t2sda": 0.3, "target_only": 0.2}

    def call(self, runner: object, command: list[str]) -> int:
        code = super().call(runner, command)
        if code:
            return code
        row, seed = kind(command), int(value(command, "--seed"))
        iou = self.level(row, command) + seed - 5 * (float(value(command, "--optim.lr")) != self.RATE[row])
        pixels = np.full((4, 2, 10), 100)
        pixels[:, 0] = iou
        method = "t2sda" if row == "self_training" else row
        student = {"domain": "test", "num_images": 4, "miou": iou, "groups": pack(pixels), "inputs": {"data": "d"}}
        student["iou"] = {f"class {number}": iou for number in range(10)}
        folder = Path(value(command, "--output_dir"))
        (folder / method).mkdir()
        (folder / method / "metrics.json").write_text(json.dumps({"student": student}), encoding="utf-8")
        return 0

    def level(self, row: str, command: list[str]) -> float:
        return self.LEVEL[row]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls the table "fair" of a tiny run, and the trainer that stands for its processes."""
    (tmp_path / "tiny.yaml").write_text(TINY_RUN + "baseline: source_only\n", encoding="utf-8")
    words = ["tables", "fair", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")]
    return lambda *more: main([*words, "--rates", "0.1,0.2,0.3", *more]), FairTrainer(monkeypatch)


def test_every_row_is_searched_alike_and_its_best_rate_gets_all_seeds(compare, tmp_path, capsys):
    call, trainer = compare
    assert call("--seeds", "0..2", "--train.num_threads", "1") == 0
    made = [(kind(c), float(value(c, "--optim.lr")), int(value(c, "--seed"))) for c in trainer.commands]
    searched = [(row, rate, 0) for row in trainer.RATE for rate in (0.1, 0.2, 0.3)]
    assert made == searched + [(row, rate, seed) for seed in (1, 2) for row, rate in trainer.RATE.items()]
    for command in trainer.commands:
        assert command[:4] == [sys.executable, "-m", "t2sda_hf", "train"]
        assert {"--baseline=none", "--train.num_threads=1", "--resume=auto"} <= set(command)
    printed = capsys.readouterr().out
    assert "**Share of the gap closed, (T2S-DA - source-only) / (upper bound - source-only): 50 %**" in printed
    assert "- T2S-DA minus self-training: +10.00 (95 % over seeds: +10.00 to +10.00, n = 3)" in printed
    assert "| T2S-DA | 0.3 | 40.00 | 41.00 | 42.00 | 41.00 | 1.00 |" in unaligned(printed)
    folder = tmp_path / "out" / "tiny"
    assert (folder / "fair.md").read_text(encoding="utf-8").strip() in f"{printed.partition('fair: ')[2]}"
    content = json.loads((folder / "fair.json").read_text(encoding="utf-8"))
    assert content["share"]["miou"] == 0.5
    assert content["rows"]["source_only"]["rates"] == {"0.1": 20.0, "0.2": 15.0, "0.3": 15.0}
    assert call("--seeds", "0..2") == 0  # nothing is trained again
    assert len(trainer.commands) == 12 + 8
    assert capsys.readouterr().out == printed


def test_a_class_that_one_half_of_the_test_images_lacks_is_named(compare, capsys, monkeypatch):
    call, _ = compare
    read = tables.read_domain

    def with_buses_in_the_first_image(domain, classes):
        found = read(domain, classes)
        found.counts[1:, classes.index("bus")] = 0
        found.counts[0, classes.index("bus")] = 9
        return found

    monkeypatch.setattr(tables, "read_domain", with_buses_in_the_first_image)
    sentence = "None of the test images of the figures shows bus: the IoU is 0 there if it is predicted anywhere, and"
    assert call("--seeds", "0,1", "--dry-run") == 0
    assert f"warning: {sentence}" in capsys.readouterr().err
    assert call("--seeds", "0,1") == 0
    printed = capsys.readouterr().out
    assert sentence in printed
    assert "None of the test images that choose" not in printed


def test_all_rows_have_the_crop_of_the_adaptation(compare):
    call, trainer = compare
    assert call("--seeds", "0", "--data={crop_size: null, outer_crop_size: null}", "--target.resize=[64, 128]") == 0
    crops = {(value(c, "--data.crop_size"), value(c, "--data.outer_crop_size")) for c in trainer.commands}
    assert crops == {("[64, 128]", "[96, 192]")}


def test_an_upper_bound_that_would_learn_test_images_is_refused(compare, capsys):
    call, trainer = compare
    assert call("--seeds", "0", "--target.split=validation") == 2
    assert "3 of the images that the upper bound would learn are test images. Give" in capsys.readouterr().err
    assert trainer.commands == []
    assert call("--seeds", "0", "--target.split=validation", "--rows", "source_only,t2sda") == 0


def test_figures_of_another_config_are_not_replaced(compare, tmp_path, capsys):
    call, _ = compare
    assert call("--seeds", "0", "--rows", "source_only") == 0
    (tmp_path / "b").mkdir()
    other = (tmp_path / "tiny.yaml").rename(tmp_path / "b" / "tiny.yaml")
    words = ["tables", "fair", "--config", str(other), "--output", str(tmp_path / "out")]
    assert main([*words, "--seeds", "0", "--rows", "source_only"]) == 2
    assert "is of another config" in capsys.readouterr().err


def test_rows_can_be_made_by_calls_of_their_own(compare, capsys):
    call, trainer = compare
    assert call("--seeds", "1,2", "--search_seeds", "0", "--rows", "source_only,t2sda") == 0
    assert {kind(command) for command in trainer.commands} == {"source_only", "t2sda"}
    assert len(trainer.commands) == 2 * (3 + 2)
    assert "not known, because upper bound is missing." in capsys.readouterr().out
    assert call("--seeds", "0..2", "--rows", "target_only") == 0
    assert len(trainer.commands) == 10 + 3 + 2
    assert ": 50 %**" in capsys.readouterr().out


def test_a_config_without_a_pull_is_trained_once_as_both_rows(compare, capsys):
    call, trainer = compare
    words = ["--seeds", "0,1", "--rows", "self_training,t2sda", "--loss_weights.pull", "0"]
    assert call(*words) == 0
    assert len(trainer.commands) == 3 + 1
    assert "(Its loss_weights.pull is 0, so it is the self-training itself.)" in capsys.readouterr().out


def test_a_rate_that_fails_loses_and_is_named(compare, capsys):
    call, trainer = compare
    trainer.codes = {2: 1}
    assert call("--seeds", "0,1", "--rows", "source_only") == 1
    assert [float(value(command, "--optim.lr")) for command in trainer.commands] == [0.1, 0.2, 0.3, 0.1]
    assert (
        "Not every learning rate has a result yet (or ever, if its run failed): source-only." in capsys.readouterr().out
    )


def test_the_plan_counts_what_the_search_will_choose(compare, tmp_path, monkeypatch, capsys):
    call, trainer = compare
    monkeypatch.setattr(tables, "count_update", lambda cfg: type("Cost", (), {"seconds": lambda *_: 12.0})())
    monkeypatch.setattr(tables, "this_machine", lambda: None)
    assert call("--dry-run") == 0
    text = capsys.readouterr().out
    assert (trainer.commands, (tmp_path / "out").exists()) == ([], False)
    assert "  source-only | rate 0.1  seed 0: missing, about 2 min  " in text  # 3 updates of 2.5 x 12 s
    assert "  and 16 runs at the learning rates that will be the best" in text
    assert "28 runs to make, about 0.7 h (a rough figure, nothing is measured yet)" in text
    assert call("--seeds", "0", "--rows", "t2sda") == 0
    assert call("--seeds", "0,1", "--rows", "t2sda,target_only", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "T2S-DA | rate 0.3  seed 1: missing" in text
    assert "  and 1 runs at the learning rates that will be the best" in text
    assert "5 runs to make" in text


def test_a_cell_that_another_call_makes_is_waited_for(compare, tmp_path, monkeypatch, capsys):
    call, trainer = compare
    assert call("--seeds", "0", "--rows", "source_only") == 0
    (summary, *_) = (tmp_path / "out").rglob("summary.json")
    whole = summary.read_text(encoding="utf-8")
    summary.unlink()
    held = locked(summary.parent.with_name(f".{summary.parent.name}.lock"))
    waiting = tables.locked

    def other_call_ends(path: Path, timeout: float) -> object:
        if held.is_locked:
            summary.write_text(whole, encoding="utf-8")
            held.release()
            raise tables.Timeout(str(path))
        return waiting(path, timeout)

    monkeypatch.setattr(tables, "locked", other_call_ends)
    capsys.readouterr()
    assert call("--seeds", "0", "--rows", "source_only") == 0
    assert "waiting for another call that makes" in capsys.readouterr().out
    assert len(trainer.commands) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optim.lr", "1"], "optim.lr is decided for each run: use --rates"),
        (["--method", "source_only"], "method is decided for each run"),
        (["--rows", "t2sda,oracle"], "--rows must be some of source_only,self_training,t2sda,target_only, got oracle"),
        (["--rates", "1e-3,-1"], "takes different positive numbers like 1e-3,3e-3,1e-2, got '1e-3,-1'"),
        (["--test.num_images", "1"], "the test domain has 1 image to be scored, and the table fair needs at least two"),
        (["--evaluation.limit", "1"], "the test domain has 1 image to be scored"),
        (["--scale", "demo"], "has no --scale"),
        (["--loss_weights.source", "0"], "loss_weights.source must be positive with method source_only"),
    ],
)
def test_what_makes_no_fair_table_is_told_before_anything_runs(compare, capsys, more, message):
    call, trainer = compare
    assert call(*more) == 2
    assert message in capsys.readouterr().err
    assert trainer.commands == []


def test_a_target_without_labels_has_no_upper_bound(compare, tmp_path, capsys):
    from PIL import Image

    call, trainer = compare
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (96, 64), (9, 9, ord(name))).save(tmp_path / "photos" / f"{name}.png")
    target = ["--target.path", str(tmp_path / "photos"), "--seeds", "0"]
    assert call(*target) == 2
    said = capsys.readouterr().err
    assert "the upper bound learns the labels of the target, and these cannot be read: " in said
    assert "Or leave it out with --rows source_only,self_training,t2sda." in said
    assert trainer.commands == []
    assert call(*target, "--rows", "source_only,t2sda") == 0


def test_fair_is_given_alone(tmp_path, capsys):
    for words in (["table07", "--rates", "1e-3"], ["fair", "table07"]):
        assert main(["tables", *words]) == 2
        assert "are of the tables fair and labels, which are given alone" in capsys.readouterr().err
    assert main(["tables", "fair"]) == 2
    assert "the table fair needs --config" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- the table "labels"


class LabelTrainer(FairTrainer):
    """A point more per label."""

    def level(self, row: str, command: list[str]) -> float:
        asked = value(command, "--target_labels")
        return self.LEVEL[row] + (6 if asked == "1/1" else int(asked))


@pytest.fixture
def curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls the table "labels" of a tiny run, and the trainer that stands for its processes."""
    (tmp_path / "tiny.yaml").write_text(TINY_RUN, encoding="utf-8")
    words = ["tables", "labels", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")]
    return lambda *more: main([*words, "--rates", "0.1,0.2,0.3", *more]), LabelTrainer(monkeypatch)


def test_the_curve_over_labels_searches_both_rows_at_every_number(curve, tmp_path, capsys):
    call, trainer = curve
    assert call("--labels", "0,2,all", "--seeds", "0..2") == 0
    made = [(kind(c), value(c, "--target_labels"), int(value(c, "--seed"))) for c in trainer.commands]
    both = [(row, number) for number in ("0", "2", "1/1") for row in ("t2sda", "source_only")]
    searched = [(*of_row, 0) for of_row in both for _ in range(3)]
    assert made == searched + [(*of_row, seed) for seed in (1, 2) for of_row in both]
    assert all("--baseline=none" in command for command in trainer.commands)
    told = "+20.00 (95 % over seeds: +20.00 to +20.00, n = 3)"
    printed = capsys.readouterr().out
    assert "The learning rate of each row is the best of the same 3 values. It was chosen on the other 2" in printed
    lines = [unaligned(line) for line in printed.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        f"| {name} | {ours}.00 ± 1.00 (3) | 0.3 | {ours - 20}.00 ± 1.00 (3) | 0.1 | {told} |"
        for name, ours in (("0", 41), ("2", 43), ("all", 47))
    ]
    drawn = (tmp_path / "out" / "tiny" / "labels.csv").read_text(encoding="utf-8").splitlines()
    assert drawn[0].split(",")[:4] == ["labelled images of the target", "T2S-DA: mean", "T2S-DA: sd", "T2S-DA: n"]
    assert [float(cell) for cell in drawn[3].split(",")[1:]] == pytest.approx([47, 1, 3, 27, 1, 3])
    assert (tmp_path / "out" / "tiny" / "labels.png").stat().st_size > 1000
    assert call("--labels", "0,2,all", "--seeds", "0..2") == 0  # nothing is trained again
    assert len(trainer.commands) == 3 * 6 + 2 * 6


def test_a_row_of_the_curve_can_be_made_alone(curve, capsys):
    call, trainer = curve
    assert call("--labels", "0,2", "--seeds", "0,1", "--rows", "source_only") == 0
    assert [kind(command) for command in trainer.commands] == ["source_only"] * 2 * (3 + 1)
    assert "| 2 | - ± - (0) | – | 22.50 ± 0.71 (2) | 0.1 | fewer than two seeds in common |" in unaligned(
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--labels", "7"], "target_labels asks for 7 labelled target images, and there are 6."),
        (["--labels", "some"], "target_labels must be a number of images, a share like 1/16, or null for all, got"),
        (["--target.split", "validation"], "of the labelled target images of streets-target (validation) are test"),
        (["--target_labels", "3"], "use --labels"),
        (["--optim.lr", "0.1"], "optim.lr is decided for each run: use --rates"),
        (["--rows", "target_only"], "--rows must be some of t2sda,source_only, got target_only."),
        (["--scale", "demo"], "the table labels needs --config, a file or the name of a recipe, and has no --scale."),
        (["--method", "source_only"], "the table labels sets it for each row"),
    ],
)
def test_what_would_end_a_run_of_the_curve_is_said_before_any(curve, capsys, words, said):
    call, trainer = curve
    assert call("--labels", "0,2", *words) == 2
    assert said in capsys.readouterr().err
    assert trainer.commands == []
