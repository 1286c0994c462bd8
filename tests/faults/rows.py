"""One function per fault: it tries so often, and says what survived. The rows of the table of campaign.py."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from arena import (
    SAVE_EVERY,
    STEPS,
    Arena,
    Plant,
    at_write,
    checkpoints,
    contents,
    count_writes,
    finish,
    log_of,
    outcome,
    sign,
    signal_self,
    spread,
    states,
    wait_for,
    when_training,
)

from t2sda_hf.methods import METHODS, Graph, Step
from t2sda_hf.training import build, loop
from t2sda_hf.training.checkpoint import newest_valid, verify
from t2sda_hf.training.tracking import Tracker

KEEP_ALL = ("--train.save_every", "1", "--train.keep_checkpoints", "1000")
RESUME = ("--resume", "auto")


@dataclass
class Row:
    """tried = survived + lost + mixed + silent."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0  # the run cannot go on, or ends elsewhere than the undisturbed one
    mixed: int = 0  # a checkpoint that verifies and is not one that was written
    silent: int = 0  # the fault was not said
    notes: list[str] = field(default_factory=list)

    def count(self, verdict: str, note: str = "") -> None:
        self.tried += 1
        setattr(self, verdict, getattr(self, verdict) + 1)
        if verdict != "survived":
            self.notes.append(f"{verdict}: {note}")


