"""A run in small, before the real one: what fails late fails now, and what a step costs is measured, not guessed."""

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..config import RunConfig
from ..evaluation.evaluator import evaluate_model
from ..models import T2SDAForSemanticSegmentation
from ..storage import read_lines
from .build import Domains, run_method
from .checkpoint import CheckpointError, checkpoint_folder
from .distributed import decided_by_main
from .resume import Start, config_of, methods_of
from .stopping import StopRequest


def rehearse(
    cfg: RunConfig,
    initial: T2SDAForSemanticSegmentation,
    domains: Domains,
    accelerator: Accelerator,
    described: Mapping[str, Mapping[str, Any]],
    stop: StopRequest,
) -> str:
    """Two updates of every method of the run, with a checkpoint between them and one evaluated image. Collective.

    The second update starts from the checkpoint of the first, as after --resume. All is written into a hidden folder
    where the run will write, and removed again; trackers are left out. A pull that starts later starts at once here,
    or its memory would be missing.

    Args:
        initial, domains: see `run_method`; not changed.
        described: of `build.records`.

    Returns:
        Lines for the user: memory at its peak so far, what a step, an image and a checkpoint cost, and the time that
        makes for the whole run. On a CPU the peak is that of this process, on a GPU that of torch's allocator.

    Raises:
        ValueError: for whatever would have ended the run later, a disk too small for its checkpoints included.
        Stopped: after a signal.
    """
    folder = Path(decided_by_main(lambda: _folder_beside(cfg.output_dir), accelerator, ValueError))
    accelerator.log_with = []
    lines, seconds, needed = [], 0.0, 0
    try:
        for method in methods_of(cfg):
            short, own = _shortened(config_of(cfg, method)), folder / method
            checkpoint = checkpoint_folder(own, 1)
            for steps, start in ((1, Start()), (2, Start(checkpoint))):
                part = replace(short, train=replace(short.train, max_steps=steps))
                record = described[method]
                run_method(part, initial, domains, accelerator, own, start=start, record=record, stop=stop)
            step = _seconds_per_step(own / "scalars.jsonl", cfg) if accelerator.is_main_process else 0.0
            image = _seconds_per_image(own / "student", short, domains, accelerator)
            size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
            needed += (cfg.train.keep_checkpoints + 1) * size
            nets = 1 if short.supervised else 2
            tested = sum(min(cfg.evaluation.limit or len(part), len(part)) for part in domains.test.parts)
            images = nets * (tested + cfg.evaluation.source_images)
            rounds = 1 + (cfg.train.max_steps - 1) // cfg.train.evaluate_every
            whole = cfg.train.max_steps * step + rounds * images * image / accelerator.num_processes
            seconds += whole
            # Updates of the source alone are quicker.
            most = "at most " if config_of(cfg, method).adapts_from else ""
            lines.append(
                f"{method}: {most}{_time(whole)} = {cfg.train.max_steps} steps of {step:.3g} s + {rounds} evaluations "
                f"of {images} images, {image:.3g} s each; a checkpoint has {size / 1e6:.0f} MB"
            )
        free = shutil.disk_usage(folder).free
    except (CheckpointError, FloatingPointError) as error:
        raise ValueError(str(error)) from error
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    if needed > free:
        raise ValueError(
            f"the checkpoints of this run take up to {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free for "
            f"output_dir {cfg.output_dir!r}. Lower train.keep_checkpoints, or pass another --output_dir."
        )
    peak = f"peak memory {_peak_memory(accelerator.device) / 2**30:.2f} GiB per process"
    return "\n".join(["dry run passed; nothing is left behind", *lines, f"in all {_time(seconds)}, {peak}"])


def _folder_beside(output_dir: str) -> str:
    """A new folder on the disk of `output_dir`: in it, or in the nearest folder above that exists."""
    nearest = Path(output_dir).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        return tempfile.mkdtemp(prefix=".dry-run-", dir=nearest)
    except OSError as error:
        raise ValueError(f"output_dir {output_dir!r} cannot be written: {error}. Pass another --output_dir.") from error


def _shortened(cfg: RunConfig) -> RunConfig:
    train = replace(cfg.train, log_every=1, save_every=1, evaluate_every=2)
    evaluation = replace(cfg.evaluation, limit=1, source_images=min(cfg.evaluation.source_images, 1))
    few = min(cfg.uda.target_statistics, cfg.train.batch_size)
    uda, pull = replace(cfg.uda, source_phase=0.0, target_statistics=few), replace(cfg.pull, start_step=0)
    return replace(cfg, train=train, evaluation=evaluation, uda=uda, pull=pull)


def _seconds_per_step(log: Path, cfg: RunConfig) -> float:
    """Of the last update. Workers will be ahead of it later, so waiting for their first batch does not count."""
    last = next(line for line in reversed(read_lines(log)) if "seconds_per_step" in line)
    return float(last["seconds_per_step"] * (1 - (last["data_share"] if cfg.data.num_workers else 0)))


def _seconds_per_image(student: Path, cfg: RunConfig, domains: Domains, accelerator: Accelerator) -> float:
    """Of evaluating the model that was just saved. Collective."""
    model = T2SDAForSemanticSegmentation.from_pretrained(student).to(accelerator.device)
    began = time.perf_counter()
    evaluate_model(
        accelerator.prepare_model(model, evaluation_mode=True),
        domains.test.parts[0],
        image_size=domains.test.input_size(),
        classes=cfg.classes,
        accelerator=accelerator,
        progress=False,
        limit=1,
        **cfg.evaluation.windows,
    )
    return time.perf_counter() - began


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of what getrusage says
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _time(seconds: float) -> str:
    return f"about {timedelta(seconds=round(seconds))} h"
