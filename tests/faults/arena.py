"""Runs of `t2sda train` in forked children, where a fault can be planted, and what is compared afterwards.

The parent imports everything and reads the data once and starts no thread, so a run costs about a second.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from t2sda_hf.cli import main
from t2sda_hf.commands import train as command
from t2sda_hf.config import load_config
from t2sda_hf.evaluation import watch
from t2sda_hf.training.checkpoint import MANIFEST, DamagedCheckpoint, checkpoints, verify
from t2sda_hf.training.stopping import StopRequest

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 12, 3
# A few steps on drawn streets with an encoder of a few thousand parameters; every memory the objective has is in use.
RUN = f"""
method: t2sda
classes: [road, sidewalk, building, pole, traffic sign, vegetation, sky, person, car, bus]
source: {{path: streets-source, num_images: 6}}
target: {{path: streets-target, num_images: 6}}
test: {{path: streets-target, split: validation, num_images: 1}}
model: {{size: mit_b0, pretrained: null, head: all_mlp, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16],
        num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 8}}
projector: {{hidden: 8, dim: 8}}
data: {{crop_size: [32, 64], outer_crop_size: [64, 96], cat_max_ratio: 0.9}}
rcs: {{min_pixels: 5}}
uda: {{ignore_top: 0, ignore_bottom: 0, pseudo_threshold: 0.1, target_statistics: 2}}
balance: {{labelled: inverse_root}}
pull: {{num_queries: 8, num_negatives: 16, proto_momentum: 0.9}}
drw: {{absent_conf: ema}}
optim: {{lr: 1e-3, warmup_steps: 4}}
train: {{max_steps: {STEPS}, batch_size: 1, log_every: 2, save_every: {SAVE_EVERY}, evaluate_every: 5, num_threads: 1,
        log_with: [], timeout_seconds: 60}}
