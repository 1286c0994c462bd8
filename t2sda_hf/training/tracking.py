"""What a run says while it runs: progress bar, JSON lines, TensorBoard."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..evaluation.table import number
from ..evaluation.trackers import log_picture
from ..storage import read_lines, write_text
from .checkpoint import Progress

MOST_UNREADABLE = 10  # different images that vanish or break during a run, before it ends


class Tracker:
    """Collects scalars of every step and shows their mean. Only the main process writes.

    The same numbers go to the bar, to `scalars.jsonl` and, through accelerate, to the trackers of `train.log_with`.

    `scalars.jsonl` has one object per flush: step (finished updates), the mean of every term since the last flush, lr,
    data_share (share of the time spent waiting for data), seconds_per_step; one per evaluation; one per skipped update,
    with the reason; and one per image that could not be read. What it says of steps after `start`, written by a run
    that was killed, is taken out.

    Attributes:
        skipped: updates left out so far because something was not finite.
        torn: whether an update has only partly reached the weights.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, max_steps: int, start: Progress, title: str, show: bool = True
    ) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        for name, values in start.log.items():
            self._sums[name] = list(values.to(accelerator.device))
        self.skipped, self.torn = start.skipped, False
        self._unreadable: set[str] = set()
        self._waited, self._since, self._steps = 0.0, time.perf_counter(), 0
        main = accelerator.is_main_process
        if main:
            _cut_log(folder / "scalars.jsonl", start.step)
        self._file = (folder / "scalars.jsonl").open("a", encoding="utf-8") if main else None
        self._bar = tqdm(
            total=max_steps, initial=start.step, desc=title, disable=not (main and show), dynamic_ncols=True
        )
        purge = {"tensorboard": {"purge_step": start.step + 1}} if start.step else {}
        accelerator.init_trackers(title, init_kwargs=purge)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self._accelerator.trackers:  # not end_training: that also ends the process group
            tracker.finish()
        self._accelerator.trackers.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is not counted as the time of updates."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def waited(self, seconds: float) -> None:
        """Account for time spent waiting for a batch."""
        self._waited += seconds

    def add(self, terms: dict[str, Tensor]) -> None:
        """Keep the values of one micro-batch; nothing is moved off the device before the flush."""
        for name, value in terms.items():
            self._sums[name].append(value.detach())

    def step_done(self) -> None:
        self._steps += 1
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._accelerator.is_main_process:
            self._bar.write(text)

    def step_skipped(self, step: int, reason: str) -> None:
        """Count an update that was left out, and say why."""
        self.skipped += 1
        self.say(f"step {step + 1} skipped: {reason}")
        self._write_line({"step": step + 1, "skipped": reason})
        self.step_done()

    def redrawn(self, texts: list[str], step: int) -> None:
        """Put down images of the update after `step` that could not be read; each is said once.

        Raises:
            ValueError: if they become too many to be an accident.
        """
        for text in texts:
            if text not in self._unreadable:
                self._unreadable.add(text)
                self._bar.write(f"another image is drawn for one that cannot be read any more: {text}")
            self._write_line({"step": step + 1, "unreadable": text})
        if len(self._unreadable) > MOST_UNREADABLE:
            raise ValueError(
                f"more than {MOST_UNREADABLE} images that were whole at the start cannot be read any more, the last: "
                f"{texts[-1]}"
            )

    def progress(self, done: int) -> Progress:
        """What goes into a checkpoint after `done` updates."""
        log = {name: torch.stack(values).cpu() for name, values in self._sums.items() if values}
        return Progress(done, self.skipped, log)

    def flush(self, done: int, learning_rate: float) -> None:
        """Average over processes and steps, show and write. Collective: every process has the same terms."""
        names = sorted(self._sums)
        means: list[float] = []
        if names:  # there are none if every step since was skipped
            local = torch.stack([torch.stack(self._sums[name]).float().mean() for name in names])
            means = self._accelerator.reduce(local, reduction="mean").tolist()
        now = time.perf_counter()
        scalars = dict(zip(names, means, strict=True)) | {
            "lr": learning_rate,
            "data_share": self._waited / max(now - self._since, 1e-9),
            "seconds_per_step": (now - self._since) / max(self._steps, 1),
        }
        self._sums.clear()
        self._waited, self._since, self._steps = 0.0, now, 0
        shown = {
            name: f"{value:.3g}" for name, value in scalars.items() if name not in ("seconds_per_step", "data_share")
        }
        self._bar.set_postfix(shown | {"data": f"{scalars['data_share']:.0%}"})
        self._write(done, scalars)

    def observed(self, done: int, results: dict[str, dict[str, Any]], proxies: dict[str, float]) -> None:
        """Record an evaluation: mIoU, pixel accuracy and per-class IoU of each result, in %, and the proxies."""
        scores = {f"proxy/{name}": value for name, value in proxies.items()}
        for name, result in results.items():
            scores |= {f"{name}/{score}": result[score] for score in ("miou", "pixel_accuracy")}
            scores |= {f"{name}/iou/{key}": iou for key, iou in result["iou"].items()}
            each = ", ".join(number(one["miou"]) for one in result.get("domains", ()))
            text = f"{number(result['miou'])} ({each})" if each else number(result["miou"])
            self.say(f"step {done}: {name} mIoU {text} on {result['domain']}")
        self._write(done, {key: value for key, value in scores.items() if value is not None})

    def picture(self, done: int, name: str, path: Path) -> None:
        """Show a picture in those trackers that show pictures."""
        log_picture(self._accelerator, name, path, done)

    def _write(self, done: int, scalars: dict[str, float]) -> None:
        self._accelerator.log(scalars, step=done)
        self._write_line({"step": done} | scalars)

    def _write_line(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def _cut_log(path: Path, step: int) -> None:
    """Leave in a log what an uninterrupted run has in it after `step` updates; the evaluation there comes again."""
    if not path.exists():
        return
    kept = []
    for entry in read_lines(path):
        evaluated = any("/" in name for name in entry)
        if entry["step"] < step or (entry["step"] == step and not evaluated):
            kept.append(json.dumps(entry) + "\n")
    write_text(path, "".join(kept))
