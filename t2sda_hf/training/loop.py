"""The loop: the only caller of backward and of the optimiser."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..batch import UdaBatch
from ..config import LossWeights, RunConfig
from ..device import advised, constant
from ..errors import CheckpointError, DataFailed, LostFolder, NotFinite
from ..evaluation.watch import falls, panel_due, save_panel_of_step
from ..methods import Method, Step
from ..storage import read_lines
from ..teacher import ema_momentum, follow
from .checkpoint import Progress
from .distributed import all_finite, average_gradients, decided_by_main, largest, whole_tensor
from .optim import learning_rate_factor, set_learning_rate
from .parts import Buffers, Parts
from .scores import Evaluation
from .seeding import seed_step
from .stopping import Stopped, StopRequest
from .store import Store
from .tracking import Tracker

_FAILED = 1000  # greater than the number of any signal


@dataclass(frozen=True)
class Run:
    """What an update needs."""

    cfg: RunConfig
    accelerator: Accelerator
    parts: Parts
    method: Method
    batches: Iterator[UdaBatch]


def train(
    run: Run, evaluation: Evaluation, store: Store, stop: StopRequest, start: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Run the updates from `start` to max_steps, and evaluate the last weights. Collective: every process calls it.

    Leaves the newest `keep_checkpoints` checkpoints, the last one after the last update, and student/. Whatever ends it
    in between, a checkpoint of the last finished update is written first, see `_saved_first`.

    Args:
        run: what is trained.
        evaluation: how it is scored.
        store: where it is kept.
        stop: signals are noted there.
        start: what was done before; None: nothing.

    Returns:
        The results of the last evaluation, see `Evaluation.results`.

    Raises:
        Stopped: after a signal.
        DataFailed: if the next batch cannot be read; see `update`.
        NotFinite: if losses or gradients are not finite; see `update`.
        CheckpointError: if a checkpoint cannot be written.
    """
    limit, networks, start = run.cfg.train, run.parts.networks, start or Progress()
    at, took, ended = _Position(start.step, start.step), list[float](), ""  # took: seconds of the first two updates
    with (
        Tracker(run.accelerator, store.folder, limit.max_steps, start, store.folder.name) as tracker,
        _saved_first(run, store, tracker, at),
    ):
        networks.student.train()
        for step in range(start.step, limit.max_steps):
            # At the start of the next step, so that a checkpoint is never younger than the evaluation of its weights.
            if step and step % limit.evaluate_every == 0:
                with tracker.aside():
                    evaluation.take_statistics(networks.student)
                    results = evaluation.results(networks)
                    at.watched = Buffers([] if run.parts.watch is None else [run.parts.watch])
                    at.watched.keep()
                    observe(run, step, tracker, store, results)
                if ended := fallen(run, store):
                    tracker.say(f"After {step} updates: {ended}")
                    if at.done > at.saved:
                        at.watched.restore()
                        store.save_checkpoint(run.parts, tracker.progress(step))
                        at.saved = step
                    break
            began = time.perf_counter()
            with advised(_needing_less(run.cfg)):
                seen = update(run, step, tracker)
            _say_compiled(took, time.perf_counter() - began, limit.compile, tracker)
            done = at.done = step + 1  # the number of finished updates is the only counter there is
            at.watched = Buffers([])
            if _due(done, limit.log_every, limit.max_steps):
                tracker.flush(done, run.cfg.optim.lr * learning_rate_factor(step, run.cfg.optim, limit.max_steps))
            number = largest(stop.number, run.accelerator)
            if done == limit.max_steps:  # before the last checkpoint, of which the teacher gets them
                evaluation.take_statistics(networks.student)
            if number or _due(done, limit.save_every, limit.max_steps):
                store.save_checkpoint(run.parts, tracker.progress(done))
                at.saved = done
            if panel_due(done, limit.max_steps, limit.evaluate_every):
                picture(run, done, tracker, store, seen)
            del seen  # its maps are large
            if number:
                raise Stopped(number)
        if start.step == limit.max_steps:  # a run may have ended before it had them
            evaluation.take_statistics(networks.student)
        student = store.save_student(networks.student)
        if not ended:
            results = evaluation.results(networks)
            observe(run, limit.max_steps, tracker, store, results)
        if run.accelerator.is_main_process:
            for name, path in evaluation.pictures(student, results, store.folder / "panels").items():
                tracker.picture(at.done, name, path)
    return results