loss_weights: {{feature_distance: 0}}
evaluation: {{source_images: 1}}
"""
FILES = ("student/model.safetensors", "teacher/model.safetensors", "optimizer.safetensors", "processes.safetensors")
Plant = Callable[[], None]


class Arena:
    """A place for runs. `folder` is emptied at the end of a trial by `clear`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.set_num_threads(1)
        tqdm.monitor_interval = 0  # no thread of it at a fork
        self.folder, self.random = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "run.yaml"
        self.config.write_text(RUN, encoding="utf-8")
        cfg = load_config(self.config)
        domains = command.open_domains(cfg, SimpleNamespace(num_processes=1, is_main_process=True))
        command.open_domains = lambda *_: domains  # read once for all
        student = command.build_student(cfg)  # what saving and loading import and compile, every child has then
        student.save_pretrained(folder / "warm")
        type(student).from_pretrained(folder / "warm")
        # Pictures and charts take matplotlib longer than the training; of a panel the file is written, not the picture.
        command.save_panel = lambda *_, **__: None
        command.write_page = lambda folder: folder / "index.html"
        watch.save_grid = lambda path, *_: path.write_bytes(b"a picture")

    def start(
        self, out: Path, *arguments: str, plant: Plant | None = None, environment: dict[str, str] | None = None
    ) -> int:
        """Start a run in a child; its process id. What it prints goes to `out`.log, by rank if there are several."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.environ.update(environment or {})
            tqdm.set_lock(threading.RLock())  # the usual one is shared by all forks: a killed child would keep it
            log = os.open(log_of(out, os.environ.get("RANK", "")), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if plant is not None:
                plant()
            code = main(["train", "--config", str(self.config), "--output_dir", str(out), *arguments])
            sys.stdout.flush()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def start_two(
        self, out: Path, *arguments: str, plant: Callable[[int], None] | None = None, **environment: str
    ) -> list[int]:
        """Start a run of two gloo processes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        common |= environment
        return [
            self.start(
                out,
                *arguments,
                plant=None if plant is None else lambda rank=rank: plant(rank),
                environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in (0, 1)
        ]

    def run(self, out: Path, *arguments: str, plant: Plant | None = None, **environment: str) -> int:
        return finish(self.start(out, *arguments, plant=plant, environment=environment))

    def run_two(
        self, out: Path, *arguments: str, plant: Callable[[int], None] | None = None, **environment: str
    ) -> list[int]:
        return [finish(child) for child in self.start_two(out, *arguments, plant=plant, **environment)]

    def clear(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        for log in out.parent.glob(f"{out.name}*.log"):
            log.unlink()


def log_of(out: Path, rank: str = "") -> Path:
    return out.with_name(f"{out.name}{rank}.log")


def finish(child: int, patience: float = 900.0) -> int:
    """Exit code of a child, negative if a signal ended it; one that takes longer is killed."""
    deadline = time.monotonic() + patience
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sign(checkpoint: Path) -> None:
    """A manifest that fits the files as they are now."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    listing = {
        path.relative_to(checkpoint).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (checkpoint / MANIFEST).write_text(json.dumps(listing))


def contents(checkpoint: Path) -> tuple[str, ...]:
    """Digests of what a checkpoint restores."""
    return tuple(digest(checkpoint / name) for name in FILES)


def outcome(out: Path, method: str = "t2sda") -> dict[str, object]:
    """All a finished run leaves that has no clock in it."""
    folder = out / method
    lines = [json.loads(line) for line in (folder / "scalars.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "student": digest(folder / "student" / "model.safetensors"),
        "last checkpoint": contents(checkpoints(folder)[-1]),
        "metrics": (folder / "metrics.json").read_text(encoding="utf-8"),
        "log": [{k: v for k, v in line.items() if k not in ("data_share", "seconds_per_step")} for line in lines],
    }


def states(out: Path, method: str = "t2sda") -> dict[int, tuple[str, ...]]:
    """Step -> contents, of the checkpoints that verify."""
    found = {}
    for path in checkpoints(out / method):
        with contextlib.suppress(DamagedCheckpoint):
            found[verify(path)["step"]] = contents(path)
    return found


def signal_self(number: int) -> Plant:
    return lambda: os.kill(os.getpid(), number)


def when_training(marker: Path) -> Plant:
    """A plant: make a file when signals are being listened to."""

    def plant() -> None:
        enter = StopRequest.__enter__

        def entered(self: StopRequest) -> StopRequest:
            request = enter(self)
            marker.touch()
            return request

        StopRequest.__enter__ = entered

    return plant


def wait_for(path: Path, patience: float = 600.0) -> None:
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.002)


WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def at_write(number: int, do: Callable[[], None], where: str) -> Plant:
    """A plant: `do` just before operation `number` (from 1) on the disk in a path that holds `where`."""
    counted = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal counted
        if (event == "open" or event in WRITES) and where in os.fspath(arguments[0] if arguments else ""):
            counted += 1
            if counted == number:
                do()

    return lambda: sys.addaudithook(_only_paths(hook))


def _only_paths(hook: Callable[[str, tuple], None]) -> Callable[[str, tuple], None]:
    def wrapped(event: str, arguments: tuple) -> None:
        if (event == "open" or event in WRITES) and arguments and isinstance(arguments[0], str | os.PathLike):
            if event == "os.mkdir" and os.path.isdir(arguments[0]):
                return  # writes nothing: "exists" is the answer on a full disk, too
            hook(event, arguments)

    return wrapped


def count_writes(arena: Arena, out: Path, where: str, *arguments: str) -> int:
    """How many operations `at_write` sees in a run."""
    tally = out.with_name(f"{out.name}.count")

    def plant() -> None:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if where in os.fspath(arguments[0]):
                seen += 1

        sys.addaudithook(_only_paths(hook))
        train_all = command.train_all

        def counted(*args: object) -> object:
            results = train_all(*args)
            tally.write_text(str(seen))
            return results

        command.train_all = counted

    assert arena.run(out, *arguments, plant=plant) == 0, log_of(out).read_text()
    arena.clear(out)
    return int(tally.read_text())


def spread(number: int, low: float, high: float, source: random.Random) -> Iterator[float]:
    """`number` values over [low, high], one at random in each equal part."""
    width = (high - low) / number
    for index in range(number):
        yield low + (index + source.random()) * width
