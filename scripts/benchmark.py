"""Measure speed and memory of the central parts on this machine: python scripts/benchmark.py [--rounds 7] [--rows pull]

One thread, process CPU time, variants interleaved in one process; the medians are printed beside their goals. Inputs
are random, so nothing is downloaded.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from t2sda_hf.batch import UdaBatch
from t2sda_hf.config import DataConfig, LossWeights, ModelConfig, RunConfig, TrainConfig, UdaConfig
from t2sda_hf.evaluation.inference import predict_labels
from t2sda_hf.losses.pull import num_queries_per_class, pull_loss, sample_pull
from t2sda_hf.methods import METHODS, Parts
from t2sda_hf.methods.parts import ClassMemory
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.teacher import make_teacher
from t2sda_hf.training.build import build_student
from t2sda_hf.training.checkpoint import Progress
from t2sda_hf.training.loop import Run, update
from t2sda_hf.training.masking import run_masked
from t2sda_hf.training.optim import make_optimizer
from t2sda_hf.training.tracking import Tracker
from t2sda_hf.translate import build_engine


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    goal: str


def interleaved(variants: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """CPU seconds of every variant in every round, after one round to warm up; the order turns with the rounds."""
    times: list[list[float]] = [[] for _ in variants]
    for turn in range(-1, rounds):
        order = range(len(variants)) if turn % 2 else reversed(range(len(variants)))
        for index in order:
            began = time.process_time()
            variants[index]()
            if turn >= 0:
                times[index].append(time.process_time() - began)
    return times


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def extra_memory(function: Callable[[], object]) -> float:
    """Largest resident memory of this process during the call above that before it, in MB, looked at every ms."""
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return (max(peak, process.memory_info().rss) - before) / 1e6


def street_labels(num: int, height: int, width: int, num_classes: int) -> torch.Tensor:
    """(num,H,W) int64 blocky maps in which class c is about 1/(c+1) as frequent as class 0."""
    random = torch.Generator().manual_seed(1)
    frequencies = 1 / torch.arange(1, num_classes + 1)
    cells = torch.multinomial(frequencies, num * (height // 16) * (width // 16), replacement=True, generator=random)
    cells = cells.view(num, height // 16, width // 16)
    return cells.repeat_interleave(16, 1).repeat_interleave(16, 2)


def make_step(cfg: RunConfig, accelerator: Accelerator, folder: Path) -> Callable[[], object]:
    """One update of the real loop on a batch that is there already."""
    height, width = cfg.data.crop_size
    random, num = torch.Generator().manual_seed(0), cfg.train.batch_size

    def images(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (num, 3, rows, columns), dtype=torch.uint8, generator=random)

    batch = UdaBatch(
        source_images=images(height, width),
        source_labels=street_labels(num, height, width, len(cfg.classes)).byte(),
        target_images=images(height, width),
        outer_source=images(*cfg.data.outer_crop_size),
        style_reference=images(*cfg.data.outer_crop_size),
        inner_corner=torch.zeros(num, 2, dtype=torch.int64),
    )

    def batches() -> Iterator[UdaBatch]:
        while True:
            yield batch

    student = build_student(cfg).train()
    parts = Parts(
        student=student,
        teacher=make_teacher(student),
        imagenet=None,
        translate=build_engine(cfg.translate),
        memory=ClassMemory(len(cfg.classes), cfg.projector.dim),
    )
    optimizer = make_optimizer(student.encoder, student, cfg.optim)
    run = Run(cfg, folder, accelerator, parts, METHODS[cfg.method], batches(), optimizer, lambda _: {}, lambda *_: None)
    steps = iter(range(cfg.train.max_steps))
    tracker = Tracker(accelerator, folder, cfg.train.max_steps, Progress(), cfg.method, show=False)
    return lambda: update(run, next(steps), tracker)


def step_rows(rounds: int) -> Iterator[Row]:
    """A whole step of T2S-DA, 2+2 images, against a whole supervised step of the same model on 2 images."""
    cfg = RunConfig(
        model=ModelConfig(size="mit_b0", pretrained=None, head="all_mlp"),
        data=DataConfig(crop_size=(256, 256), outer_crop_size=(256, 512)),
        uda=UdaConfig(ignore_top=0, ignore_bottom=0),
        loss_weights=LossWeights(feature_distance=0),
        train=TrainConfig(log_with=()),
    )
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        steps = [
            make_step(replace(cfg, method=method), accelerator, Path(folder)) for method in ("t2sda", "source_only")
        ]
        ours, supervised = interleaved(steps, rounds)
    yield Row(
        f"T2S-DA step over supervised step, MiT-B0, 256 px, 2+2 images ({statistics.median(ours):.2f} s over "
        f"{statistics.median(supervised):.2f} s)",
        f"{median_ratio(ours, supervised):.2f}",
        "4.3 (FLOP ideal 4.26)",
    )


def pull_rows(rounds: int) -> Iterator[Row]:
    """The pull loss alone, forward and backward, on two source and two target maps of 128 x 128."""
    num_classes, dim, side, num_queries, num_negatives = 19, 256, 128, 128, 1024
    random = torch.Generator().manual_seed(0)
    labels = street_labels(2, side, side, num_classes)
    queries, source, target = (
        torch.randn(2, dim, side, side, generator=random).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    queries.requires_grad_(True)
    counts = labels.flatten().bincount(minlength=num_classes)
    wanted = num_queries_per_class(counts.double(), num_classes, num_queries, "cbqs")
    prototypes, weights = torch.randn(num_classes, dim, generator=random), torch.full((num_classes,), 1 / num_classes)
    unreliable = torch.rand(2, side, side, generator=random) < 0.5

    def forward_backward() -> None:
        samples = sample_pull(labels, labels.flip(0), unreliable, wanted, num_negatives, random)
        loss = pull_loss(queries, source, target, prototypes, samples, weights, temperature=0.2)
        queries.grad = None
        loss.backward()

    rows, features = torch.randn(sum(wanted), dim), torch.randn(num_negatives, dim)

    def two_products() -> None:
        _ = (rows @ features.T) @ features

    times, floor = interleaved([forward_backward, two_products], rounds)
    queries.grad = None
    title = f"pull loss forward and backward (n={num_queries}, m={num_negatives}, d={dim}, {sum(wanted)} queries)"
    yield Row(f"{title}: extra memory, MB", f"{extra_memory(forward_backward):.0f}", "100")
    yield Row(
        f"{title}: time over its two matrix products ({1000 * statistics.median(floor):.0f} ms)",
        f"{median_ratio(times, floor):.2f}",
        "-",
    )


def inference_rows(rounds: int) -> Iterator[Row]:
    """Labels of one 1024x2048 image, MiT-B0, 19 classes: against transformers' SegFormer and its full upsampling."""
    config = T2SDAConfig.from_size("mit_b0", head="all_mlp", num_labels=19)
    ours = T2SDAForSemanticSegmentation(config).eval()
    theirs = SegformerForSemanticSegmentation(
        SegformerConfig(depths=config.depths, hidden_sizes=config.hidden_sizes, num_labels=19)
    ).eval()
    pixels = torch.randn(1, 3, 1024, 2048, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def full() -> torch.Tensor:
        logits = theirs(pixels).logits
        return F.interpolate(logits, size=(1024, 2048), mode="bilinear", align_corners=False).argmax(1)

    def banded() -> torch.Tensor:
        return predict_labels(ours, pixels, (1024, 2048))

    # Memory first, before the allocator keeps what it once had; the smaller one before the larger.
    memory = [extra_memory(banded), extra_memory(full)]
    times = interleaved([banded, full], rounds)
    yield Row(
        f"labels of 1024x2048, time / that of transformers ({statistics.median(times[1]):.1f} s)",
        f"{median_ratio(*times):.2f}",
        "0.55",
    )
    yield Row(
        f"labels of 1024x2048, memory / that of transformers ({memory[1]:.0f} MB)",
        f"{memory[0] / memory[1]:.2f}",
        "0.55",
    )


ROWS: dict[str, Callable[[int], Iterator[Row]]] = {"step": step_rows, "pull": pull_rows, "inference": inference_rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| what | measured | goal, at most |\n| :--- | ---: | ---: |")
    for name in args.rows:
        for row in ROWS[name](args.rounds):
            print(f"| {row.what} | {row.measured} | {row.goal} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