@dataclass
class _Position:
    done: int  # finished updates
    saved: int  # of these, how many the newest checkpoint holds
    # The watch before the evaluation after `done` updates took its sums: a run that goes on there evaluates again.
    watched: Buffers = field(default_factory=lambda: Buffers([]))


@contextmanager
def _saved_first(run: Run, store: Store, tracker: Tracker, at: _Position) -> Iterator[None]:
    """Whatever ends a run: write a checkpoint of the last finished update first, if there is none and it can be.

    It cannot where the numbers themselves are in doubt, nor where only this process of several knows of the end.
    """
    try:
        yield
    except BaseException as error:
        doubtful = tracker.torn or isinstance(error, NotFinite | CheckpointError | LostFolder)
        known = run.accelerator.num_processes == 1 or isinstance(error, Stopped | DataFailed)
        if known and not doubtful and at.done > at.saved:
            at.watched.restore()
            store.save_checkpoint(run.parts, tracker.progress(at.done))
        raise


def update(run: Run, step: int, tracker: Tracker) -> Mapping[str, Any]:
    """One update of student and teacher. Collective.

    If a loss or a gradient is not finite on any process, nothing is updated on any: student, teacher, optimiser, class
    memory and watch stay as they were, buffers too. Then the step is skipped, or the run stops (`train.non_finite`).
    They stay as they were also if anything else goes wrong before the optimiser's step.

    Returns:
        What was seen in the last micro-batch, see `Graph.seen`.

    Raises:
        NotFinite: naming what was not finite, the step and the process.
        DataFailed, Stopped: see `read`.
    """
    batches = read(run, step, tracker)
    cfg, accelerator, parts = run.cfg, run.accelerator, run.parts
    # Before `halves` are in place, which hide them.
    trained, averaged, statistics = parts.trained, parts.averaged, parts.statistics
    set_learning_rate(parts.optimizer, learning_rate_factor(step, cfg.optim, cfg.train.max_steps))
    parts.buffers.keep()
    if cfg.train.compile == "cuda_graphs":  # what graphs made for the update before may be overwritten from here on
        torch.compiler.cudagraph_mark_step_begin()
    logged: list[dict[str, Tensor]] = []
    seen: Mapping[str, Any] = {}
    try:
        with nullcontext() if parts.halves is None else parts.halves.in_place():
            for micro in range(cfg.train.micro_batches):
                seen = {}  # the maps of the micro-batch before are large
                seen = learn(run, next_step(run, step, micro, batches.pop(0)), logged)
    except BaseException:
        parts.buffers.restore()
        raise
    # Before the average spreads it. Of a sharded student it is in the pieces of all processes already.
    own = _gradient_norms(trained) if accelerator.num_processes > 1 else None
    average_gradients(trained, statistics, accelerator, cfg.train.micro_batches)  # collective: every rank, every step
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    numbers = [whole_tensor(norm), *(value.float() for terms in logged for value in terms.values())]
    if not all_finite(numbers, accelerator):  # on every process or on none
        norms = _gradient_norms(trained) if own is None else own
        guilty = _broken_loss(logged) or _broken_gradient(norms, parts.networks.student)
        parts.optimizer.zero_grad()
        parts.buffers.restore()
        _skip_or_stop(step, guilty, run, tracker)
        return seen
    tracker.torn = True
    for terms in logged:
        tracker.add(terms)
    if cfg.optim.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, cfg.optim.max_grad_norm, norm)
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    follow(averaged, trained, ema_momentum(step + 1, cfg.uda.ema_momentum))
    tracker.torn = False
    tracker.step_done()
    return seen


