"""Endurance: the whole machinery of training around a loss of one parameter, 40,000 steps.

    python tests/faults/soak.py [--steps 40000]

Log lines, TensorBoard, checkpoints, retention, teacher, optimiser, proxies and pictures of pseudo-labels are the real
ones. Exit code 1 if memory drifts by more than 2 %, open files are not constant, or 1,000 steps at the beginning and at
the end differ by more than 5 % in processor time (medians of five).
"""

import argparse
import ctypes
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from tiny import tiny_batch, tiny_config, tiny_model  # noqa: E402

from t2sda_hf.evaluation.watch import Watch  # noqa: E402
from t2sda_hf.methods import Graph, Networks, Step  # noqa: E402
from t2sda_hf.models import T2SDAImageProcessor  # noqa: E402
from t2sda_hf.training.checkpoint import checkpoints  # noqa: E402
from t2sda_hf.training.loop import Run, train  # noqa: E402
from t2sda_hf.training.parts import make_parts  # noqa: E402
from t2sda_hf.training.stopping import StopRequest  # noqa: E402
from t2sda_hf.training.store import Store  # noqa: E402
from t2sda_hf.translate import build_engine  # noqa: E402

WARM = 2000  # steps until buffers, caches and the allocator have their size


def measure(steps: int, folder: Path) -> bool:
    torch.set_num_threads(1)
    every = 1000
    cfg = tiny_config(
        f"--train={{max_steps: {steps}, log_every: 50, save_every: {every}, evaluate_every: {every}}}",
        "--optim={warmup_steps: 10}",
    )
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    batch = tiny_batch(cfg)
    rows: list[tuple[int, float, int, float]] = []

    def batches() -> Iterator[object]:
        for step in range(steps + 1):
            if step % every == 0:
                rows.append((step, _resident(), len(os.listdir("/proc/self/fd")), time.process_time()))
            yield batch

    class Batches:
        """Hands the batch over without a copy."""

        def __init__(self) -> None:
            self._all = batches()

        def __next__(self) -> object:
            next(self._all)
            return self

        def on(self, device: torch.device) -> object:
            return batch

    class Evaluation:
        """Scores nothing."""

        def results(self, networks: Networks) -> dict[str, dict]:
            return {"student": {"miou": 1.0, "pixel_accuracy": 1.0, "iou": {"road": 1.0}, "domain": "none"}}

        def take_statistics(self, network: object) -> None:
            pass

        def pictures(self, *given: object) -> dict[str, Path]:
            return {}

    logits = torch.randn(2, len(cfg.classes), 8, 16, generator=torch.Generator().manual_seed(0))
    confidence, pseudo_labels = logits.softmax(dim=1).max(dim=1)
    seen = {"target_images": batch.target_images, "teacher_logits": logits, "source_logits": logits}
    seen |= {"source_labels": batch.source_labels, "pseudo_labels": pseudo_labels, "confidence": confidence}

    def one_parameter(step: Step) -> Iterator[Graph]:
        yield Graph({"source": (next(step.networks.student.parameters()).sum() - 1) ** 2}, seen)

    student, watch = tiny_model(cfg).train(), Watch([1] * len(cfg.classes), threshold=0.5)
    parts = make_parts(cfg, student, build_engine(cfg.translate), accelerator, watch)
    store = Store(folder, cfg, accelerator, T2SDAImageProcessor(), student, record={})
    begun = time.monotonic()
    train(Run(cfg, accelerator, parts, one_parameter, Batches()), Evaluation(), store, StopRequest())
    seconds = time.monotonic() - begun
    rows.append((steps, _resident(), len(os.listdir("/proc/self/fd")), time.process_time()))
    settled = [row for row in rows if WARM <= row[0] < steps]
    drift = settled[-1][1] / settled[0][1] - 1
    files = {row[2] for row in settled}
    costs = [later[3] - earlier[3] for earlier, later in itertools.pairwise(settled)]
    first, last = (statistics.median(part) for part in (costs[:5], costs[-5:]))  # another program can slow down one
    slower = last / first - 1
    log = (folder / "scalars.jsonl").stat().st_size / 1e6
    print(f"steps {steps}, {seconds:.0f} s, {len(checkpoints(folder))} checkpoints left, log {log:.1f} MB")
    print(
        f"resident memory {settled[0][1]:.1f} MB after {WARM} steps, {settled[-1][1]:.1f} MB at the end: {drift:+.1%}"
    )
    print(f"open files {sorted(files)}")
    print(f"processor time of 1,000 steps, median of five: {first:.2f} s first, {last:.2f} s last: {slower:+.1%}")
    return abs(drift) <= 0.02 and len(files) == 1 and abs(slower) <= 0.05


def _resident() -> float:
    """Memory in use, MB: without what waits for the garbage collector, or for the allocator to give it back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return int(not measure(options.steps, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
