"""A run folder as data: what training wrote there, read back without any model or image.

<run>/run.json                        command, commit, machine, written at the start (hub.card.record_run)
<run>/data.json                       data and versions, written at the start (`write_data_record`)
<run>/summary.json, panel.png         written at the end
<run>/<method>/resolved_config.yaml   every key
<run>/<method>/scalars.jsonl          losses, evaluations and proxies over time
<run>/<method>/metrics.json           final results of `evaluate_model`
<run>/<method>/panels/step_*.png      pseudo-labels over time
"""

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..storage import read_json, read_lines, write_json

RUN_RECORD, DATA_RECORD = "run.json", "data.json"
BASELINE, UPPER_BOUND = "source_only", "target_only"
SELECTED = "selected"  # folder of the weights that a proxy chose, beside student/
_PACKAGES = ("t2sda_hf", "torch", "transformers", "accelerate", "datasets", "numpy", "pillow", "matplotlib")
_NOT_LOSSES = {"step", "lr", "data_share", "seconds_per_step", "skipped", "trust"}

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class MethodFolder:
    """What one method of a run left.

    Attributes:
        name: of the method.
        path: its folder.
        config: resolved_config.yaml; {} without one.
        losses: term -> (step, mean since the line before).
        trust: weight of the pseudo-labels over time.
        miou: "student", "teacher", "student_source", "teacher_source" -> (step, mIoU in %), the final one included.
        accuracy: the same for the share of pixels that are right.
        iou: the same for the IoU in % of every class by name.
        proxies: name -> (step, value).
        results: metrics.json; {} if the method did not finish.
        panels: (step, picture) of pseudo-labels over time.
        skipped: (step, reason) of updates that were left out.
        unreadable: what was wrong with images that could not be read any more -> how often another one was drawn.
        reached: the last update that says something; fewer than asked for while it goes on, or if it ended early.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    losses: dict[str, Series]
    trust: Series
    miou: dict[str, Series]
    accuracy: dict[str, Series]
    iou: dict[str, list[tuple[int, dict[str, float]]]]
    proxies: dict[str, Series]
    results: Mapping[str, Any]
    panels: list[tuple[int, Path]]
    skipped: list[tuple[int, str]] = field(default_factory=list)
    unreadable: Mapping[str, int] = field(default_factory=dict)
    reached: int = 0


@dataclass(frozen=True)
class RunFolder:
    """A run: its methods, the baseline first, and run.json, data.json, summary.json ({} for one that is not there)."""

    path: Path
    methods: list[MethodFolder]
    record: Mapping[str, Any]
    data: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def labels_from(self) -> str:
        """The domain whose labels were learned; of source_free the one whose images were."""
        return "target" if self.main.name in (UPPER_BOUND, "source_free") else "source"

    @property
    def main(self) -> MethodFolder:
        """The method the run is about: the one that is no baseline."""
        return next((method for method in self.methods if method.name != BASELINE), self.methods[-1])

    @property
    def baseline(self) -> MethodFolder | None:
        return next((method for method in self.methods if method.name == BASELINE and method is not self.main), None)


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder, finished or not.

    Raises:
        ValueError: if there is no run in it.
    """
    folder = Path(folder)
    paths = sorted(path.parent for path in folder.glob("*/resolved_config.yaml"))
    if not paths:
        raise ValueError(
            f"{str(folder)!r} is no run folder: no folder in it has a resolved_config.yaml. Give the output_dir of "
            "`t2sda train`."
        )
    methods = sorted((read_method(path) for path in paths), key=lambda method: method.name != BASELINE)
    others = (read_json(folder / name) or {} for name in (RUN_RECORD, DATA_RECORD, "summary.json"))
    return RunFolder(folder, methods, *others)


