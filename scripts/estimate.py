"""Say what a run will cost before it starts: operations, memory and time, here and on GPUs.

    python scripts/estimate.py configs/demo.yaml [--a.key value ...] [--measure 3]

Every key of the config can be given. No data and no weights are read. Times are a roofline: what the arithmetic and
the memory of a device allow at best, from its data sheet (this machine: from a short measurement). Real steps take
longer, often two to three times; on a GPU small kernels also wait for their launch. Memory is that of tensors; a GPU
needs about 1 GB more for its context and its libraries (not measured here). Evaluations are not counted.

--measure N makes N real updates here (not those of a baseline), with random images and weights, and prints their
memory beside the estimate.
glibc keeps freed memory for itself; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives it back.
"""

import logging
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.masking import run_masked
from t2sda_hf.training.estimate import GPUS, Cost, Device, count_update, measure_updates, this_machine
from t2sda_hf.training.resume import config_of, methods_of


def main(arguments: list[str]) -> int:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        updates = 0
        if "--measure" in arguments:
            at = arguments.index("--measure")
            given = "".join(arguments[at + 1 : at + 2])
            if not given.isdigit() or int(given) < 2:
                raise ValueError(
                    f"--measure needs a whole number from 2, got {given!r}. The first update is not timed."
                )
            updates, arguments = int(given), arguments[:at] + arguments[at + 2 :]
        path = arguments.pop(0) if not arguments[0].startswith("--") else None
        cfg = load_config(path, arguments)
        if cfg.train.num_threads is not None:
            torch.set_num_threads(cfg.train.num_threads)
        logging.disable(logging.INFO)
        disable_progress_bar()
        measured = None
        if updates:  # before anything else, or the memory would not be this run's
            with tempfile.TemporaryDirectory() as folder:
                measured = measure_updates(config_of(cfg, cfg.method), updates, Path(folder))
        here = this_machine()
        for method in methods_of(cfg):
            one = config_of(cfg, method)
            print(report(one, count_update(one), here, measured if method == cfg.method else None), flush=True)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


def report(cfg: RunConfig, cost: Cost, here: Device, measured: tuple[int, float] | None = None) -> str:
    """The text for one method; `measured` are bytes and CPU seconds of `measure_updates`."""
    height, width = cfg.data.crop_size
    weights = cost.lasting / 1e9
    lines = [
        f"\n{cfg.method}: {cfg.model.size}, {cfg.model.head} head, crops of {height} x {width}, "
        f"{cfg.train.batch_size} x {cfg.train.micro_batches} per process, {cfg.train.precision}",
        f"  per update   {sum(cost.flops) / 1e9:,.1f} GFLOP in {len(cost.flops):,} operations",
        f"  memory       {cost.peak / 1e9:.2f} GB at the peak, of it {weights:.2f} GB weights and optimiser",
        "  images       " + ", ".join(f"{part} {number}" for part, number in sorted(cost.passes.items())),
        f"  {'':34} {'an update takes':>16} {f'{cfg.train.max_steps:,} updates':>16}   memory",
    ]
    for device in (here, *GPUS):
        seconds = cost.seconds(device, cfg.train.precision)
        fits = "fits" if cost.peak < 0.9 * device.memory - 1e9 * (device is not here) else "too small"
        run = _time(seconds * cfg.train.max_steps)
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


if __name__ == "__main__":
    sys.exit(run_masked(lambda: main(sys.argv[1:])))
