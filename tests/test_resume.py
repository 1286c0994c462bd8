"""--resume: the same run goes on, bit by bit; another one is refused, and what differs is listed."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from faults.arena import RUN, digest, outcome, sign
from filelock import FileLock
from PIL import Image
from running import undrawn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import SegformerConfig, SegformerModel

from t2sda_hf.batch import normalize
from t2sda_hf.cli import main
from t2sda_hf.commands import train as command
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.data.domains import Domain
from t2sda_hf.data.pairs import PairDataset, PositionSampler
from t2sda_hf.data.transforms import random_window
from t2sda_hf.errors import LostFolder
from t2sda_hf.evaluation import watch
from t2sda_hf.evaluation.evaluator import Part, where
from t2sda_hf.evaluation.page import write_page
from t2sda_hf.evaluation.pictures import save_grid
from t2sda_hf.masking import mask
from t2sda_hf.methods import METHODS
from t2sda_hf.models import T2SDAForSemanticSegmentation
from t2sda_hf.storage import read_lines
from t2sda_hf.teacher import take_statistics
from t2sda_hf.training import loop, scores, stopping, tracking
from t2sda_hf.training.checkpoint import Progress, checkpoints
from t2sda_hf.training.resume import kept_values, lock_run
from t2sda_hf.training.scores import Interruptible
from t2sda_hf.training.stopping import Stopped, StopRequest
from t2sda_hf.training.tracking import Tracker


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory):
    config = tmp_path_factory.mktemp("config") / "run.yaml"
    config.write_text(RUN, encoding="utf-8")
    return command.open_domains(load_config(config), Accelerator(cpu=True))


@pytest.fixture
def run(tmp_path: Path, domains, monkeypatch: pytest.MonkeyPatch):
    """A function that trains in tmp_path/<name> and returns the exit code."""
    monkeypatch.setattr(command, "open_domains", lambda *_: domains)
    undrawn(monkeypatch)
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")

    def train(name: str, *arguments: str) -> int:
        return main(["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / name), *arguments])

    return train


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """A function that makes the process send itself a signal after so many updates from now."""

    def plan(updates: int, number: int = signal.SIGTERM) -> None:
        update, made = loop.update, [0]

        def planted(*arguments: object) -> object:
            seen = update(*arguments)
            made[0] += 1
            if made[0] == updates:
                os.kill(os.getpid(), number)
            return seen

        monkeypatch.setattr(loop, "update", planted)

    return plan


def test_resumed_runs_end_where_the_uninterrupted_one_ends(run, stop_after, tmp_path: Path) -> None:
    both = ("--baseline", "source_only")
    assert run("whole", *both) == 0
    stop_after(5)
    assert run("cut", *both) == 143  # in the baseline
    stop_after(7 + 7)
    assert run("cut", *both, "--resume", "auto") == 143  # the other 7 steps of it, then in the method
    baseline = tmp_path / "cut" / "source_only" / "metrics.json"
    written = baseline.stat().st_mtime_ns
    assert checkpoints(tmp_path / "cut" / "t2sda")[-1].name == "checkpoint-000007"
    assert run("cut", *both, "--resume", "auto", "--data.num_workers", "1") == 0
    assert baseline.stat().st_mtime_ns == written, "a finished baseline is not trained again"
    for method in ("source_only", "t2sda"):
        assert outcome(tmp_path / "cut", method) == outcome(tmp_path / "whole", method)
    whole, cut = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert {**whole, "seconds": 0, "resumed": 0} == {**cut, "seconds": 0, "resumed": 0}
    assert (whole["resumed"], cut["resumed"]) == ([], ["source_only", "t2sda"])
    configs = [load_config(tmp_path / name / "t2sda" / "resolved_config.yaml") for name in ("whole", "cut")]
    assert replace(configs[1], output_dir=configs[0].output_dir, data=configs[0].data) == configs[0]


def test_a_run_that_is_finished_only_says_so(run, tmp_path: Path) -> None:
    short = ("--train.max_steps", "2")
    assert run("out", *short, "--resume", "auto") == 0  # nothing there: it starts
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "t2sda").rglob("*")}
    assert run("out", *short, "--resume", "auto") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "t2sda").rglob("*")} == before


def test_what_changes_the_result_is_refused_and_the_rest_is_noted(
    run, stop_after, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(2)
    assert run("out") == 143
    capsys.readouterr()
    refused = {
        "optim.lr": "2e-3",
        "seed": "1",
        "classes": "[sidewalk, road, building, pole, traffic sign, vegetation, sky, person, car, bus]",
        "train.batch_size": "2",
        "train.max_steps": "13",
        "data.crop_size": "[64, 64]",
        "pull.temperature": "0.3",
        "model.decoder_hidden_size": "16",
    }
    arguments = [part for key, value in refused.items() for part in (f"--{key}", value)]
    assert run("out", "--resume", "auto", *arguments, "--train.log_every", "3") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    for key in refused:
        assert f"{key}: " in said
    assert "optim.lr: 0.001 before, 0.002 now" in said
    assert "--allow_changes" in said
    assert "log_every" not in said

    with caplog.at_level(logging.WARNING):
        allowed = ("--optim.lr", "2e-3", "--allow_changes", "[optim]", "--train.save_every", "5")
        assert run("out", "--resume", "auto", *allowed) == 0
    assert "resuming with another optim.lr: 0.001 before, 0.002 now" in caplog.text
    assert "resuming with another train.save_every: 3 before, 5 now" in caplog.text


def picture(path: Path, seed: int, size: tuple[int, int] = (64, 96)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def label_map(path: Path, seed: int, size: tuple[int, int] = (64, 96)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(seed).choice(np.array([0, 10, 13], np.uint8), (size[0] // 8, size[1] // 8))
    Image.fromarray(ids.repeat(8, 0).repeat(8, 1)).save(path)


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that trains on folders of pictures in tmp_path/data from a saved encoder; its exit code."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    undrawn(monkeypatch)
    data = tmp_path / "data"
    for place in range(4):
        picture(data / "source" / f"s{place}.png", place)
        label_map(data / "labels" / f"s{place}.png", place)
        picture(data / "target" / f"t{place}.png", 10 + place)
        picture(data / "translated" / f"s{place}.png", 20 + place)
    for place in range(2):
        picture(data / "test" / f"v{place}.png", 30 + place)
        label_map(data / "truth" / f"v{place}.png", 30 + place)
    (data / "translated" / "manifest.json").write_text(json.dumps({"files": [f"s{place}.png" for place in range(4)]}))
    save_encoder(data / "encoder", 0)
    kept = [line for line in RUN.splitlines() if not line.startswith(("classes:", "source:", "target:", "test:"))]
    text = "\n".join(kept).replace("pretrained: null", f"pretrained: {data / 'encoder'}")
    (tmp_path / "own.yaml").write_text(f"{text}\nclasses: [road, sky, car]\n", encoding="utf-8")

    def train(*arguments: str, data: Path = data) -> int:
        places = {"source.path": "source", "source.label_path": "labels", "target.path": "target", "test.path": "test"}
        places |= {"test.label_path": "truth", "translate.trained.folder": "translated"}
        words = [f"--{key}={data / name}" for key, name in places.items()]
        words += ["--source.label_space=cityscapes", "--test.label_space=cityscapes"]
        words += ["--translate.engine=trained", f"--output_dir={tmp_path / 'out'}", "--train.max_steps=3"]
        return main(["train", "--config", str(tmp_path / "own.yaml"), *words, *arguments])

    return train


def save_encoder(folder: Path, seed: int) -> None:
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    torch.manual_seed(seed)
    SegformerModel(SegformerConfig(**sizes)).save_pretrained(folder)


def test_whatever_was_exchanged_between_two_starts_is_named_and_refused(
    own_data, stop_after, tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(2)
    assert own_data() == 143
    data = tmp_path / "data"
    shutil.copytree(data, tmp_path / "before")
    for place in range(1, 4):
        picture(data / "target" / f"t{place}.png", 100 + place)
    Image.new("RGB", (96, 64)).save(data / "source" / "s3.png")
    picture(data / "translated" / "s2.png", 200)
    save_encoder(data / "encoder", 1)
    capsys.readouterr()
    assert own_data("--resume=auto") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "target_data: 3 of 4 images and label maps differ from those before, first: t1.png" in said
    assert "source_data: 1 of 5 images and label maps differ from those before, first: s3.png" in said
    assert "translated_images: 1 of 4 translated images differ from those before, first: s2.png" in said
    assert "start_weights: " in said
    assert "tensors differ from those before, first: " in said
    names = "[source_data, start_weights, target_data, translated_images]"
    assert f'--allow_changes "{names}"' in said or all(name in said for name in names.strip("[]").split(", "))

    # The same bytes elsewhere are the same data; other rounding is listed.
    elsewhere = (f"--model.pretrained={tmp_path / 'before' / 'encoder'}", "--train.num_threads=2")
    with caplog.at_level(logging.WARNING):
        assert own_data("--resume=auto", *elsewhere, data=tmp_path / "before") == 0
    assert "resuming where sums may be rounded otherwise: CPU threads 2 (1 before)" in caplog.text
    torch.set_num_threads(1)


def test_a_checkpoint_of_an_earlier_release_goes_on_and_says_what_was_not_compared(
    own_data, stop_after, tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(2)
    assert own_data() == 143
    (checkpoint,) = checkpoints(tmp_path / "out" / "t2sda")
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("inputs", "scored", "rounding"):
        del state[name]
    (checkpoint / "state.json").write_text(json.dumps(state))
    own = load_file(checkpoint / "processes.safetensors")
    del own["0/memory.labelled_pixels"]
    save_file(own, checkpoint / "processes.safetensors")
    sign(checkpoint)
    data = tmp_path / "data"
    (data / "source" / "s0.png").rename(data / "source" / "kept")
    picture(data / "source" / "s0.png", 99)
    assert own_data("--resume=auto") == 2
    assert "source_data: '" in capsys.readouterr().err
    (data / "source" / "kept").replace(data / "source" / "s0.png")
    with caplog.at_level(logging.WARNING):
        assert own_data("--resume=auto") == 0
    assert "of its data some images are compared, and nothing of start_weights, translated_images" in caplog.text


def test_scores_are_made_again_where_they_were_made_of_something_else(own_data, tmp_path: Path, caplog) -> None:
    """Labels that were edited, another test set, and weights that were exchanged; nothing is trained again."""
    assert own_data("--baseline=source_only") == 0
    out, data = tmp_path / "out", tmp_path / "data"

    def again(*arguments: str) -> dict:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert own_data("--baseline=source_only", "--resume=auto", *arguments) == 0
        return json.loads((out / "summary.json").read_text())

    weights = digest(out / "t2sda" / "student" / "model.safetensors")
    first = again()
    assert "scored again" not in caplog.text
    label_map(data / "truth" / "v1.png", 77)
    edited = again()
    assert caplog.text.count("finished before, and scored again: the images or labels of student were others") == 2
    assert edited["test_data"] != first["test_data"]
    assert edited["source_only"]["miou"] != first["source_only"]["miou"]
    assert edited["gain"] == edited["t2sda"]["miou"] - edited["source_only"]["miou"]
    other = again(f"--test.path={data / 'source'}", f"--test.label_path={data / 'labels'}")
    assert other["t2sda"]["miou"] != edited["t2sda"]["miou"]
    assert "source" in json.loads((out / "t2sda" / "metrics.json").read_text())["student"]["domain"]
    again()
    shutil.copytree(out / "source_only" / "student", out / "t2sda" / "student", dirs_exist_ok=True)
    assert again() | {"seconds": 0} == edited | {"seconds": 0}
    assert "the weights of student were others" in caplog.text
    assert digest(out / "t2sda" / "student" / "model.safetensors") == weights
    limited = again("--evaluation.limit=1")
    assert "the settings of student were others" in caplog.text
    assert limited["t2sda"]["miou"] != edited["t2sda"]["miou"]


def test_labels_that_are_edited_between_baseline_and_method_do_not_make_a_gain(
    own_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    run_method = command.run_method

    def edited(cfg, *given: object, **named: object):
        results = run_method(cfg, *given, **named)
        if cfg.method == "source_only":
            label_map(tmp_path / "data" / "truth" / "v1.png", 77)
        return results

    monkeypatch.setattr(command, "run_method", edited)
    assert own_data("--baseline=source_only") == 0
    assert "changed in the middle of the run: all models are scored again" in caplog.text
    data = [
        json.loads((tmp_path / "out" / method / "metrics.json").read_text())["student"]["inputs"]["data"]
        for method in ("source_only", "t2sda")
    ]
    assert data[0] == data[1] == json.loads((tmp_path / "out" / "summary.json").read_text())["test_data"]


def test_another_number_of_processes_is_refused(run, stop_after, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(2)
    assert run("out") == 143
    records = command.records
    others = {"num_processes": 4, "sharded": True}
    monkeypatch.setattr(command, "records", lambda *given: {m: r | others for m, r in records(*given).items()})
    assert run("out", "--resume", "auto") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "num_processes: 1 before, 4 now; sharded: False before, True now" in said
    assert run("out", "--resume", "auto", "--allow_changes", "[num_processes, sharded]") == 0


def test_resuming_from_a_checkpoint_by_its_path(run, stop_after, tmp_path: Path, capsys) -> None:
    assert run("whole") == 0
    older, newest = checkpoints(tmp_path / "whole" / "t2sda")
    # It branches off into a new folder, and is the same run there.
    assert run("branch", "--resume", str(older)) == 0
    ends = [outcome(tmp_path / name) for name in ("whole", "branch")]
    assert ends[1]["last checkpoint"] == ends[0]["last checkpoint"]
    assert ends[1]["log"] == ends[0]["log"][-len(ends[1]["log"]) :]
    # In its own folder there is a newer one.
    assert run("whole", "--resume", str(older)) == 2
    assert newest.name in capsys.readouterr().err
    (older / "optimizer.safetensors").write_bytes(b"")
    assert run("other", "--resume", str(older)) == 2
    assert "optimizer.safetensors" in capsys.readouterr().err
    assert run("other", "--resume", str(tmp_path / "nothing")) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "other" / "t2sda").exists()


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "garbage": lambda data: b"\xff\x00{[" + data[3:],
}


@pytest.mark.parametrize("kind", CUTS)
def test_cut_files_never_end_the_next_start(run, tmp_path: Path, kind: str, caplog) -> None:
    """Of a finished run: what can be made again is; of a log only the damaged lines are gone."""
    short = ("--train.max_steps", "4", "--select", "proxy:combined", "--train.evaluate_every", "2")
    assert run("out", *short) == 0
    method, files = tmp_path / "out" / "t2sda", ("run.json", "data.json", "summary.json")
    before = method.joinpath("metrics.json").read_text(encoding="utf-8")
    damaged = [*(tmp_path / "out" / name for name in files), method / "metrics.json", method / "scalars.jsonl"]
    damaged += [method / "selected" / "selected.json"]
    for path in damaged:
        path.write_bytes(CUTS[kind](path.read_bytes()))
    assert run("out", *short, "--resume", "auto") == 0
    for name in files:
        assert json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
    after = json.loads(method.joinpath("metrics.json").read_text(encoding="utf-8"))
    assert after["student"] == json.loads(before)["student"]
    assert "run.json is damaged" in caplog.text


@pytest.mark.parametrize("kind", CUTS)
def test_a_finished_model_that_does_not_load_is_made_again(run, tmp_path: Path, kind: str, caplog) -> None:
    short, weights = ("--train.max_steps", "1"), tmp_path / "out" / "t2sda" / "student" / "model.safetensors"
    assert run("out", *short) == 0
    whole = weights.read_bytes()
    weights.write_bytes(CUTS[kind](whole))
    assert run("out", *short, "--resume", "auto") == 0
    assert weights.read_bytes() == whole
    assert "student cannot be loaded" in caplog.text
    shutil.rmtree(weights.parent)
    assert run("out", *short, "--resume", "auto") == 0
    assert weights.read_bytes() == whole


@pytest.mark.parametrize(
    "left", [("run.json",), (".run.json.partial", ".lock"), (".run.json.77.partial",), ("run.json", "data.json")]
)
def test_a_start_that_the_disk_ended_is_started_again(run, tmp_path: Path, left: tuple[str, ...]) -> None:
    (tmp_path / "out").mkdir()
    for name in left:
        (tmp_path / "out" / name).touch()
    assert run("out", "--resume", "auto", "--train.max_steps", "1") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["command"]
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_only_what_has_learned_keeps_its_derived_values(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint starts anew, and so do the values that it derived."""
    cfg = load_config(None, [f"--output_dir={tmp_path}", "--resume=auto", "--baseline=source_only"])
    for method, steps in (("source_only", 7), ("t2sda", 9)):
        (tmp_path / method).mkdir()
        (tmp_path / method / "resolved_config.yaml").write_text(f"optim: {{warmup_steps: {steps}}}", encoding="utf-8")
    assert kept_values(cfg) == {}
    (tmp_path / "t2sda" / "checkpoint-000005").mkdir()
    assert kept_values(cfg) == {"optim.warmup_steps": 9}