def read(run: Run, step: int, tracker: Tracker) -> list[UdaBatch]:
    """The micro-batches of the update after `step`, still on the CPU; the wait is put down. Collective.

    Raises:
        DataFailed: on every process, if one of them cannot read its own.
        Stopped: on every process, if one of them was told to stop while it waited.
    """
    asked, read, reason, number = time.perf_counter(), list[UdaBatch](), "", 0
    try:
        read = [next(run.batches) for _ in range(run.cfg.train.micro_batches)]
        tracker.redrawn([text for batch in read for text in batch.redrawn], step)
    except Stopped as error:
        number = error.exit_code - 128
    except torch.OutOfMemoryError:  # of the device, while the next batch was sent there
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        # a worker hands on its traceback as the text of the error; what went wrong is its last line
        name, last = type(error).__name__, (str(error).strip().splitlines() or [""])[-1]
        reason = last if last.startswith(name) else f"{name}: {last}"
    tracker.waited(time.perf_counter() - asked)
    told = largest(_FAILED if reason else number, run.accelerator)
    if told == _FAILED:
        raise DataFailed("; ".join(gather_object([reason] if reason else [])))
    if told:
        raise Stopped(told)
    return read


def next_step(run: Run, index: int, micro: int, batch: UdaBatch) -> Step:
    """A micro-batch with all that the objective needs for it."""
    cfg, accelerator, parts = run.cfg, run.accelerator, run.parts
    slot = accelerator.process_index * cfg.train.micro_batches + micro
    generators = seed_step(cfg.seed, index, slot, accelerator.device)
    batch = batch.on(accelerator.device)
    shared = cfg.pull.sync_stats and accelerator.num_processes > 1
    sum_over_processes = accelerator.reduce if shared else alone
    return Step(batch, parts.networks, cfg, parts.memory, *generators, sum_over_processes, index)


def learn(run: Run, step: Step, logged: list[dict[str, Tensor]]) -> Mapping[str, Any]:
    """Add the gradients of one micro-batch to those that are there, and its numbers to `logged`; returns what was seen.

    Here, so that the last graph ends with it.
    """
    seen: dict[str, Any] = {}
    for graph in run.method(step):  # one at a time
        backward(graph.losses, run.cfg.loss_weights, run.parts.trained)
        if run.parts.halves is not None:
            run.parts.halves.hand_over()
        logged.append(graph.logged)
        seen |= graph.seen
    if run.parts.watch is not None:
        run.parts.watch.look(seen)
    return seen


def observe(run: Run, done: int, tracker: Tracker, store: Store, results: dict[str, dict[str, Any]]) -> None:
    """Record an evaluation and the proxies; keep the student if it is the best by `select`. Collective."""
    watch = run.parts.watch
    proxies = {} if watch is None else watch.read(run.accelerator.reduce)
    if results or proxies:
        tracker.observed(done, results, proxies)
    store.save_selected(run.parts.networks.student, proxies, done)


def fallen(run: Run, store: Store) -> str:
    """A sentence if the selecting proxy fell in the last train.stop_after_falls evaluations; "" if not. Collective."""
    limit, name = run.cfg.train.stop_after_falls, run.cfg.select.removeprefix("proxy:")
    if not limit:
        return ""

    def look() -> str:
        logged = read_lines(store.folder / "scalars.jsonl")  # a run that goes on finds in it what it had
        values = [entry[f"proxy/{name}"] for entry in logged if f"proxy/{name}" in entry]
        shown = ", ".join(f"{value:.3f}" for value in values[-limit - 1 :])
        return f"the proxy {name} has fallen {limit} times in a row ({shown})." if falls(values) >= limit else ""

    return decided_by_main(look, run.accelerator)


def picture(run: Run, done: int, tracker: Tracker, store: Store, seen: Mapping[str, Any]) -> None:
    """Picture the pseudo-labels of the last update. Collective."""
    decided_by_main(store.owned, run.accelerator, LostFolder)
    if run.accelerator.is_main_process:
        path = save_panel_of_step(store.folder / "panels", done, seen, run.cfg.classes)
        if path is not None:
            tracker.picture(done, "pseudo-labels", path)


