"""A tiny run, and commands in processes of their own."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from t2sda_hf.errors import Stopped
from t2sda_hf.training import loop

ROOT = Path(__file__).parents[1]
TINY_NETWORK = """
model: {size: mit_b0, pretrained: null, head: all_mlp, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16],
        num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 8}
projector: {hidden: 8, dim: 8}
"""
# A few steps on generated streets with an encoder of a few thousand parameters.
TINY_RUN = (
    TINY_NETWORK
    + """method: t2sda
classes: [road, sidewalk, building, pole, traffic sign, vegetation, sky, person, car, bus]
source: {path: streets-source, num_images: 6}
target: {path: streets-target, num_images: 6}
test: {path: streets-target, split: validation, num_images: 3}
data: {crop_size: [32, 64], outer_crop_size: [64, 96], cat_max_ratio: 0.9}
rcs: {min_pixels: 5}
uda: {ignore_top: 0, ignore_bottom: 0, pseudo_threshold: 0.1}
pull: {num_queries: 8, num_negatives: 16}
optim: {lr: 1e-3, warmup_steps: 0}
train: {max_steps: 3, batch_size: 1, log_every: 1, num_threads: 1, log_with: []}
loss_weights: {feature_distance: 0}
"""
)


OWN = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pictures and charts of a training only the files are written: matplotlib takes longer than the rest."""
    train = "t2sda_hf.commands.train"
    monkeypatch.setattr(f"{train}.save_panel", lambda *_, **__: None)
    monkeypatch.setattr(f"{train}.write_page", lambda folder: folder / "index.html")
    monkeypatch.setattr("t2sda_hf.evaluation.watch.save_grid", lambda path, *_: path.write_bytes(b"a picture"))


def stopped_before(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Stop the runs of this test as SIGTERM does, before these updates, counted from 1 over all of them."""
    update, asked = loop.update, count(1)

    def planted(*arguments: Any) -> object:
        if next(asked) in updates:
            raise Stopped(signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(loop, "update", planted)


def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and charts are put together as always, and one pixel is written: matplotlib's painting takes longest."""

    def written(figure: Figure, file: Path | IO[bytes], **_: object) -> None:
        Image.new("RGB", (1, 1)).save(file, format="PNG")

    monkeypatch.setattr(Figure, "savefig", written)


def t2sda(*words: str) -> str:
    """What a command prints that runs on the CPU in a process of its own, or in those that its flags ask for."""
    return _printed([sys.executable, "-m", "t2sda_hf", *words, "--cpu"])


def launch(processes: int, script: str, *arguments: str) -> str:
    """The same of a script under `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # On a CPU accelerate starts several processes only this way: --cpu would silently start one.
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    return _printed([*command, script, *arguments], ACCELERATE_USE_CPU="true")


def fork(processes: int, *words: str) -> str:
    """What so many processes print that run `python` with these words as a launcher starts them, without the imports.

    What an import reads of the environment (settings of the Hub, the number of threads) is that of the first call.
    """
    environment = os.environ | OWN | {"ACCELERATE_USE_CPU": "true"}
    each = [dict(environment) for _ in range(processes)]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        for rank, own in enumerate(each):
            own |= where | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    server = _forks()
    with tempfile.TemporaryDirectory() as folder:
        request = {"folder": folder, "processes": [(words, own) for own in each]}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        out, err = (
            "".join((Path(folder) / f"{name}{rank}").read_text(encoding="utf-8") for rank in range(processes))
            for name in ("out", "err")
        )
    assert not any(codes), f"{codes}: {err[-3000:]}"
    return out


@cache
def _forks() -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "forks.py")]
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | OWN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # it ends with its input
    return server


def _printed(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | OWN | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