def test_a_run_never_writes_into_a_folder_that_took_the_place_of_its_own(
    run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, out = loop.update, tmp_path / "out"

    def planted(given: loop.Run, step: int, tracker: Tracker) -> object:
        if step == 4:
            shutil.rmtree(out)
            (out / "t2sda").mkdir(parents=True)
            (out / ".lock").write_text("of another run", encoding="utf-8")
        return update(given, step, tracker)

    monkeypatch.setattr(loop, "update", planted)
    assert run("out") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("LostFolder: ")
    assert "was removed, moved or replaced" in said
    assert "checkpoint" not in said
    assert sorted(path.name for path in out.rglob("*")) == [".lock", "t2sda"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_a_file_says_who_writes(tmp_path: Path, code: int, caplog, monkeypatch) -> None:
    """As on Lustre, NFS and FUSE, by how they are mounted."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    cfg = replace(RunConfig(), output_dir=str(tmp_path / "out"))
    claim = lock_run(cfg)
    try:
        assert caplog.text.count("has no locks") == 1
        said = (tmp_path / "out" / ".lease").read_text(encoding="utf-8")
        assert str(os.getpid()) in said
        claim.check()
        with pytest.raises(ValueError, match=rf"in use by .*{os.getpid()}"):
            lock_run(cfg)
        (tmp_path / "out" / ".lease").write_text(said, encoding="utf-8")
        (tmp_path / "out").rename(tmp_path / "moved")
        with pytest.raises(LostFolder):
            claim.check()
        (tmp_path / "moved").rename(tmp_path / "out")
    finally:
        claim.lock.release()
    lock_run(cfg).lock.release()


def test_a_folder_in_use_or_of_somebody_else_is_refused(run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert run("out") == 2
        assert run("out", "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert said.count("in use by") == 2
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert run("home", "--resume", "auto") == 2
    assert "holds no run" in capsys.readouterr().err
    (out / ".lock").write_text("left by a process that is gone", encoding="utf-8")
    assert run("out", "--train.max_steps", "1") == 0


SHORT = ("--train.save_every", "100", "--train.max_steps", "8", "--train.evaluate_every", "100")


def _unreadable(error: type[Exception]) -> Callable[[int], None]:
    def read(position: int) -> None:
        if position == 7:
            raise error("street_7.png is gone")

    return read


def _killed(position: int) -> None:
    if position == 7:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("workers", "read", "said"),
    [
        (0, _unreadable(OSError), "DataFailed: OSError: street_7.png is gone"),
        (1, _unreadable(RuntimeError), "DataFailed: RuntimeError: street_7.png is gone"),
        (1, _killed, "a worker that reads data was ended by SIGKILL. If memory ran out, lower data.num_workers."),
    ],
)
def test_data_that_ends_a_run_costs_no_step(run, tmp_path: Path, capfd, monkeypatch, workers, read, said) -> None:
    """Nothing is due to be saved before the end; what was learned until then is there, and the run goes on from it."""
    often = (*SHORT, "--data.num_workers", str(workers))
    if workers:  # as an earlier loader of the process: torch's handler stays behind, and would raise in an update
        list(DataLoader([0, 1], num_workers=1))
    getitem, killer = PairDataset.__getitem__, signal.SIG_DFL if workers else signal.getsignal(signal.SIGCHLD)

    def planted(self: PairDataset, position: int) -> dict:
        read(position)
        return getitem(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(PairDataset, "__getitem__", planted)
        patch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # seconds between looks
        assert run("out", *often) == 1
    (saved,) = checkpoints(tmp_path / "out" / "t2sda")
    assert "checkpoint-000004" < saved.name <= "checkpoint-000007"
    error = capfd.readouterr().err
    assert said in error
    assert error.strip().endswith(f"The newest checkpoint is t2sda/{saved.name}; go on with --resume auto.")
    assert "Traceback" not in error.splitlines()[-1]
    assert not active_children()
    assert signal.getsignal(signal.SIGCHLD) == killer
    assert run("whole", *often) == 0
    assert run("out", *often, "--resume", "auto") == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_an_image_that_breaks_in_the_middle_is_drawn_again(run, stop_after, tmp_path, capsys, monkeypatch):
    """What is drawn for it depends on the position alone, so a stop changes nothing; too many end the run."""
    broken = {0, 1, 2, 3}

    def draw(self: PairDataset, target: Domain, rng: np.random.Generator, *_: object) -> tuple[np.ndarray, Domain]:
        index = int(rng.integers(len(target)))
        if index in broken:
            raise ValueError(f"street {index} is cut")
        return target.resized_image(index), target

    monkeypatch.setattr(PairDataset, "_draw_target", draw)
    short = ("--train.max_steps", "6", "--train.evaluate_every", "100")
    assert run("whole", *short) == 0
    said = capsys.readouterr().out
    lines = read_lines(tmp_path / "whole" / "t2sda" / "scalars.jsonl")
    drawn = [line["unreadable"] for line in lines if "unreadable" in line]
    assert len(drawn) > len(set(drawn)) > 1
    assert said.count(f"another image is drawn for one that cannot be read any more: {drawn[0]}") == 1
    stop_after(4)
    assert run("out", *short) == 143
    assert run("out", *short, "--resume", "auto") == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    monkeypatch.setattr(tracking, "MOST_UNREADABLE", 1)
    assert run("many", *short) == 1
    assert "DataFailed: ValueError: more than 1 images that were whole at the start" in capsys.readouterr().err
    broken.update(range(6))
    assert run("all", *short) == 1
    assert "DataFailed: ValueError: street" in capsys.readouterr().err


def test_an_error_inside_an_update_leaves_the_state_before_it(run, tmp_path: Path, capsys, monkeypatch) -> None:
    """Memory that runs out in the backward of step 8: the class memory was moved on already, and is put back."""
    method, often = METHODS["t2sda"], SHORT

    def spoiled(step):
        for graph in method(step):
            yield graph
            if step.index == 7:
                raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "t2sda", spoiled)
        assert run("out", *often) == 1
    said = capsys.readouterr().err
    assert "OutOfMemory: tried to allocate 20 GiB. Set model.activation_checkpointing true, or set train.prec" in said
    assert "or lower data.crop_size [" in said
    assert "The newest checkpoint is t2sda/checkpoint-000007;" in said
    assert run("whole", *often) == 0
    assert run("out", *often, "--resume", "auto") == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_an_update_that_is_half_done_is_not_saved(run, tmp_path: Path, monkeypatch) -> None:
    def torn(*_: object) -> None:
        raise RuntimeError("in the middle of the teacher")

    monkeypatch.setattr(loop, "follow", torn)
    with pytest.raises(RuntimeError, match="in the middle of the teacher"):
        run("out")
    assert checkpoints(tmp_path / "out" / "t2sda") == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_warning_of_slurm_save_the_step(run, stop_after, tmp_path: Path, capsys, number):
    stop_after(2, number)
    assert run("out") == 128 + number
    assert checkpoints(tmp_path / "out" / "t2sda")[-1].name == "checkpoint-000002"
    assert f"Stopped: by {number.name}. The newest checkpoint is t2sda/checkpoint-000002" in capsys.readouterr().err


def test_a_signal_ends_the_wait_for_data() -> None:
    def never() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    with StopRequest() as stop:
        waiting = stop.waiting(never())
        assert next(waiting) == 1
        with pytest.raises(Stopped, match="SIGTERM"):
            next(waiting)


def test_what_comes_with_a_closed_terminal_is_no_impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP and then SIGTERM, as init sends them; and nohup, which ignores the first."""
    monkeypatch.setattr(stopping, "_SAME", 0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_is_gone_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "launcher", lambda: 12345)
    monkeypatch.setattr(os, "getppid", lambda: 12345)
    with StopRequest() as stop:
        stop.check()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_once_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # within half a second: the launcher's copy of the same one
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_run_that_is_stopped_before_its_first_step_goes_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    check = StopRequest.check

    def stopped_early(self: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        check(self)

    short = ("--train.max_steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", stopped_early)
        assert run("out", *short) == 143
    assert run("out", *short, "--resume", "auto") == 0


def test_the_saved_student_has_the_statistics_of_the_target(run, tmp_path: Path, domains, monkeypatch, caplog) -> None:
    """Of the crops at the two ends of the target, one a batch; of the one that is left, if the other is gone."""
    first, last = (domains.target.resized_image(index) for index in (0, 5))
    crops = [
        random_window(image.shape[:2], (32, 64), np.random.default_rng(index)).of(image)
        for index, image in ((0, first), (5, last))
    ]
    images = [normalize(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None] / 255) for crop in crops]

    def statistics(folder: Path) -> list[Tensor]:
        return list(T2SDAForSemanticSegmentation.from_pretrained(folder).buffers())

    assert run("out", "--train.max_steps=4", "--optim.warmup_steps=0") == 0
    own = tmp_path / "out" / "t2sda"
    by_hand = T2SDAForSemanticSegmentation.from_pretrained(own / "student")
    take_statistics(by_hand, images)
    for folder in (own / "student", checkpoints(own)[-1] / "student"):
        for saved, expected in zip(statistics(folder), by_hand.buffers(), strict=True):
            torch.testing.assert_close(saved, expected)

    def resized_image(self: Domain, index: int) -> np.ndarray:
        if self is domains.target and index == 0:
            raise ValueError("it is gone")
        return whole(self, index)

    whole = Domain.resized_image
    monkeypatch.setattr(Domain, "resized_image", resized_image)
    assert run("again", "--train.max_steps=4", "--optim.warmup_steps=0") == 0
    assert "1 images are left out of the target's statistics. The first: it is gone" in caplog.text


def test_statistics_that_were_not_taken_at_the_end_are_taken_by_the_next_start(run, tmp_path, monkeypatch) -> None:
    few = ("--train.max_steps=4", "--optim.warmup_steps=0")
    assert run("whole", *few) == 0
    with monkeypatch.context() as patch:
        patch.setattr(scores, "take_statistics", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        assert run("out", *few) == 1
    assert [path.name for path in checkpoints(tmp_path / "out" / "t2sda")][-1] == "checkpoint-000004"
    assert run("out", *few, "--resume", "auto") == 0
    saved = [
        T2SDAForSemanticSegmentation.from_pretrained(tmp_path / name / "t2sda" / "student") for name in ("whole", "out")
    ]
    for whole, own in zip(*(network.state_dict().values() for network in saved), strict=True):
        assert torch.equal(whole, own)


def test_a_signal_in_the_evaluation_saves_the_step_before_it(run, tmp_path: Path, domains, monkeypatch) -> None:
    """Step 5 is evaluated and not saved by the clock of save_every 3."""
    whole = Interruptible.labels

    def labels(self, index: int):
        os.kill(os.getpid(), signal.SIGINT)
        return whole(self, index)

    twice = replace(domains.test, table=domains.test.table.select([0, 0]))
    monkeypatch.setattr(command, "open_domains", lambda *_: replace(domains, test=twice))
    with monkeypatch.context() as patch:
        patch.setattr(Interruptible, "labels", labels)
        assert run("out") == 130
    assert checkpoints(tmp_path / "out" / "t2sda")[-1].name == "checkpoint-000005"
    assert run("out", "--resume", "auto") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "t2sda" / "scalars.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "student/miou" in line] == [5, 10, 12]


def test_a_source_image_that_is_gone_is_left_out_of_the_scores(run, tmp_path: Path, monkeypatch, caplog) -> None:
    """Training draws another image; an evaluation of the source must not end the run either."""

    @dataclass(frozen=True)
    class Gone(Interruptible):
        def image(self, index: int) -> np.ndarray:
            if index == 0:
                raise ValueError("street_0.png is gone")
            return self.domain.image(index)

    monkeypatch.setattr(scores, "evenly_spread", lambda domain, *_: Part(Gone(domain, None), range(2), domain.name))
    assert run("out", "--train.max_steps", "1") == 0
    results = json.loads((tmp_path / "out" / "t2sda" / "metrics.json").read_text(encoding="utf-8"))
    assert results["student_source"]["num_images"] == results["teacher_source"]["num_images"] == 1
    assert "1 of the 2 source images that are scored cannot be read any more" in caplog.text
    assert "The first: street_0.png is gone" in caplog.text


def test_an_image_is_called_by_its_file_however_it_is_read(domains) -> None:
    called = where(domains.test, 0)
    assert "row 0" in called
    assert where(Part(Interruptible(domains.test, None), [0], "a part"), 0) == called


@pytest.mark.parametrize("late", ["evaluation", "observation"])
def test_a_signal_around_an_evaluation_loses_no_proxy(run, tmp_path: Path, monkeypatch, late: str) -> None:
    """Step 5 is evaluated and not saved by the clock: the run that goes on evaluates it again, with all it has seen."""

    def proxies(name: str) -> list[dict]:
        lines = read_lines(tmp_path / name / "t2sda" / "scalars.jsonl")
        found = [{key: line[key] for key in line if key.startswith("proxy/")} for line in lines]
        return [line for line in found if line]

    assert run("whole") == 0
    place, name = (Interruptible, "labels") if late == "evaluation" else (loop, "observe")
    made = getattr(place, name)

    def planted(*arguments: object) -> object:
        result = made(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(place, name, planted)
        assert run("out") == 130
    assert checkpoints(tmp_path / "out" / "t2sda")[-1].name == "checkpoint-000005"
    assert run("out", "--resume", "auto") == 0
    assert proxies("out")[-3:] == proxies("whole")


def test_the_sampler_starts_late_without_replaying() -> None:
    """Step 39,999 of 40,000 is the first thing asked for, not the last of 160,000."""
    sampler = PositionSampler(2, 2, 0, 1, 39_999, 40_000)
    assert len(sampler) == 4
    assert list(sampler) == [159_996, 159_997, 159_998, 159_999]


def test_the_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "scalars.jsonl"
    written = [
        {"step": 2, "source": 1.0},
        {"step": 3, "skipped": "loss 'pull' is nan on process 0"},
        {"step": 4, "source": 0.5},
        {"step": 4, "student/miou": 10.0},
        {"step": 6, "source": 0.25},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in written) + '{"step": 8, "sou', encoding="utf-8")
    accelerator = Accelerator(cpu=True)
    start = Progress(4, skipped=1, log={"source": torch.tensor([3.0])})
    with Tracker(accelerator, tmp_path, 10, start, "t", show=False) as tracker:
        assert tracker.skipped == 1
        tracker.add({"source": torch.tensor(5.0)})
        tracker.step_done()
        tracker.flush(6, 0.1)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines[:-1] == written[:3]
    assert (lines[-1]["step"], lines[-1]["source"]) == (6, 4.0)  # the term from the checkpoint counts in the mean


def test_an_evaluation_between_two_lines_is_no_time_of_updates(tmp_path: Path, monkeypatch) -> None:
    """Ten updates of 0.25 s, of which 0.125 s wait for data, with an evaluation of 64 s after the eighth."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: clock.now)
    with Tracker(Accelerator(cpu=True), tmp_path, 10, Progress(), "t", show=False) as tracker:
        for step in range(10):
            if step == 8:
                with tracker.aside():
                    clock.now += 64
                    tracker.observed(8, {}, {"agreement": 0.5})
            clock.now += 0.25
            tracker.waited(0.125)
            tracker.step_done()
        tracker.flush(10, 0.1)
    line = json.loads((tmp_path / "scalars.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (line["seconds_per_step"], line["data_share"]) == (0.25, 0.5)


def test_a_skipped_step_is_said_and_no_mean_shows_it(run, tmp_path: Path, monkeypatch) -> None:
    """The loss of step 4 is infinite; the line of step 4 is the mean of step 3 alone, as log_every is 2."""
    method = METHODS["t2sda"]

    def spoiled(step):
        for graph in method(step):
            factors = {name: float("inf") if step.index == 3 and name == "target" else 1 for name in graph.losses}
            yield replace(graph, losses={name: value * factors[name] for name, value in graph.losses.items()})

    assert run("whole") == 0
    monkeypatch.setitem(METHODS, "t2sda", spoiled)
    assert run("skip", "--train.non_finite", "skip") == 0
    lines = [json.loads(line) for line in (tmp_path / "skip" / "t2sda" / "scalars.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 5, 6, 8, 10, 10, 12, 12]
    assert lines[1] == {"step": 4, "skipped": "loss 'target' is inf on process 0"}
    whole = [json.loads(line) for line in (tmp_path / "whole" / "t2sda" / "scalars.jsonl").read_text().splitlines()]
    assert lines[0]["target"] == whole[0]["target"]
    assert 0 < lines[2]["target"] < 10
    assert json.loads((checkpoints(tmp_path / "skip" / "t2sda")[-1] / "state.json").read_text())["skipped"] == 1

    assert run("stop") == 1
    assert not (tmp_path / "stop" / "t2sda" / "student").exists()
    assert checkpoints(tmp_path / "stop" / "t2sda")[-1].name == "checkpoint-000003"


def test_a_batch_of_ignored_pixels_is_a_finite_zero(run, tmp_path: Path, monkeypatch) -> None:
    method = METHODS["source_only"]
    seen: list[Tensor] = []

    def all_ignored(step):
        step.batch.source_labels.fill_(255)
        for graph in method(step):
            seen.append(graph.losses["source"].detach())
            yield graph

    monkeypatch.setitem(METHODS, "source_only", all_ignored)
    assert run("out", "--method", "source_only", "--train.max_steps", "2") == 0
    assert [value.item() for value in seen] == [0.0, 0.0]


CANARY = "hf_CANARYcanary0123456789CANARY"


@pytest.mark.parametrize(
    ("text", "gone", "stays"),
    [
        (f"401 for token {CANARY}, url x", CANARY, "401 for token"),
        ("https://anna:hunter22@example.org/data", "hunter22", "example.org/data"),
        ("Authorization: Bearer abcdefghijk", "abcdefghijk", "Authorization"),
        ("hub_token: correct-horse", "correct-horse", "hub_token"),
        ('{"api_key": "battery-staple"}', "battery-staple", "api_key"),
        ("unknown --hub_token battery-staple in", "battery-staple", "in"),
        ("WANDB_API_KEY=0123456789abcdef", "0123456789abcdef", "WANDB_API_KEY"),
    ],
)
def test_secrets_are_masked_by_form_and_by_key(text: str, gone: str, stays: str) -> None:
    assert gone not in mask(text)
    assert stays in mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "token: null",
        "tokens per second: 12345678",
        "a tokenizer of 12345 words",
        "sha256 of step 40000",
        "method: t2sda",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert mask(text) == text


def test_a_token_of_the_environment_is_masked_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "just some words here")
    assert mask("see just some words here.") == "see <masked>."


def test_a_canary_reaches_no_file_and_no_line(
    run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment, in a path, in a URL and in a key that does not exist; also when the run fails."""
    monkeypatch.setattr(command, "write_page", write_page)
    monkeypatch.setattr(watch, "save_grid", save_grid)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    secret = "correct-horse-battery"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    short = ("--train.max_steps", "1", "--train.log_with", "[tensorboard]")
    assert run("out", *short, "--test.path", f"https://user:{secret}@example.org/{CANARY}") == 0
    assert run("no", "--hub_token", CANARY) == 2
    assert run("no", CANARY) == 2
    assert run("no", "--model.pretrained", f"https://{CANARY}@example.org/x") == 2
    for word in (CANARY, secret):
        hits = [path for path in tmp_path.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]
        assert not hits
        printed = capfd.readouterr()
        assert word not in printed.out + printed.err
