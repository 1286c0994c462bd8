"""select: proxy:<name> in whole runs: the weights of the best evaluation are kept, also over a resume."""

import json
import os
import signal
from pathlib import Path

import pytest
from accelerate import Accelerator
from faults.arena import RUN
from running import undrawn
from safetensors.torch import load_file

from t2sda_hf.cli import main
from t2sda_hf.commands import train as command
from t2sda_hf.commands.evaluate import models_of
from t2sda_hf.config import load_config
from t2sda_hf.evaluation.run_folder import read_run
from t2sda_hf.training import loop

PROXY = ("--select", "proxy:prior", "--train.evaluate_every", "3")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that trains twelve steps in tmp_path/<name> and returns the exit code."""
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    domains = command.open_domains(load_config(tmp_path / "run.yaml"), Accelerator(cpu=True))
    monkeypatch.setattr(command, "open_domains", lambda *_: domains)
    undrawn(monkeypatch)

    def run(name: str, *arguments: str) -> int:
        return main(["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / name), *arguments])

    return run


def stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update, made = loop.update, [0]

    def planted(*arguments: object) -> object:
        seen = update(*arguments)
        made[0] += 1
        if made[0] == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return seen

    monkeypatch.setattr(loop, "update", planted)


def kept(folder: Path) -> tuple[dict, dict]:
    described = json.loads((folder / "t2sda" / "selected" / "selected.json").read_text(encoding="utf-8"))
    return described, load_file(folder / "t2sda" / "selected" / "model.safetensors")


def test_the_weights_with_the_best_proxy_are_kept_and_scored(train, tmp_path: Path, monkeypatch, capsys) -> None:
    assert train("whole", *PROXY) == 0
    printed = capsys.readouterr().out
    method = read_run(tmp_path / "whole").main
    proxies = method.proxies["prior"]
    assert [step for step, _ in proxies] == [3, 6, 9, 12]
    best, value = max(proxies, key=lambda point: point[1])
    assert best < 12, "the case is only telling if the last weights are not the best"
    described, weights = kept(tmp_path / "whole")
    assert described == {"proxy": "prior", "value": value, "step": best}
    assert f"by {described['proxy']}: the student after {best} updates" in printed
    assert "t2sda (selected)" in printed
    assert models_of(str(tmp_path / "whole"))["t2sda (selected)"][0] == str(tmp_path / "whole" / "t2sda" / "selected")
    assert method.results["selected"]["step"] == best
    assert method.results["selected"]["miou"] == pytest.approx(dict(method.miou["student"])[best])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text(encoding="utf-8"))
    assert summary["t2sda"]["selected_miou"] == method.results["selected"]["miou"]

    with monkeypatch.context() as patch:
        stop_after(best + 1, patch)  # right after the best ones were kept
        assert train("cut", *PROXY) == 143
    assert kept(tmp_path / "cut")[0]["step"] == best
    assert train("cut", *PROXY, "--resume", "auto") == 0
    again, weights_again = kept(tmp_path / "cut")
    assert again == described
    assert all((weights[name] == weights_again[name]).all() for name in weights)


def test_a_run_without_selection_keeps_none(train, tmp_path: Path) -> None:
    assert train("out", "--train.max_steps", "3") == 0
    assert not (tmp_path / "out" / "t2sda" / "selected").exists()
    assert "selected" not in read_run(tmp_path / "out").main.results