def read_method(path: Path) -> MethodFolder:
    """Read the folder of one method, finished or not; a file that is not there leaves its part empty."""
    config = read_yaml(path / "resolved_config.yaml")
    losses: dict[str, Series] = {}
    over_time: dict[str, dict[str, Series]] = {"miou": {}, "pixel_accuracy": {}}
    proxies: dict[str, Series] = {}
    iou: dict[str, list[tuple[int, dict[str, float]]]] = {}
    trust: Series = []
    skipped: list[tuple[int, str]] = []
    unreadable: Counter[str] = Counter()
    lines = read_lines(path / "scalars.jsonl")
    reached = [entry["step"] for entry in lines]
    for entry in lines:
        step = entry["step"]
        if "unreadable" in entry:
            unreadable[entry["unreadable"]] += 1
            continue
        if "skipped" in entry:
            skipped.append((step, entry["skipped"]))
            continue
        trust += [(step, entry["trust"])] if "trust" in entry else []
        per_class: dict[str, dict[str, float]] = {}
        for key, value in entry.items():
            kind, slash, name = key.partition("/")
            if not slash and key not in _NOT_LOSSES:
                losses.setdefault(key, []).append((step, value))
            elif kind == "proxy":
                proxies.setdefault(name, []).append((step, value))
            elif name in over_time:
                over_time[name].setdefault(kind, []).append((step, value))
            elif name.startswith("iou/"):
                per_class.setdefault(kind, {})[name.removeprefix("iou/")] = value
        for kind, scores in per_class.items():
            iou.setdefault(kind, []).append((step, scores))
    results = read_json(path / "metrics.json") or {}
    last = max(reached, default=config.get("train", {}).get("max_steps", 0))
    for kind in ("student", "teacher", "student_source", "teacher_source"):
        if kind in results and results[kind]["miou"] is not None:
            for name, series in over_time.items():
                series[kind] = [*_without(series.get(kind, []), last), (last, results[kind][name])]
            final = {name: score for name, score in results[kind]["iou"].items() if score is not None}
            iou[kind] = [*_without(iou.get(kind, []), last), (last, final)]
    pictures = sorted((path / "panels").glob("step_*.png"))
    panels = [(int(re.findall(r"\d+", picture.stem)[-1]), picture) for picture in pictures]
    miou, accuracy = over_time["miou"], over_time["pixel_accuracy"]
    over_all = trust, miou, accuracy, iou, proxies
    return MethodFolder(path.name, path, config, losses, *over_all, results, panels, skipped, unreadable, last)


def write_data_record(
    folder: Path,
    *,
    seed: int,
    domains: Mapping[str, Mapping[str, Any]],
    classes: Sequence[str],
    source_pixels: Sequence[int],
    sampling: Sequence[float] | None,
    derived: Sequence[str] = (),
    derived_values: Mapping[str, Any] | None = None,
    on_hub: Mapping[str, bool] | None = None,
) -> None:
    """Write data.json: what a run read, and with which versions. run.json, beside it, has the command and the machine.

    Args:
        folder: of the run.
        seed: of the run.
        domains: "source", "target", "test" -> name, num_images and, where known, fingerprint; of several domains also
            "parts", a list of their names, num_images and, where known, pixels per class.
        classes: names.
        source_pixels: pixels per class in the source's labels.
        sampling: probability with which a source image is drawn for each class; None if images are drawn evenly.
        derived: sentences about what was worked out for these data.
        derived_values: key -> value, of those that were null in the config.
        on_hub: role -> whether its path is the id of a data set of the Hub, and no folder.
    """
    record = {
        "seed": seed,
        "domains": domains,
        "on_hub": dict(on_hub or {}),
        "classes": list(classes),
        "source_pixels": [int(count) for count in source_pixels],
        "sampling": None if sampling is None else [float(share) for share in sampling],
        "derived": list(derived),
        "derived_values": dict(derived_values or {}),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "system": platform.platform(),
    }
    write_json(folder / DATA_RECORD, record)


def _without(points: list[tuple[int, Any]], step: int) -> list[tuple[int, Any]]:
    return [point for point in points if point[0] != step]
