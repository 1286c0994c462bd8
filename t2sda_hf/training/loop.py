"""The loop: the only caller of backward and of the optimiser."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..batch import UdaBatch
from ..config import LossWeights, RunConfig
from ..evaluation.watch import (
    SELECTED,
    SELECTED_FILE,
    Watch,
    describe_selected,
    panel_due,
    save_panel_of_step,
    selects,
)
from ..methods import Method, Parts
from ..teacher import ema_momentum, update_teacher
from .checkpoint import (
    CheckpointError,
    Progress,
    checkpoint_folder,
    keep_newest,
    optimizer_tensors,
    write_checkpoint,
    write_folder,
)
from .distributed import average_gradients, decided_by_main, largest, whole_tensor
from .optim import learning_rate_factor, set_learning_rate
from .seeding import seed_step
from .stopping import Stopped, StopRequest
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
    evaluate: Callable[[nn.Module], dict[str, Any]]
    save: Callable[[nn.Module, Path], None]  # writes a from_pretrained folder
    stop: StopRequest = field(default_factory=StopRequest)
    watch: Watch | None = None  # proxies, pictures of pseudo-labels; see `observe`
    others: Callable[[], dict[str, dict[str, Any]]] = dict  # results of whatever else is evaluated beside the student
    # Drawn at the end for the trackers, of the student and its results, on the main process: name -> PNG.
    pictures: Callable[[nn.Module, dict[str, dict[str, Any]]], dict[str, Path]] = lambda network, results: {}
    record: Mapping[str, Any] = field(default_factory=dict)  # what the weights depend on, kept in every checkpoint
    whole: Callable[[nn.Module], nn.Module] = lambda network: network  # a copy of a sharded network. Collective


def train(run: Run, start: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Run the updates from `start` to max_steps, and evaluate the last weights. Collective: every process calls it.

    Leaves the newest `keep_checkpoints` checkpoints, the last one after the last update, and student/.

    Returns:
        The results of the last evaluation: "student", and those of `run.others`.

    Raises:
        Stopped: after a signal, with a checkpoint of the last finished update.
        FloatingPointError: if losses or gradients are not finite; see `update`.
        CheckpointError: if a checkpoint cannot be written.
    """
    cfg, limit, student = run.cfg, run.cfg.train, run.parts.student
    start = start or Progress()
    saved = start.step
    took: list[float] = []  # seconds of the first two updates
    with Tracker(run.accelerator, run.folder, limit.max_steps, start, run.folder.name) as tracker:
        student.train()
        for step in range(start.step, limit.max_steps):
            # At the start of the next step, so that a checkpoint is never younger than the evaluation of its weights.
            if step and step % limit.evaluate_every == 0:
                try:
                    results = {"student": run.evaluate(student)} | run.others()
                except Stopped:
                    if step != saved:
                        save_checkpoint(run, tracker, step)
                    raise
                observe(run, step, tracker, results)
            began = time.perf_counter()
            factor = update(run, step, tracker)
            if limit.compile != "none" and len(took) < 2:
                took.append(time.perf_counter() - began)
                if len(took) == 2:
                    tracker.say(
                        f"torch.compile ({limit.compile}) took about {took[0] - took[1]:.1f} s: the first update took "
                        f"{took[0]:.1f} s, the second {took[1]:.1f} s."
                    )
            done = step + 1  # the number of finished updates is the only counter there is
            if _due(done, limit.log_every, limit.max_steps):
                tracker.flush(done, cfg.optim.lr * factor)
            stop = largest(run.stop.number, run.accelerator)
            if stop or _due(done, limit.save_every, limit.max_steps):
                save_checkpoint(run, tracker, done)
                saved = done
            if run.watch is not None and panel_due(done, limit.max_steps, limit.evaluate_every):
                picture(run, done, tracker)
            if stop:
                raise Stopped(stop)
        exported = run.whole(student)

        def export() -> None:
            write_folder(run.folder / "student", lambda folder: run.save(exported, folder), manifest=False)

        decided_by_main(export, run.accelerator, CheckpointError)
        results = {"student": run.evaluate(student)} | run.others()
        observe(run, limit.max_steps, tracker, results)
        if run.accelerator.is_main_process:
            for name, path in run.pictures(exported, results).items():
                tracker.picture(limit.max_steps, name, path)
    return results


