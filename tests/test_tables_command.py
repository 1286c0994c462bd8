"""t2sda tables: missing cells only, nothing lost by an interruption, tables as in the paper."""

import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from running import TINY_RUN

from t2sda_hf.cli import main
from t2sda_hf.commands import tables
from t2sda_hf.errors import heard
from t2sda_hf.launching import Runner

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
    ("arguments", "message"),
    [
        (["table99"], "'table99' does not exist"),
        (["table03", "--scale", "demo"], "table03 has no scale 'demo': it has paper"),
        (["table08", "--seeds", "0, a"], "a list like 0,3,7 of different seeds, got '0, a'"),
        (["table08", "--set", "pull.temprature=1"], "pull.temperature"),
        (["table08", "--set", "pull.temperature=-1"], "must be positive"),
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
