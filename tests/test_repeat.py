"""scripts/repeat.py: real runs of few steps, started in this process instead of in one of their own."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from faults.arena import ROOT, RUN, load_script

from t2sda_hf.config import load_config

TRAIN = load_script()
SHORT = ["--train.max_steps", "2", "--train.evaluate_every", "100", "--baseline", "source_only"]


@pytest.fixture
def repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script; `started` lists the command of every run, `codes` are exit codes to return instead of running."""
    spec = importlib.util.spec_from_file_location("repeat_script", ROOT / "scripts" / "repeat.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, lr in (("a", "1e-3"), ("b", "5e-3")):
        (tmp_path / f"{name}.yaml").write_text(RUN.replace("lr: 1e-3", f"lr: {lr}"), encoding="utf-8")
    domains = TRAIN.open_domains(load_config(tmp_path / "a.yaml"), Accelerator(cpu=True))
    monkeypatch.setattr(TRAIN, "open_domains", lambda *_: domains)
    monkeypatch.setattr(TRAIN, "save_panel", lambda *_: None)
    monkeypatch.setattr(TRAIN, "write_page", lambda folder: folder / "index.html")
    script.started, script.codes = [], []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        script.started.append(command)
        at = command.index(str(ROOT / "scripts" / "train_uda.py"))
        return SimpleNamespace(returncode=script.codes.pop(0) if script.codes else TRAIN.main(command[at + 1 :]))

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    return script


def test_two_configs_are_compared_seed_by_seed_and_nothing_runs_twice(repeat, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--seeds", "0,3", "--output", str(out), *SHORT]
    assert repeat.main(command) == 0
    printed = capsys.readouterr().out
    assert len(repeat.started) == 4
    miou = {
        name: [
            json.loads((out / name / f"seed_{seed}" / "summary.json").read_text())["t2sda"]["miou"] for seed in (0, 3)
        ]
        for name in "ab"
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    mean, sd = np.mean(miou["a"]), np.std(miou["a"], ddof=1)
    assert ["a", "t2sda", f"{mean:.2f}", f"{sd:.2f}", "2"] in rows
    difference = np.mean(miou["b"]) - np.mean(miou["a"])
    assert f"b over a: {difference:+.2f} [" in printed
    assert "a: t2sda over source_only: " in printed
    saved = json.loads((out / "repeat.json").read_text())
    assert saved["miou"]["a"]["t2sda"] == dict(zip(("0", "3"), miou["a"], strict=True))
    assert saved["differences"]["b over a"]["n"] == 2

    assert repeat.main(command) == 0
    assert len(repeat.started) == 4
    assert repeat.main([*command[:2], "--seeds", "0", *command[4:], "--optim.lr", "2e-3"]) == 2
    assert "holds a finished run of another config" in capsys.readouterr().err


def test_a_failed_run_is_named_and_a_stopped_one_ends_it_all(repeat, tmp_path: Path, capsys) -> None:
    command = [str(tmp_path / "a.yaml"), "--seeds", "0..1", "--output", str(tmp_path / "out"), *SHORT]
    repeat.codes = [1, 143]
    assert repeat.main(command) == 143
    assert "The same command goes on" in capsys.readouterr().err
    repeat.codes = [1, 1]
    assert repeat.main(command) == 1
    said = capsys.readouterr()
    assert "Failed and not in these figures: a, seed 0 (exit code 1); a, seed 1 (exit code 1)" in said.err
    assert repeat.started[0][1:] == [
        str(ROOT / "scripts" / "train_uda.py"),
        *("--config", str(tmp_path / "a.yaml"), *SHORT, "--seed", "0"),
        *("--output_dir", str(tmp_path / "out" / "a" / "seed_0"), "--resume", "auto"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "4..0"], "takes a range like 0..4 or a list"),
        (["--seeds", "0,0"], "of different seeds"),
        (["--seeds", "many"], "got 'many'"),
        (["--optim.lrr", "1"], "lrr"),
    ],
)
def test_mistakes_are_told_before_the_first_run(repeat, tmp_path: Path, options: list, message: str, capsys) -> None:
    assert repeat.main([str(tmp_path / "a.yaml"), *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not repeat.started
    assert not (tmp_path / "out").exists()
