"""Estimate the memory and the time of a run before it starts, on this machine and on GPUs. Also count its operations.

    t2sda estimate demo
    t2sda estimate gta_cityscapes/t2sda_daformer --train.precision bf16
    t2sda estimate mine.yaml --measure 3

The command reads no data and no weights. So it takes crops of the largest size where data.crop_size is null: a run on
small images is cheaper.

Times are lower bounds: the shortest time that the arithmetic and the memory of a device allow (its "roofline"). The
figures of a GPU are from its data sheet, those of this machine from a short measurement. The host of a GPU also needs
about 6 microseconds to launch an operation: where that takes longer, it is the bound, and the table says "launches".
Real steps take longer, often two to three times. Evaluations are not counted.

Memory is the memory of tensors. A GPU needs about 1 GB more for its context and its libraries (we have not measured
this).

With --measure N the command makes N real updates here, with random images and weights, and prints their memory beside
the estimate. It does not measure the baseline. For this measurement set MALLOC_MMAP_THRESHOLD_=65536 in the
environment: otherwise glibc keeps freed memory for itself.
"""

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from ..config import RunConfig
from ..training.derive import without_data
from ..training.estimate import GPUS, Cost, Device, count_update, measure_updates, this_machine
from ..training.resume import config_of, methods_of


def run(args: Namespace) -> int:
    cfg: RunConfig = args.cfg
    if args.measure is not None and args.measure < 2:
        raise ValueError(f"--measure needs a whole number from 2, got {args.measure}. The first update is not timed.")
    if cfg == RunConfig():
        raise ValueError("there is nothing to estimate: give a file or a recipe; `t2sda train --list` names them.")
    cfg = without_data(cfg)
    if cfg.train.num_threads is not None:
        torch.set_num_threads(cfg.train.num_threads)
    disable_progress_bar()
    measured = None
    if args.measure is not None:  # before anything else, or the memory would not be this run's
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_updates(config_of(cfg, cfg.method), args.measure, Path(folder))
    here = this_machine()
    for method in methods_of(cfg):
        one = config_of(cfg, method)
        print(report(one, count_update(one), here, measured if method == cfg.method else None), flush=True)
    return 0


def report(cfg: RunConfig, cost: Cost, here: Device, measured: tuple[int, float] | None = None) -> str:
    """The text for one method; `measured` are bytes and CPU seconds of `measure_updates`."""
    height, width = cfg.data.crop_size
    weights = cost.lasting / 1e9
    lines = [
        f"\n{cfg.method}: {cfg.model.size}, {cfg.model.head} head, crops of {height} x {width}, "
        f"{cfg.train.batch_size} x {cfg.train.micro_batches} per process, {cfg.train.precision}",
        f"  per update   {sum(cost.flops) / 1e9:,.1f} GFLOP in {len(cost.flops):,} operations; a GPU's host waits once",
        f"  memory       {cost.peak / 1e9:.2f} GB at the peak, of it {weights:.2f} GB weights and optimiser",
        "  images       " + ", ".join(f"{part} {number}" for part, number in sorted(cost.passes.items())),
        f"  {'':34} {'an update takes':>16} {f'{cfg.train.max_steps:,} updates':>16}   memory",
    ]
    full = cfg.train.max_steps - cfg.adapts_from  # those before take less; a bound does without them
    for device in (here, *GPUS):
        seconds = cost.seconds(device, cfg.train.precision)
        fits = "fits" if cost.peak < 0.9 * device.memory - 1e9 * (device is not here) else "too small"
        if cost.launching(device) >= seconds > 0:
            fits += ", launches"
        run = _time(seconds * full)
        lines.append(f"  {device.name:34} {f'>= {_time(seconds)}':>16} {f'>= {run}':>16}   {fits}")
    if measured is not None:
        size, seconds = measured
        above = seconds / cost.seconds(here, cfg.train.precision)
        lines.append(
            f"  measured here: {size / 1e6:.0f} MB, estimated {cost.peak / 1e6:.0f} MB ({cost.peak / size - 1:+.1%}); "
            f"{_time(seconds)} of CPU time per update, {above:.1f} x the bound"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"