def update(run: Run, step: int, tracker: Tracker) -> float:
    """One update of student and teacher; the share of the base learning rate it was made with. Collective.

    If a loss or a gradient is not finite on any process, nothing is updated on any: student, teacher, optimiser and
    class memory stay as they were, buffers too. Then the step is skipped, or the run stops (`train.non_finite`).

    Raises:
        FloatingPointError: naming what was not finite, the step and the process.
    """
    cfg, accelerator, student = run.cfg, run.accelerator, run.parts.student
    all_sum = accelerator.reduce if cfg.pull.sync_stats and accelerator.num_processes > 1 else _unchanged
    factor = learning_rate_factor(step, cfg.optim, cfg.train.max_steps)
    set_learning_rate(run.optimizer, factor)
    before = [
        (m, {name: b.clone() for name, b in m.named_buffers()}) for m in (student, run.parts.teacher, run.parts.memory)
    ]
    seen: list[dict[str, Tensor]] = []
    for micro in range(cfg.train.micro_batches):
        generator = seed_step(cfg.seed, step, accelerator.process_index * cfg.train.micro_batches + micro)
        asked = time.perf_counter()
        batch = next(run.batches).on(accelerator.device)
        tracker.waited(time.perf_counter() - asked)
        for terms in run.method(batch, run.parts, cfg, step, generator, all_sum):  # one graph at a time
            accelerator.backward(weighted_sum(terms, cfg.loss_weights))
            seen.append({name: value.detach() for name, value in terms.items()})
        if run.watch is not None:
            run.watch.look(run.parts.seen)
    # Before the average spreads it. Of a sharded student it is in the pieces of all processes already.
    own = _broken_gradient(student) if accelerator.num_processes > 1 else None
    average_gradients(student, accelerator, cfg.train.micro_batches)  # collective: every rank, every step
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    numbers = [whole_tensor(norm), *(v.float() for terms in seen for v in terms.values())]
    finite = torch.isfinite(torch.stack(numbers)).all()
    if largest(int(not finite), accelerator):  # on every process or on none
        guilty = _broken_loss(seen) or own or (_broken_gradient(student) if accelerator.num_processes == 1 else None)
        run.optimizer.zero_grad()
        for module, buffers in before:
            module.load_state_dict(buffers, strict=False)
        _skip_or_stop(step, guilty, run, tracker)
        return factor
    for terms in seen:
        tracker.add(terms)
    if cfg.optim.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(student.parameters(), cfg.optim.max_grad_norm, norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    update_teacher(run.parts.teacher, student, ema_momentum(step + 1, cfg.uda.ema_momentum))
    tracker.step_done()
    return factor


def observe(run: Run, done: int, tracker: Tracker, results: dict[str, dict[str, Any]]) -> None:
    """Record an evaluation and the proxies; keep the student if it is the best by `select`. Collective."""
    proxies = {} if run.watch is None else run.watch.read(run.accelerator.reduce)
    if results or proxies:
        tracker.observed(done, results, proxies)

    if not decided_by_main(lambda: selects(run.folder, run.cfg.select, proxies), run.accelerator):
        return
    best = run.whole(run.parts.student)

    def write(folder: Path) -> None:
        run.save(best, folder)
        described = describe_selected(run.cfg.select, proxies, done)
        (folder / SELECTED_FILE).write_text(described, encoding="utf-8")

    def keep() -> None:
        write_folder(run.folder / SELECTED, write, manifest=False)

    decided_by_main(keep, run.accelerator, CheckpointError)


def picture(run: Run, done: int, tracker: Tracker) -> None:
    """Picture the pseudo-labels of the last update."""
    if run.accelerator.is_main_process:
        path = save_panel_of_step(run.folder / "panels", done, run.parts.seen, run.cfg.classes)
        if path is not None:
            tracker.picture(done, "pseudo-labels", path)


def save_checkpoint(run: Run, tracker: Tracker, done: int) -> None:
    """Write the checkpoint after `done` updates, then delete old ones. Collective; only the main process writes.

    Raises:
        CheckpointError: on every process.
    """
    parts, progress = run.parts, tracker.progress(done)
    mine = {f"memory.{name}": buffer.cpu() for name, buffer in parts.memory.named_buffers()}
    mine |= {f"log.{name}": values for name, values in progress.log.items()}
    processes = gather_object([mine])
    student, teacher = run.whole(parts.student), run.whole(parts.teacher)
    optimizer = {name: whole_tensor(own) for name, own in optimizer_tensors(parts.student, run.optimizer).items()}

    def write() -> None:
        write_checkpoint(
            checkpoint_folder(run.folder, done),
            save=run.save,
            student=student,
            teacher=teacher,
            optimizer=optimizer,
            processes=processes,
            state={"method": run.cfg.method, "step": done, "skipped": progress.skipped, **run.record},
        )
        keep_newest(run.folder, run.cfg.train.keep_checkpoints)

    decided_by_main(write, run.accelerator, CheckpointError)


def weighted_sum(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Σ weight · loss over the terms that have a weight; the others are for the log."""
    known = vars(weights)
    return torch.stack([known[name] * value for name, value in terms.items() if name in known]).sum()


def _skip_or_stop(step: int, guilty: str | None, run: Run, tracker: Tracker) -> None:
    """Leave the step out, or end the run, by its policy. Collective; `guilty` is what this process found."""
    named = [f"{guilty} on process {run.accelerator.process_index}"] if guilty else []
    reason = "; ".join(gather_object(named)) or "the average of the gradients is not finite"
    limit = run.cfg.train
    if limit.non_finite == "stop":
        raise FloatingPointError(
            f"{reason}, in step {step + 1}. Nothing was updated. Lower optim.lr, set optim.max_grad_norm, or leave out "
            "such steps with train.non_finite skip. Checkpoints are intact."
        )
    if tracker.skipped >= limit.max_skipped_steps:
        raise FloatingPointError(
            f"{reason}, in step {step + 1}, after {tracker.skipped} skipped ones, the most that "
            "train.max_skipped_steps allows. Nothing was updated. Checkpoints are intact."
        )
    tracker.step_skipped(step, reason)


def _broken_loss(seen: list[dict[str, Tensor]]) -> str | None:
    broken = ((name, value) for terms in seen for name, value in terms.items() if not torch.isfinite(value))
    return next((f"loss {name!r} is {value.item()}" for name, value in broken), None)


def _broken_gradient(student: nn.Module) -> str | None:
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    if torch.isfinite(whole_tensor(torch.nn.utils.get_total_norm(list(gradients.values())))):
        return None
    broken = (name for name, gradient in gradients.items() if not torch.isfinite(whole_tensor(gradient)).all())
    return f"the gradient of {next(broken, 'several parameters together')} is not finite"


def _due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


def _unchanged(statistics: Tensor) -> Tensor:
    return statistics
