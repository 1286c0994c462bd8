"""index.html of a run folder, and of several: opens without a server and without the network."""

import shlex
from collections.abc import Mapping, Sequence
from os.path import abspath, relpath
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from ..config import changes, domain_names, flatten, said_of_target_labels, without_place
from ..storage import write_text
from .figures import hex_colors, save_class_shares, save_confusion, save_curves, save_losses
from .run_folder import BASELINE, MethodFolder, RunFolder, read_run
from .table import CLASS_SETS, class_sets_of, difference, kinds_of_test, miou_by_domain, spread, subset_miou

CURVES = {
    "student": "student, target",
    "teacher": "teacher, target",
    "student_source": "student, source",
    "teacher_source": "teacher, source",
}
PANEL, NARROW_PANEL = "panel.png", "panel_narrow.png"
WORSE = 0.5  # points of IoU from which a class is said to have got worse or better
_SHOWN = {
    "dataset": ("source.path", "target.path", "test.path", "test.split"),
    "model": ("model.size", "model.head", "model.pretrained"),
    "training": ("train.max_steps", "train.batch_size", "train.micro_batches", "optim.lr", "seed"),
}


def write_page(folder: str | Path) -> Path:
    """Explain a run on one page: its index.html, with charts in figures/ beside it.

    Args:
        folder: output_dir of a run; one that is still training has a page too.

    Returns:
        The page.

    Raises:
        ValueError: if there is no run in it.
    """
    run = read_run(folder)
    main, baseline = run.main, run.baseline
    charts, names = _charts(run), domain_names(main.config)
    results = {title: result for title, result in _results(run).items() if result}
    classes = list(main.config.get("classes", []))
    _write(
        run.path / "index.html",
        "run.html.jinja",
        run=run,
        main=main,
        baseline=baseline,
        title=f"{main.name}: {names['source']} to {names['target']}"
        if names["target"] and run.labels_from == "source"
        else f"{main.name}: {names[run.labels_from]}",
        names=names,
        start=main.config.get("start_model") or "",
        target_labels=said_of_target_labels(main.config),
        panel=_panel(run, run.path),
        repeat=command_to_repeat(run.path, str(run.record.get("command", ""))),
        derived=run.data.get("derived") or [],
        notes=run.summary.get("notes") or [],
        settings={kind: {key: _get(main.config, key) for key in keys} for kind, keys in _SHOWN.items()},
        results=results,
        table=_class_table(main, baseline, classes),
        gain=difference(*(m.results["student"]["miou"] if m and m.results else None for m in (main, baseline))),
        subsets=_subset_table(results, classes),
        by_domain=miou_by_domain(results),
        changes=_changes(main, baseline, classes),
        quality=_pseudo_label_quality(main),
        threshold=_get(main.config, "uda.pseudo_threshold"),
        teacher_iou_at={
            step: sorted(scores.items(), key=lambda item: -item[1]) for step, scores in main.iou.get("teacher", [])
        },
        panels=[(step, relpath(path, run.path)) for step, path in main.panels],
        charts=charts,
        configs={method.name: yaml.safe_dump(dict(method.config), sort_keys=False) for method in run.methods},
    )
    return run.path / "index.html"


