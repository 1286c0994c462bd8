"""The loop: the only caller of backward and of the optimiser."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..batch import UdaBatch
from ..config import LossWeights, RunConfig
from ..methods import Method, Parts
from ..teacher import ema_momentum, update_teacher
from .distributed import average_gradients
from .optim import learning_rate_factor, set_learning_rate
from .seeding import seed_step
from .tracking import Tracker


@dataclass(frozen=True)
class Run:
    """The built parts of a run; `training.build` makes it."""

    cfg: RunConfig
    folder: Path
    accelerator: Accelerator
    parts: Parts
    method: Method
    batches: Iterator[UdaBatch]
    optimizer: torch.optim.Optimizer
    evaluate: Callable[[torch.nn.Module], dict[str, Any]]
    save: Callable[[Path], None]


def train(run: Run, start_step: int = 0) -> None:
    """Run the updates start_step .. max_steps - 1. Collective: every process calls it."""
    cfg, limit, student = run.cfg, run.cfg.train, run.parts.student
    with Tracker(run.accelerator, run.folder, limit.max_steps, start_step, run.folder.name) as tracker:
        student.train()
        for step in range(start_step, limit.max_steps):
            factor = update(run, step, tracker)
            done = step + 1  # the number of finished updates is the only counter there is
            if _due(done, limit.log_every, limit.max_steps):
                tracker.flush(done, cfg.optim.lr * factor)
            if _due(done, limit.evaluate_every, limit.max_steps) and done < limit.max_steps:
                tracker.result(done, "student", run.evaluate(student))
            if _due(done, limit.save_every, limit.max_steps) and done < limit.max_steps:
                run.save(run.folder / f"checkpoint-{done:06d}" / "student")
        run.save(run.folder / "student")


def update(run: Run, step: int, tracker: Tracker) -> float:
    """One update of student and teacher; the share of the base learning rate it was made with. Collective."""
    cfg, accelerator, student = run.cfg, run.accelerator, run.parts.student
    all_sum = accelerator.reduce if cfg.pull.sync_stats and accelerator.num_processes > 1 else _unchanged
    factor = learning_rate_factor(step, cfg.optim, cfg.train.max_steps)
    set_learning_rate(run.optimizer, factor)
    for micro in range(cfg.train.micro_batches):
        generator = seed_step(cfg.seed, step, accelerator.process_index * cfg.train.micro_batches + micro)
        asked = time.perf_counter()
        batch = next(run.batches).on(accelerator.device)
        tracker.waited(time.perf_counter() - asked)
        for terms in run.method(batch, run.parts, cfg, step, generator, all_sum):  # one graph at a time
            accelerator.backward(weighted_sum(terms, cfg.loss_weights))
            tracker.add(terms)
    average_gradients(student, accelerator, cfg.train.micro_batches)  # collective: every rank, every step
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    stop_if_not_finite(norm, step, tracker, accelerator)  # before the update, on every process
    if cfg.optim.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), cfg.optim.max_grad_norm, norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_teacher(run.parts.teacher, student, ema_momentum(step + 1, cfg.uda.ema_momentum))
    tracker.step_done()
    return factor


def weighted_sum(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Σ weight · loss over the terms that have a weight; the others are for the log."""
    known = vars(weights)
    return torch.stack([known[name] * value for name, value in terms.items() if name in known]).sum()


def stop_if_not_finite(norm: Tensor, step: int, tracker: Tracker, accelerator: Accelerator) -> None:
    """Raise before a non-finite gradient reaches the weights. Gradients are averaged, so every process raises.

    Raises:
        FloatingPointError: naming the term, if it was a loss of this process, the step and the process.
    """
    if torch.isfinite(norm):
        return
    guilty = tracker.guilty() or "a gradient is not finite while every loss here is"
    raise FloatingPointError(
        f"{guilty} at step {step} on process {accelerator.process_index}. Nothing was updated. "
        "Lower optim.lr or set optim.max_grad_norm; the last checkpoint is intact."
    )


def _due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


def _unchanged(statistics: Tensor) -> Tensor:
    return statistics
