"""The check of a GPU, tried without one: every phase runs, and a fault of one is a row."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState

from scripts import gpu_check


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    owners = torch.backends.cuda.matmul, torch.backends.cudnn
    flags, chosen = [owner.allow_tf32 for owner in owners], torch.backends.cudnn.benchmark
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    for owner, flag in zip(owners, flags, strict=True):
        owner.allow_tf32 = flag
    torch.backends.cudnn.benchmark = chosen
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    for state in (AcceleratorState, PartialState):
        state._reset_state()


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]


def test_every_phase_runs_and_a_device_equals_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--tiny"]) == 0
    said = capsys.readouterr().out
    rows = table(said)
    assert "no GPU" in said.splitlines()[0]
    assert list(dict.fromkeys(row[0] for row in rows)) == list(gpu_check.PHASES)
    found = {what: measured for _, what, measured in rows}
    equal = {what: measured for what, measured in found.items() if what.endswith("device over CPU")}
    assert len(equal) == 12
    assert set(equal.values()) == {"0.0e+00"}
    assert float(found["FDA where TF32 is allowed: largest error of 255 (goal 0.001)"]) < 1e-3
    assert "-" not in found["demo: mIoU of t2sda"]


def test_a_phase_that_fails_is_a_row_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: gpu_check.Bench) -> gpu_check.Rows:
        yield "first", "1"
        raise RuntimeError("a | b")

    phases = {
        "parity": (broken, 0.0),
        "waits": (gpu_check.waits, 1e9),
        "steps": (lambda bench: iter([("x", "2")]), 0.0),
    }
    monkeypatch.setattr(gpu_check, "PHASES", phases)
    assert gpu_check.main(["--device", "cpu", "--tiny", "--phases", "parity", "waits", "steps"]) == 1
    assert table(capsys.readouterr().out) == [
        ["parity", "first", "1"],
        ["parity", "failed", "RuntimeError: a / b"],
        ["waits", "not begun", "no time is left"],
        ["steps", "x", "2"],
    ]
