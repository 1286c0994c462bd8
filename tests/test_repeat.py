"""t2sda repeat: real runs of few steps, started in this process instead of in one of their own."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from faults.arena import RUN
from running import undrawn

from t2sda_hf.cli import main
from t2sda_hf.commands import train
from t2sda_hf.config import load_config
from t2sda_hf.launching import Runner

SHORT = ["--train.max_steps=2", "--train.evaluate_every=100", "--baseline=source_only"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`started` lists the command of every run, `codes` are exit codes to return instead of running."""
    seen = SimpleNamespace(started=[], codes=[])
    for name, lr in (("a", "1e-3"), ("b", "5e-3")):
        (tmp_path / f"{name}.yaml").write_text(RUN.replace("lr: 1e-3", f"lr: {lr}"), encoding="utf-8")
    domains = train.open_domains(load_config(tmp_path / "a.yaml"), Accelerator(cpu=True))
    monkeypatch.setattr(train, "open_domains", lambda *_: domains)
    undrawn(monkeypatch)

    def run(self: Runner, command: Sequence[str]) -> int:
        seen.started.append(list(command))
        return seen.codes.pop(0) if seen.codes else main(command[3:])

    monkeypatch.setattr(Runner, "run", run)
    return seen


def test_two_configs_are_compared_seed_by_seed_and_nothing_runs_twice(runs, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = [
        "repeat",
        str(tmp_path / "a.yaml"),
        str(tmp_path / "b.yaml"),
        "--seeds",
        "0,3",
        "--output",
        str(out),
        *SHORT,
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert len(runs.started) == 4
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

    assert main(command) == 0
    assert len(runs.started) == 4
    of_other_labels = out / "b" / "seed_3" / "summary.json"
    whole = of_other_labels.read_text()
    of_other_labels.write_text(json.dumps(json.loads(whole) | {"test_data": "edited"}))
    capsys.readouterr()
    assert main(command) == 2
    assert "different test images or label maps: b, seed 0 and b, seed 3" in capsys.readouterr().err
    of_other_labels.write_text(whole)
    assert main([*command[:3], "--seeds", "0", *command[5:], "--optim.lr", "2e-3"]) == 2
    assert "holds a finished run of another config" in capsys.readouterr().err


def test_recipes_of_one_name_in_two_folders_are_two_configs(runs, tmp_path: Path) -> None:
    recipes, out = ["gta_cityscapes/daformer", "synthia_cityscapes/daformer"], tmp_path / "out"
    runs.codes = [1, 1]
    assert main(["repeat", *recipes, "--seeds", "0", "--output", str(out)]) == 1
    folders = [command[-2] for command in runs.started]
    assert folders == [f"--output_dir={out / recipe.replace('/', '_') / 'seed_0'}" for recipe in recipes]


def test_a_failed_run_is_named_and_a_stopped_one_ends_it_all(runs, tmp_path: Path, capsys) -> None:
    command = ["repeat", str(tmp_path / "a.yaml"), "--seeds", "0..1", "--output", str(tmp_path / "out"), *SHORT]
    runs.codes = [1, 143]
    assert main(command) == 143
    assert "the same command goes on" in capsys.readouterr().err
    runs.codes = [1, 1]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "Failed and not in these figures: a, seed 0 (exit code 1); a, seed 1 (exit code 1)" in said.err
    assert runs.started[0] == [
        *(sys.executable, "-m", "t2sda_hf", "train", "--config", str(tmp_path / "a.yaml"), *SHORT, "--seed=0"),
        *(f"--output_dir={tmp_path / 'out' / 'a' / 'seed_0'}", "--resume=auto"),
    ]


def test_a_finished_run_is_the_same_whatever_does_not_count(runs, tmp_path: Path, capsys) -> None:
    command = ["repeat", str(tmp_path / "a.yaml"), "--seeds", "0", "--output", str(tmp_path / "out"), *SHORT]
    assert main(command) == 0
    free = [
        "--data.num_workers",
        "1",
        "--train.log_every",
        "1",
        "--train.num_threads",
        "2",
        "--allow_changes",
        "[seed]",
    ]
    elsewhere = ["--source.path", "streets-moved", "--cpu"]
    assert main([*command, *free, *elsewhere]) == 0
    assert len(runs.started) == 1
    for counted in (["--test.path", "streets-source"], ["--evaluation.limit", "1"], ["--target.num_images", "5"]):
        assert main([*command, *counted]) == 2
        assert f"another config, by {counted[0][2:]}. Give another --output" in capsys.readouterr().err
    assert len(runs.started) == 1


def test_seeds_that_derived_other_values_are_not_one_config(runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.yaml").write_text(
        (tmp_path / "a.yaml").read_text(encoding="utf-8").replace(", warmup_steps: 4", ""), encoding="utf-8"
    )
    command = ["repeat", str(tmp_path / "a.yaml"), "--output", str(tmp_path / "out"), *SHORT[:2], "--seeds"]
    assert main([*command, "0,1"]) == 0
    (tmp_path / "out" / "repeat.json").write_text('{"miou": {"a', encoding="utf-8")  # ours, and cut: made again
    assert main([*command, "0,1"]) == 0
    assert json.loads((tmp_path / "out" / "repeat.json").read_text(encoding="utf-8"))["miou"]
    (resolved,) = (tmp_path / "out" / "a" / "seed_1").glob("t2sda/resolved_config.yaml")
    text = resolved.read_text(encoding="utf-8")
    assert "ema_momentum: 0.9\n" in text
    resolved.write_text(text.replace("ema_momentum: 0.9\n", "ema_momentum: 0.99\n"), encoding="utf-8")
    capsys.readouterr()
    assert main([*command, "0..2"]) == 2
    said = capsys.readouterr().err
    assert "seed_0 and " in said
    assert "seed_1 have worked out different values of uda.ema_momentum" in said
    assert len(runs.started) == 2
    (tmp_path / "out" / "repeat.json").write_text('["mine"]', encoding="utf-8")
    assert main([*command, "0"]) == 2
    assert "`t2sda repeat` did not write it" in capsys.readouterr().err


def test_launch_flags_are_those_of_the_runs(runs, tmp_path: Path) -> None:
    runs.codes = [0]
    flags = ["--num_processes", "2", "--accelerate-config", "fsdp2", "--cpu"]
    assert main(["repeat", str(tmp_path / "a.yaml"), "--seeds", "0", "--output", str(tmp_path / "out"), *flags]) == 0
    assert runs.started[0][-3:] == ["--num_processes=2", "--accelerate_config=fsdp2", "--cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "4..0"], "takes a range like 0..4 or a list"),
        (["--seeds", "0,0"], "of different seeds"),
        (["--seeds", "many"], "got 'many'"),
        (["--optim.lrr", "1"], "lrr"),
    ],
)
def test_mistakes_are_told_before_the_first_run(runs, tmp_path: Path, options: list, message: str, capsys) -> None:
    assert main(["repeat", str(tmp_path / "a.yaml"), *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not runs.started
    assert not (tmp_path / "out").exists()