class Yard(Arena):
    """An arena with the undisturbed runs everything is compared with."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        super().__init__(folder, seed)
        self._known: dict[tuple, tuple[dict, dict]] = {}

    def undisturbed(self, *arguments: str, two: bool = False, **environment: str) -> tuple[dict, dict]:
        """Outcome of a run that nothing happens to, and the contents of its checkpoints at every step."""
        key = (arguments, two, tuple(environment.items()))
        if key not in self._known:
            out = self.folder / "undisturbed"
            self.clear(out)
            if two:
                code = max(self.run_two(out, *arguments, *KEEP_ALL, **environment))
            else:
                code = self.run(out, *arguments, *KEEP_ALL, **environment)
            assert code == 0, "".join(log.read_text() for log in out.parent.glob("undisturbed*.log"))[-3000:]
            self._known[key] = outcome(out), states(out)
        return self._known[key]

    def judge(
        self, row: Row, out: Path, *arguments: str, two: bool = False, note: str = "", **environment: str
    ) -> None:
        """Compare what a fault left with the undisturbed run, resume, compare again, count, and clean up."""
        expected, at = self.undisturbed(*arguments, two=two, **environment)
        if any(content != at.get(step) for step, content in states(out).items()):
            row.count("mixed", note)
        elif not self.bounded(out):
            row.count("lost", f"{note}: more than {SAVE_EVERY} steps lost")
        else:
            if two:
                codes = self.run_two(out, *arguments, *RESUME, **environment)
            else:
                codes = [self.run(out, *arguments, *RESUME, **environment)]
            if any(codes):
                said = "".join(log.read_text() for log in out.parent.glob(f"{out.name}*.log"))
                row.count("lost", f"{note}: resuming ends with {codes}: {said[-600:]}")
            else:
                same = outcome(out) == expected
                row.count("survived" if same else "lost", f"{note}: another result")
        self.clear(out)

    @staticmethod
    def bounded(out: Path) -> bool:
        """Whether the newest checkpoint is at most a save interval behind the log."""
        log = out / "t2sda" / "scalars.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        logged = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return max([*states(out), 0]) >= max([*logged, 0]) - SAVE_EVERY


def kills_anywhere(yard: Yard, trials: int) -> Row:
    """kill -9 at a moment that is uniform over the training."""
    row, out = Row("kill -9 at any moment"), yard.folder / "kill"
    yard.undisturbed()
    marker = yard.folder / "training"
    child = yard.start(out, plant=when_training(marker))
    wait_for(marker)
    begun = time.monotonic()
    assert finish(child) == 0
    length = time.monotonic() - begun
    yard.clear(out)
    for delay in spread(trials, 0.0, length, yard.random):
        marker.unlink(missing_ok=True)
        child = yard.start(out, plant=when_training(marker))
        wait_for(marker)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        finish(child)
        yard.judge(row, out, note=f"killed after {delay:.3f} s")
    return row


def kills_in_the_save(yard: Yard, trials: int) -> Row:
    """kill -9 just before one of the operations on the disk that write, publish or delete checkpoints."""
    row, out = Row("kill -9 inside a save"), yard.folder / "save"
    total = count_writes(yard, out, "checkpoint-")
    for number in spread(trials, 1, total + 1, yard.random):
        plant = at_write(int(number), signal_self(signal.SIGKILL), "checkpoint-")
        code = yard.run(out, plant=plant)
        assert code == -signal.SIGKILL, (number, code, log_of(out).read_text()[-2000:])
        yard.judge(row, out, note=f"killed at operation {int(number)} of {total}")
    return row


def kills_in_the_retention(yard: Yard, trials: int) -> Row:
    """kill -9 while old checkpoints are deleted."""
    row, out = Row("kill -9 while deleting old"), yard.folder / "retention"
    total = count_writes(yard, out, ".deleted")
    for number in spread(trials, 1, total + 1, yard.random):
        assert yard.run(out, plant=at_write(int(number), signal_self(signal.SIGKILL), ".deleted")) == -signal.SIGKILL
        yard.judge(row, out, note=f"killed at operation {int(number)} of {total}")
    return row


def kills_in_either_phase(yard: Yard, trials: int) -> Row:
    """kill -9 with a baseline: a finished one is not trained again."""
    row, out = Row("kill -9, baseline then method"), yard.folder / "phases"
    both = ("--baseline", "source_only")
    assert yard.run(out, *both) == 0
    expected = outcome(out, "source_only"), outcome(out)
    yard.clear(out)
    for index, step in zip(range(trials), _round((2, STEPS + 2, STEPS, 2 * STEPS - 1, STEPS + 7)), strict=False):
        assert yard.run(out, *both, plant=at_update(step, signal_self(signal.SIGKILL))) == -signal.SIGKILL
        written = out / "source_only" / "metrics.json"
        before = written.stat().st_mtime_ns if written.exists() else None
        code = yard.run(out, *both, *RESUME)
        same = code == 0 and (outcome(out, "source_only"), outcome(out)) == expected
        again = before is not None and written.stat().st_mtime_ns != before
        row.count("survived" if same and not again else "lost", f"trial {index}: exit {code}, trained again: {again}")
        yard.clear(out)
    return row


def resume_matrix(yard: Yard, trials: int) -> Row:
    """Stopped after a step and resumed, also with another number of workers: equal to never stopped."""
    row, out = Row("resume, 48 combinations"), yard.folder / "resume"
    stops = (
        1,
        SAVE_EVERY,
        4,
        5,
        7,
        STEPS - 1,
    )  # first, at a save, in the warm-up, at an evaluation, between, last but one
    cases = [
        (stop, workers, precision, micro)
        for precision in ("no", "bf16")
        for micro in (1, 4)
        for stop in stops
        for workers in (0, 2)
    ]
    # By steps of 5, so that a few of them are of all kinds.
    for stop, workers, precision, micro in [cases[(3 + 5 * i) % len(cases)] for i in range(trials)]:
        fixed = ("--train.micro_batches", str(micro))
        environment = {"ACCELERATE_MIXED_PRECISION": precision}
        plant = at_update(stop, signal_self(signal.SIGTERM))
        code = yard.run(out, *fixed, "--data.num_workers", str(workers), plant=plant, **environment)
        note = f"stop {stop}, workers {workers} then {2 - workers}, {precision}, micro-batches {micro}"
        if code != 143 or list(states(out))[-1] != stop:
            row.count("lost", f"{note}: exit {code}: {log_of(out).read_text()[-500:]}")
            yard.clear(out)
            continue
        expected, _ = yard.undisturbed(*fixed, **environment)
        code = yard.run(out, *fixed, *RESUME, "--data.num_workers", str(2 - workers), **environment)
        same = code == 0 and outcome(out) == expected
        row.count("survived" if same else "lost", f"{note}: exit {code}: {log_of(out).read_text()[-500:]}")
        yard.clear(out)
    return row


def late_start(yard: Yard, trials: int) -> Row:
    """Resumed after 39,999 of 40,000 steps: from the loaded checkpoint to the first batch it takes 2 s at most."""
    row, out = Row("resumed at step 39,999"), yard.folder / "late"
    long = ("--train.max_steps", "40000", "--train.evaluate_every", "50000", "--train.save_every", "50000")
    for _ in range(trials):
        assert yard.run(out, *long, plant=at_update(2, signal_self(signal.SIGTERM))) == 143
        early = _seconds_to_first_batch(yard, out, *long, plant=at_update(1, signal_self(signal.SIGTERM)))
        newest = checkpoints(out / "t2sda")[-1]
        late = newest.rename(newest.with_name("checkpoint-039999"))
        state = json.loads((late / "state.json").read_text())
        (late / "state.json").write_text(json.dumps(state | {"step": 39_999}))
        sign(late)
        took = _seconds_to_first_batch(yard, out, *long)
        note = f"after {took[0]:.2f} s of loading the first batch took {took[1]:.2f} s"
        right = took[1] <= 2 and [path.name for path in checkpoints(out / "t2sda")][-1] == "checkpoint-040000"
        row.count("survived" if right else "lost", note)
        row.notes.append(f"{note}; at step 3 it was {early[0]:.2f} s and {early[1]:.2f} s")
        yard.clear(out)
    return row


def _seconds_to_first_batch(yard: Yard, out: Path, *arguments: str, plant: Plant = lambda: None) -> tuple[float, float]:
    """Seconds that a resumed run takes for loading, and then until it has a batch."""
    timing = out.with_name("timing.json")

    def watched() -> None:
        plant()
        load, waited = build.load_run, Tracker.waited
        times: list[float] = []

        def loaded(*given: object) -> object:
            times.append(time.monotonic())
            progress = load(*given)
            times.append(time.monotonic())
            return progress

        def arrived(self: Tracker, seconds: float) -> None:
            waited(self, seconds)
            if len(times) == 2:
                times.append(time.monotonic())
                timing.write_text(json.dumps([times[1] - times[0], times[2] - times[1]]))

        build.load_run, Tracker.waited = loaded, arrived

    code = yard.run(out, *arguments, *RESUME, plant=watched)
    assert code in (0, 143), log_of(out).read_text()[-2000:]
    loading, starting = json.loads(timing.read_text())
    return loading, starting


def damages(yard: Yard, trials: int) -> Row:
    """Files of the newest checkpoint cut, missing, flipped, zeroed, emptied: said, and the one before is taken."""
    row, out = Row("damaged checkpoint"), yard.folder / "damage"
    assert yard.run(out) == 0
    healthy = out / "t2sda"
    older, newest = checkpoints(healthy)
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    kinds: list[tuple[str, Callable[[bytes], bytes | None]]] = [
        ("missing", lambda data: None),
        ("emptied", lambda data: b""),
        ("cut by a byte", lambda data: data[:-1]),
        ("cut at half", lambda data: data[: len(data) // 2]),
        ("cut after a byte", lambda data: data[:1]),
        ("half zeroed", lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    ]
    kinds += [("bit flipped", lambda data: _flipped(data, yard))] * 14
    planted = [(name, kind) for name in names for kind in kinds]
    yard.random.shuffle(planted)
    for name, (kind, change) in planted[:trials]:
        place = yard.folder / "damaged"
        shutil.copytree(healthy, place)
        path = place / newest.name / name
        data = change(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
        found = newest_valid(place)
        aside = place / f"damaged-{newest.name}"
        if found is None or found[0].name != older.name:
            row.count("silent" if found else "lost", f"{name} {kind}: {found and found[0].name}")
        else:
            right = aside.is_dir() and contents(found[0]) == contents(older)
            row.count("survived" if right else "lost", f"{name} {kind}")
        shutil.rmtree(place)
    yard.clear(out)
    return row


def disk_full(yard: Yard, trials: int) -> Row:
    """No space, or no right to write, at an operation of a save: one typed line, and the checkpoint before stays."""
    row, out = Row("disk full or read-only at every file"), yard.folder / "full"
    partial = "checkpoint-000006.partial"
    total = count_writes(yard, out, partial)
    for index, number in enumerate(spread(min(trials, total), 1, total + 1, yard.random)):

        def fail(code: int = (errno.ENOSPC, errno.EROFS)[index % 2]) -> None:
            raise OSError(code, os.strerror(code))

        _judge_refusal(yard, row, out, at_write(int(number), fail, partial), f"operation {int(number)} of {total}")
    return row


def really_full(yard: Yard, trials: int) -> Row:
    """The same on a small disk in memory; needs the right to mount one."""
    row, place = Row("disk really full"), yard.folder / "small"
    place.mkdir()
    out, keep = place / "out", ("--train.keep_checkpoints", "5")
    for index in range(trials):
        size = 500 + 3000 * index // max(trials, 1)  # kB
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            row.notes.append("not run: no right to mount a disk")
            break
        try:
            code = yard.run(out, *keep)
            subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
            text = log_of(out).read_text()
            said = re.findall(r"^(?:CheckpointError|RunFailed): .*heckpoint.*--resume auto.*$", text, re.MULTILINE)
            if code == 0:
                row.count("survived")
            elif code != 1 or len(said) != 1:
                row.count("silent", f"{size} kB: exit {code}: {text[-800:]}")
            else:
                yard.judge(row, out, *keep, note=f"{size} kB")
        finally:
            subprocess.run(["umount", place], check=True)
    return row


def _judge_refusal(yard: Yard, row: Row, out: Path, plant: Plant, note: str) -> None:
    code = yard.run(out, plant=plant)
    said = [line for line in log_of(out).read_text().splitlines() if line.startswith("CheckpointError: ")]
    left = list((out / "t2sda").glob(".*partial"))
    if code != 1 or len(said) != 1 or "Traceback" in log_of(out).read_text():
        row.count("silent", f"{note}: exit {code}, {said}: {log_of(out).read_text()[-600:]}")
        yard.clear(out)
    elif left:
        row.count("lost", f"{note}: {left} left")
        yard.clear(out)
    else:
        yard.judge(row, out, note=note)


def signals(yard: Yard, trials: int) -> Row:
    """SIGTERM and SIGINT at any moment: exit code, a checkpoint of the last step within 5 s, and the same result."""
    row, out = Row("SIGTERM and SIGINT"), yard.folder / "signal"
    yard.undisturbed()
    marker, stepped = yard.folder / "listening", yard.folder / "stepped"
    for index, delay in enumerate(spread(trials, 0.0, 0.5, yard.random)):
        number = (signal.SIGTERM, signal.SIGINT)[index % 2]
        for path in (marker, stepped):
            path.unlink(missing_ok=True)

        def plant() -> None:
            when_training(marker)()
            at_update(1, stepped.touch)()

        child = yard.start(out, plant=plant)
        wait_for(marker)
        time.sleep(delay)
        os.kill(child, number)
        sent = time.monotonic()
        code, note = finish(child), f"{number.name} after {delay:.3f} s"
        if code != 128 + number or (stepped.exists() and not states(out)):  # before the first step there is nothing
            row.count("lost", f"{note}: exit {code}: {log_of(out).read_text()[-600:]}")
            yard.clear(out)
        elif time.monotonic() - sent > 5:
            row.count("lost", f"{note}: took {time.monotonic() - sent:.1f} s")
            yard.clear(out)
        else:
            yard.judge(row, out, note=note)
    return row


def second_signals(yard: Yard, trials: int) -> Row:
    """A second signal during the save that the first one asked for: an end at once, older checkpoints untouched."""
    row, out = Row("second signal during the save"), yard.folder / "twice"
    for index in range(trials):
        number = (signal.SIGTERM, signal.SIGINT)[index % 2]
        slow = yard.folder / "saving"
        slow.unlink(missing_ok=True)

        def plant(number: int = number, slow: Path = slow) -> None:
            at_update(5, signal_self(number))()

            def wait() -> None:
                slow.touch()
                time.sleep(60)

            at_write(9, wait, "checkpoint-000005.partial")()

        child = yard.start(out, plant=plant)
        wait_for(slow)
        time.sleep(0.6)
        os.kill(child, number)
        sent = time.monotonic()
        code = finish(child)
        if code != 128 + number or time.monotonic() - sent > 1 or list(states(out)) != [SAVE_EVERY]:
            row.count("lost", f"exit {code} after {time.monotonic() - sent:.1f} s, {list(states(out))}")
            yard.clear(out)
        else:
            yard.judge(row, out, note=f"second {number.name}")
    return row


def not_finite(yard: Yard, trials: int) -> Row:
    """NaN or infinity in a loss, a gradient, an image, the teacher: named, and nothing of it reaches the weights."""
    row, out = Row("values that are not finite"), yard.folder / "nan"
    plants = {
        "loss nan": (_spoiled_loss("target", float("nan")), "loss 'target' is nan on process 0"),
        "loss inf": (_spoiled_loss("source", float("inf")), "loss 'source' is inf on process 0"),
        "gradient": (_spoiled_gradient, "the gradient of .* is not finite on process 0"),
        "image": (_spoiled_image, "loss 'source' is nan on process 0"),
        "teacher": (_spoiled_teacher, "loss 'pull' is nan on process 0"),
    }
    cases = [(name, policy) for policy in ("stop", "skip", "limit") for name in plants]
    for name, policy in [cases[(2 + 7 * i) % len(cases)] for i in range(trials)]:
        plant, named = plants[name]
        arguments = {"stop": (), "skip": ("--train.non_finite", "skip")}.get(
            policy, ("--train.non_finite", "skip", "--train.max_skipped_steps", "0")
        )
        code = yard.run(out, *arguments, plant=lambda plant=plant: _planted_at(8, plant))
        text = log_of(out).read_text()
        note = f"{name}, {policy}: exit {code}: {text[-800:]}"
        lines = (out / "t2sda" / "scalars.jsonl").read_text(encoding="utf-8")
        if "changed by" in text:
            row.count("lost", note)
        elif not re.search(f"{named}.*", text) or "NaN" in lines or "Infinity" in lines:
            row.count("silent", note)
        elif policy == "skip":
            skipped = [json.loads(line) for line in lines.splitlines() if "skipped" in line]
            said = [line["step"] for line in skipped if re.search(named, line["skipped"])]
            state = verify(checkpoints(out / "t2sda")[-1])
            right = code == 0 and said == [8] and state["skipped"] == 1 and state["step"] == STEPS
            row.count("survived" if right else "lost", note)
        elif code != 1 or "step 8" not in text:
            row.count("lost", note)
        else:
            yard.judge(row, out, note=note)
        yard.clear(out)
    return row


def not_finite_in_one(yard: Yard, trials: int) -> Row:
    """The same on the second of two processes: it is named, and nothing of it reaches the weights of either."""
    row, out = Row("not finite on one of two processes"), yard.folder / "nan_two"
    plants = {
        "loss": (_spoiled_loss("target", float("nan")), "loss 'target' is nan on process 1"),
        "gradient": (_spoiled_gradient, "the gradient of .* is not finite on process 1"),
    }
    for index, (name, policy) in zip(
        range(trials), [(name, policy) for policy in ("stop", "skip") for name in plants], strict=False
    ):
        spoil, named = plants[name]
        skips = ("--train.non_finite", "skip") if policy == "skip" else ()

        def plant(rank: int, spoil: Callable = spoil) -> None:
            _planted_at(8, spoil if rank == 1 else lambda run: lambda: None)

        codes = yard.run_two(out, *skips, plant=plant)
        texts = [log_of(out, rank).read_text() for rank in "01"]
        note = f"{name}, {policy}, {index}: exit {codes}: {texts[0][-600:]}"
        if any("changed by" in text for text in texts):
            row.count("lost", note)
        elif not re.search(f"{named}(, in)? step 8|step 8 skipped: {named}", texts[0]) or "on process 0" in texts[0]:
            row.count("silent", note)
        elif policy == "skip":
            right = codes == [0, 0] and verify(checkpoints(out / "t2sda")[-1])["skipped"] == 1
            row.count("survived" if right else "lost", note)
        elif codes != [1, 1]:
            row.count("lost", note)
        else:
            yard.judge(row, out, two=True, note=note)
        yard.clear(out)
    return row


def _planted_at(step: int, spoil: Callable[[loop.Run], Callable[[], None]]) -> None:
    """Spoil one update, and watch that it leaves student, teacher, optimiser and memory as they were."""
    update = loop.update

    def planted(run: loop.Run, index: int, tracker: object) -> object:
        if index + 1 != step:
            return update(run, index, tracker)
        before = _everything(run)
        undo = spoil(run)
        try:
            return update(run, index, tracker)
        finally:
            undo()
            after = _everything(run)
            if not all(torch.equal(before[name], after[name]) for name in before):
                print("changed by the rejected step", flush=True)

    loop.update = planted


def _everything(run: loop.Run) -> dict[str, torch.Tensor]:
    modules = {"student": run.parts.networks.student, "teacher": run.parts.networks.teacher, **run.parts.own}
    tensors = {f"{part}.{name}": value.clone() for part, m in modules.items() for name, value in m.state_dict().items()}
    for index, own in enumerate(run.parts.optimizer.state.values()):
        tensors |= {f"optimizer.{index}.{key}": value.clone() for key, value in own.items()}
    return tensors


def _spoiled_loss(term: str, value: float) -> Callable[[loop.Run], Callable[[], None]]:
    def spoil(run: loop.Run) -> Callable[[], None]:
        method = METHODS[run.cfg.method]

        def spoiled(made: Step) -> Iterator[Graph]:
            for graph in method(made):
                losses = {name: loss + value if name == term else loss for name, loss in graph.losses.items()}
                yield replace(graph, losses=losses)

        object.__setattr__(run, "method", spoiled)
        return lambda: object.__setattr__(run, "method", method)

    return spoil


def _spoiled_gradient(run: loop.Run) -> Callable[[], None]:
    parameter = next(iter(run.parts.networks.student.parameters()))
    handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
    return handle.remove


def _spoiled_image(run: loop.Run) -> Callable[[], None]:
    handle = run.parts.networks.student.register_forward_pre_hook(
        lambda module, arguments: (arguments[0] * float("nan"), *arguments[1:])
    )
    return handle.remove


def _spoiled_teacher(run: loop.Run) -> Callable[[], None]:
    norms = (m for m in run.parts.networks.teacher.modules() if isinstance(m, torch.nn.LayerNorm))
    handle = next(norms).register_forward_hook(lambda module, arguments, output: output * float("nan"))
    return handle.remove


def two_killed(yard: Yard, trials: int) -> Row:
    """One of two processes is killed: the other ends within 5 s with one clear line; both resume to the same result."""
    row, out = Row("one of two processes killed"), yard.folder / "two"
    yard.undisturbed(two=True)
    for index, delay in enumerate(spread(trials, 0.0, 0.8, yard.random)):
        _judge_loss(yard, row, out, index % 2, signal.SIGKILL, delay, 5.0)
    return row


def two_frozen(yard: Yard, trials: int) -> Row:
    """One of two processes is frozen: the other ends within train.timeout_seconds."""
    row, out = Row("one of two processes frozen"), yard.folder / "ice"
    yard.undisturbed(two=True)
    for index, delay in enumerate(spread(trials, 0.0, 0.8, yard.random)):
        _judge_loss(yard, row, out, index % 2, signal.SIGSTOP, delay, 6.0, "--train.timeout_seconds", "3")
    return row


def _judge_loss(
    yard: Yard, row: Row, out: Path, victim: int, number: int, delay: float, patience: float, *arguments: str
) -> None:
    marker = yard.folder / "both"
    marker.unlink(missing_ok=True)
    children = yard.start_two(out, *arguments, plant=lambda rank: when_training(marker)() if rank == victim else None)
    wait_for(marker)
    time.sleep(delay)
    os.kill(children[victim], number)
    begun = time.monotonic()
    code = finish(children[1 - victim])
    took = time.monotonic() - begun
    if number == signal.SIGSTOP:
        os.kill(children[victim], signal.SIGKILL)
    finish(children[victim])
    text = log_of(out, str(1 - victim)).read_text()
    lines = [line for line in text.splitlines() if "lost contact" in line]
    note = f"process {victim} after {delay:.2f} s: the other ended with {code} after {took:.1f} s: {text[-600:]}"
    if code == 0:  # the run was over
        row.count("survived")
        yard.clear(out)
    elif code != 1 or len(lines) != 1 or "Traceback" in text or took > patience:
        row.count("silent" if len(lines) != 1 else "lost", note)
        yard.clear(out)
    else:
        yard.judge(row, out, two=True, note=note)


def two_stopped(yard: Yard, trials: int) -> Row:
    """SIGTERM to one of two processes: both save and end with 143; resumed they equal two that were not stopped."""
    row, out = Row("SIGTERM to one of two processes"), yard.folder / "stopped"
    for index, stop in zip(range(trials), _round((4, 7, 9)), strict=False):
        plant = at_update(stop, signal_self(signal.SIGTERM))
        codes = yard.run_two(out, plant=lambda rank, index=index, plant=plant: plant() if rank == index % 2 else None)
        if codes != [143, 143] or list(states(out))[-1] != stop:
            row.count("lost", f"{codes}: {log_of(out, '0').read_text()[-500:]}")
            yard.clear(out)
        else:
            yard.judge(row, out, two=True, note=f"stopped at {stop}")
    return row


def two_sharded(yard: Yard, trials: int) -> Row:
    """Two processes with pieces of the networks (FSDP2): stopped, or one killed, they resume to the same result."""
    row, out = Row("two sharded processes"), yard.folder / "sharded"
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for index, stop in zip(range(trials), _round((7, 4, 9)), strict=False):
        number = (signal.SIGTERM, signal.SIGKILL)[index % 2]
        plant = at_update(stop, signal_self(number))
        codes = yard.run_two(out, plant=lambda rank, plant=plant: plant() if rank == 1 else None, **fsdp)
        if codes != ([143, 143] if number == signal.SIGTERM else [1, -number]):
            row.count("lost", f"{codes}: {log_of(out, '0').read_text()[-500:]}")
            yard.clear(out)
        else:
            yard.judge(row, out, two=True, note=f"{number.name} at {stop}", **fsdp)
    return row


def two_saves(yard: Yard, trials: int) -> Row:
    """Saves of two processes, one after every step: every one is there and whole."""
    row, out = Row("saves of two processes"), yard.folder / "saves"
    codes = yard.run_two(
        out, "--train.max_steps", str(trials), *KEEP_ALL, "--train.log_every", "100", "--train.evaluate_every", "1000"
    )
    found = states(out)
    for step in range(1, trials + 1):
        row.count("survived" if step in found else "lost", f"no checkpoint {step}, exit {codes}")
    yard.clear(out)
    return row


def parallel_starts(yard: Yard, trials: int) -> Row:
    """So many starts in one folder: exactly one runs, the others are refused; then the lock of a killed run is free."""
    row, out = Row("starts in one folder"), yard.folder / "lock"
    children = [yard.start(out) for _ in range(trials)]
    codes = sorted(finish(child) for child in children)
    expected, _ = yard.undisturbed()
    right = codes == [0] + [2] * (trials - 1) and outcome(out) == expected
    for code in codes:
        row.count("survived" if right and code in (0, 2) else "lost", f"exit codes {codes}")
    yard.clear(out)
    return row


def clocks(yard: Yard, trials: int) -> Row:
    """Times of files that go back, stand still or lie ahead: checkpoints are ordered by step."""
    row, out = Row("clock jumps"), yard.folder / "clock"
    for index in range(trials):
        code = yard.run(out, plant=at_update(7, signal_self(signal.SIGTERM)))
        assert code == 143
        for position, path in enumerate(checkpoints(out / "t2sda")):
            os.utime(path, (((-1) ** index * position + 2) * 1e8,) * 2)
        plant = _clock_runs_back if index % 2 else None
        expected, _ = yard.undisturbed()
        code = yard.run(out, *RESUME, plant=plant)
        kept = [path.name for path in checkpoints(out / "t2sda")]
        right = code == 0 and outcome(out) == expected and kept == ["checkpoint-000009", "checkpoint-000012"]
        row.count("survived" if right else "lost", f"exit {code}, kept {kept}")
        yard.clear(out)
    return row


def _clock_runs_back() -> None:
    now, start = time.time, time.time()
    time.time = lambda: start - 1000 * (now() - start)


def at_update(step: int, do: Plant) -> Plant:
    """`do` after so many updates of a process, over all methods it trains."""
    made = 0

    def plant() -> None:
        update = loop.update

        def planted(run: loop.Run, index: int, tracker: object) -> object:
            nonlocal made
            seen = update(run, index, tracker)
            made += 1
            if made == step:
                do()
            return seen

        loop.update = planted

    return plant


def _flipped(data: bytes, yard: Arena) -> bytes:
    position, bit = yard.random.randrange(len(data)), 1 << yard.random.randrange(8)
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


def _round(values: tuple[int, ...]) -> Iterator[int]:
    while True:
        yield from values