def backward(losses: Mapping[str, Tensor], weights: LossWeights, trained: Iterable[nn.Parameter]) -> None:
    """Add the gradients of Σ weight · loss, of one graph, to those of the parameters that are trained.

    The weights are the first gradients: the sum is not made. What other graphs left is put aside, and added at the end
    for all parameters at once. By itself autograd adds parameter by parameter, with a kernel for each.
    """
    first = [constant((float(vars(weights)[name]),), loss.device, loss.dtype)[0] for name, loss in losses.items()]
    before = [(parameter, parameter.grad) for parameter in trained if parameter.grad is not None]
    for parameter, _ in before:
        parameter.grad = None
    torch.autograd.backward(list(losses.values()), first)
    both = [(old, parameter.grad) for parameter, old in before if parameter.grad is not None]
    if both:
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
    for parameter, old in before:
        parameter.grad = old


def _say_compiled(took: list[float], seconds: float, backend: str, tracker: Tracker) -> None:
    """After the second update of a compiled run: what compiling cost. `took` has the seconds of those before."""
    if backend != "none" and len(took) < 2:
        took.append(seconds)
        if len(took) == 2:
            tracker.say(
                f"torch.compile ({backend}) took about {took[0] - took[1]:.1f} s: the first update took "
                f"{took[0]:.1f} s, the second {took[1]:.1f} s."
            )


def _skip_or_stop(step: int, guilty: str | None, run: Run, tracker: Tracker) -> None:
    """Leave the step out, or end the run, by its policy. Collective; `guilty` is what this process found."""
    named = [f"{guilty} on process {run.accelerator.process_index}"] if guilty else []
    reason = "; ".join(gather_object(named)) or "the average of the gradients is not finite"
    limit = run.cfg.train
    if limit.non_finite == "stop":
        raise NotFinite(
            f"{reason}, in step {step + 1}. Nothing was updated. Lower optim.lr, set optim.max_grad_norm, or leave out "
            "such steps with train.non_finite skip."
        )
    if tracker.skipped >= limit.max_skipped_steps:
        raise NotFinite(
            f"{reason}, in step {step + 1}, after {tracker.skipped} skipped ones, the most that "
            "train.max_skipped_steps allows. Nothing was updated."
        )
    tracker.step_skipped(step, reason)


def _broken_loss(logged: list[dict[str, Tensor]]) -> str | None:
    broken = ((name, value) for numbers in logged for name, value in numbers.items() if not torch.isfinite(value))
    return next((f"loss {name!r} is {value.item()}" for name, value in broken), None)


def _gradient_norms(trained: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """The norm of each gradient, by the identity of its parameter. No wait."""
    gradients = {id(p): p.grad for p in trained if p.grad is not None}
    return dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))


def _broken_gradient(norms: Mapping[int, Tensor], student: nn.Module) -> str | None:
    """Collective if the student is sharded: the pieces of all processes make a norm."""
    whole = torch.stack([whole_tensor(norm) for norm in norms.values()])
    if torch.isfinite(torch.linalg.vector_norm(whole)):
        return None
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    broken = (names[own] for own, norm in zip(norms, whole.tolist(), strict=True) if not math.isfinite(norm))
    return f"the gradient of {next(broken, 'several parameters together')} is not finite"


def _needing_less(cfg: RunConfig) -> str:
    """Which keys to change where an update needs too much memory, those first that change the result least."""
    keys = [] if cfg.model.activation_checkpointing else ["set model.activation_checkpointing true"]
    if cfg.train.precision != "bf16":
        keys.append("set train.precision bf16")
    if cfg.hrda.enabled and cfg.hrda.crops_at_once != 1:
        keys.append("set hrda.crops_at_once 1")
    if cfg.train.batch_size > 1:
        size, micro = cfg.train.batch_size, cfg.train.micro_batches
        keys.append(f"lower train.batch_size {size} and raise train.micro_batches {micro}")
    keys.append(f"lower data.crop_size {list(cfg.data.crop_size)}")
    text = ", or ".join(keys)
    return f"{text[:1].upper()}{text[1:]}. `t2sda estimate` says what each of them needs."


def _due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


def alone(statistics: Tensor) -> Tensor:
    """The sum over processes of a run that has one, or whose processes keep their own."""
    return statistics