def write_comparison(folders: Sequence[str | Path], output: Path) -> Path:
    """Put several runs on one page: `output`/index.html, with charts beside it.

    Args:
        folders: output_dirs of runs. Runs with other test images or classes stand in tables of their own: a mean over
            them would mean nothing.
        output: folder of the page.

    Returns:
        The page.

    Raises:
        ValueError: if one is no run, or none has results.
    """
    runs = {_short(folder, folders): read_run(folder) for folder in folders}
    rows: list[dict[str, Any]] = [
        {"run": name, "method": title, "result": result, "seed": run.main.config.get("seed")}
        for name, run in runs.items()
        for title, result in _results(run).items()
        if result
    ]
    if not rows:
        raise ValueError(f"none of {', '.join(map(str, folders))} has results yet: no metrics.json.")
    output.mkdir(parents=True, exist_ok=True)
    charts = output / "figures"
    charts.mkdir(exist_ok=True)
    kinds = kinds_of_test([row["result"] for row in rows])
    alike: dict[Any, list[dict[str, Any]]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        alike.setdefault(kind, []).append(row)
    tables = [_comparison_table(several) for several in alike.values()]
    for number, table in enumerate(tables):
        names = dict.fromkeys(row["run"] for row in table["rows"])
        curves = {name: runs[name].main.miou["student"] for name in names if "student" in runs[name].main.miou}
        if curves:
            table["chart"] = f"figures/miou{number or ''}.png"
            save_curves(output / table["chart"], curves, "mIoU of the student on the target, %")
    _write(
        output / "index.html",
        "comparison.html.jinja",
        title=f"{len(runs)} runs",
        panels={name: panel for name, run in runs.items() if (panel := _panel(run, output))},
        runs={name: relpath(run.path / "index.html", output) for name, run in runs.items()},
        tables=tables,
        differences=_differences({name: run.main.config for name, run in runs.items()}),
    )
    return output / "index.html"


def _comparison_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results on the same test images, of the same classes: one by one, and their means by method."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row["result"]["miou"])
    first = rows[0]["result"]
    classes = list(first["iou"])
    return {
        "title": f"{first['domain']}, {first['num_images']} images, {len(classes)} classes",
        "rows": rows,
        "groups": {method: spread(values) for method, values in groups.items()},
        "classes": classes,
        "best": {name: max((row["result"]["iou"].get(name) or 0) for row in rows) for name in classes},
    }


def command_to_repeat(folder: Path, command: str) -> str:
    """The command of a run with another output folder, which is not there yet: it can be pasted. "" without one."""
    if not command:
        return ""
    words, kept = shlex.split(command), list[str]()
    while words:
        word = words.pop(0)
        flag, equals, _ = word.partition("=")
        if flag.replace("-", "_") in ("__output_dir", "__resume"):
            words = words if equals else words[1:]
        else:
            kept.append(word)
    if folder.name in ("", ".."):  # "." has no name of its own
        folder = Path(abspath(folder))
    number = 1
    while (again := folder.with_name(f"{folder.name}_again{number if number > 1 else ''}")).exists():
        number += 1
    return shlex.join([*kept, "--output_dir", str(again)])


def _panel(run: RunFolder, page: Path) -> dict[str, str | None] | None:
    """What a page opens with: predictions on test images, or else the newest pseudo-labels; paths relative to it."""
    wide, narrow = run.path / PANEL, run.path / NARROW_PANEL
    if wide.is_file():
        models = f"source-only and {run.main.name}" if run.baseline is not None else run.main.name
        caption = f"Test images, their labels, and what {models} say{'s' * (run.baseline is None)}."
    elif run.main.panels:
        step, wide = run.main.panels[-1]
        caption, narrow = f"Pseudo-labels after {step} updates.", wide
    else:
        return None
    other = relpath(narrow, page) if narrow.is_file() and narrow != wide else None
    return {"path": relpath(wide, page), "narrow": other, "caption": caption}


def _charts(run: RunFolder) -> dict[str, str]:
    """Draw what there is data for: name of the chart -> its path, relative to the page."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    main, baseline = run.main, run.baseline
    drawn = []
    curves = {
        CURVES[kind].replace("source", "source" if run.labels_from == "source" else "seen in training"): points
        for kind, points in main.miou.items()
        if kind in CURVES
    }
    if curves:
        levels = {}
        if baseline is not None and baseline.results and baseline.results["student"]["miou"] is not None:
            levels["source-only, target"] = baseline.results["student"]["miou"]
        save_curves(folder / "miou.png", curves, "mIoU, %", levels)
        drawn.append("miou")
    losses = {method.name: method.losses for method in run.methods if method.losses}
    if losses:
        save_losses(folder / "losses.png", losses)
        drawn.append("losses")
    proxies = dict(main.proxies)
    if main.trust:
        proxies["weight in the loss"] = main.trust
    if main.proxies:
        save_curves(folder / "proxies.png", proxies, "")
        drawn.append("proxies")
    classes = list(main.config.get("classes", []))
    finished = {title: result for title, result in _results(run).items() if result and "teacher" not in title}
    matrices = {title: np.array(result["confusion"]) for title, result in finished.items()}
    if matrices and classes:
        save_confusion(folder / "confusion.png", matrices, classes)
        drawn.append("confusion")
    shares = _class_shares(run)
    if shares:
        save_class_shares(folder / "classes.png", shares, classes)
        drawn.append("classes")
    return {name: f"figures/{name}.png" for name in drawn}


def _class_shares(run: RunFolder) -> dict[str, list[float]]:
    shares: dict[str, list[float]] = {}
    if run.data.get("source_pixels"):
        parts = run.data.get("domains", {}).get(run.labels_from, {}).get("parts", [])
        shares |= {f"pixels of {part['name']}": _normalised(part["pixels"]) for part in parts if "pixels" in part}
        title = f"pixels of all {len(parts)} as drawn" if parts else f"pixels of the {run.labels_from}"
        shares[title] = _normalised(run.data["source_pixels"])
    if run.data.get("sampling"):
        shares["images drawn for it"] = run.data["sampling"]
    if run.main.results:
        labelled = np.array(run.main.results["student"]["confusion"]).sum(axis=1)
        shares["pixels of the test images"] = _normalised(labelled.tolist())
    return shares


def _results(run: RunFolder) -> dict[str, Mapping[str, Any]]:
    """Column title -> result on the target: baseline, student, teacher, what a proxy selected, and start_model."""
    found: dict[str, Mapping[str, Any]] = {}
    if run.baseline is not None:
        found["source-only"] = run.baseline.results.get("student", {})
    name = "source-only" if run.main.name == BASELINE else run.main.name
    found[f"{name} (student)"] = run.main.results.get("student", {})
    if "teacher" in run.main.results:
        found[f"{name} (teacher)"] = run.main.results["teacher"]
    if "selected" in run.main.results:
        kept = run.main.results["selected"]
        found[f"{name} (after {kept['step']} updates, selected by proxy {kept['proxy']})"] = kept
    if "start" in run.main.results:
        found["start_model"] = run.main.results["start"]
    return found


def _class_table(main: MethodFolder, baseline: MethodFolder | None, classes: Sequence[str]) -> list[dict[str, Any]]:
    if not main.results:
        return []
    student = main.results["student"]
    pixels = np.array(student["confusion"]).sum(axis=1)
    rows = []
    for place, (name, color) in enumerate(zip(classes, hex_colors(classes), strict=True)):
        before = baseline.results["student"]["iou"].get(name) if baseline and baseline.results else None
        now = student["iou"].get(name)
        rows.append(
            {
                "name": name,
                "color": color,
                "share": 100 * pixels[place] / max(pixels.sum(), 1),
                "before": before,
                "now": now,
                "teacher": main.results.get("teacher", {}).get("iou", {}).get(name),
                "source": main.results.get("student_source", {}).get("iou", {}).get(name),
                "change": None if before is None or now is None else now - before,
            }
        )
    return rows


def _changes(main: MethodFolder, baseline: MethodFolder | None, classes: Sequence[str]) -> dict[str, list[Any]]:
    """Classes that got worse and better than the baseline, most first, with their change in points."""
    rows = [(row["name"], row["change"]) for row in _class_table(main, baseline, classes) if row["change"] is not None]
    return {
        "worse": sorted(((n, c) for n, c in rows if c <= -WORSE), key=lambda row: row[1]),
        "better": sorted(((n, c) for n, c in rows if c >= WORSE), key=lambda row: -row[1]),
        "same": [(n, c) for n, c in rows if abs(c) < WORSE],
    }


def _subset_table(results: Mapping[str, Any], classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """ "mIoU, 13 classes (syn13)" -> column -> score, for the class sets that are parts of the run's classes."""
    return {
        f"mIoU, {len(CLASS_SETS[name])} classes ({name})": {
            title: subset_miou(result, names) for title, result in results.items()
        }
        for name, names in class_sets_of(classes).items()
    }


def _differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted key -> run -> value, for the keys in which runs differ and that change what a run gives."""
    flat = {name: flatten(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    return {
        key: {name: config.get(key, "-") for name, config in flat.items()}
        for key in keys
        if changes(key) != "nothing" and len({str(config.get(key)) for config in flat.values()}) > 1
    }


def _short(folder: str | Path, folders: Sequence[str | Path]) -> str:
    """The name of a folder; its whole path where another one is called the same."""
    names = [Path(other).name for other in folders]
    return Path(folder).name if names.count(Path(folder).name) == 1 else str(folder)


def _pseudo_label_quality(main: MethodFolder) -> dict[int, dict[str, float]]:
    """Step -> what is known of the pseudo-labels then: scores of the teacher on the test images, and proxies."""
    found: dict[int, dict[str, float]] = {}
    series = {"miou": main.miou.get("teacher", []), "accuracy": main.accuracy.get("teacher", [])} | main.proxies
    for name, points in series.items():
        for step, value in points:
            found.setdefault(step, {})[name] = value
    return dict(sorted(found.items()))


def _get(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key; of several domains all of theirs."""
    flat = flatten(config)
    listed = [str(value) for name, value in flat.items() if name != key and without_place(name) == key]
    return ", ".join(listed) if listed else flat.get(key, "?")


def _normalised(counts: Sequence[int]) -> list[float]:
    return (np.array(counts) / max(sum(counts), 1)).tolist()


def _write(path: Path, template: str, **content: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(template).render(**content))
