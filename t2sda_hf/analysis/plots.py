"""Figures of the analysis. Every one has a CSV of the same name with the numbers that are drawn."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from ..evaluation.figures import NAMED
from ..labels import palette, shortened
from .embedding import Sample

matplotlib.rcParams["text.parse_math"] = False  # names of classes are text, whatever is in them


def save_bars(
    path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str], title: str = ""
) -> None:
    """Bars per class for several models, one panel under the other: `path` (PNG) and the CSV beside it.

    Args:
        path: ending in .png.
        panels: what is measured -> model -> (K,) values, NaN where there is none.
        classes: K names.
        title: above all of it.
    """
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(max(6.0, 0.6 * min(len(classes), NAMED) + 2), 2.6 * len(panels) + 0.8),
        sharex=True,
        squeeze=False,
    )
    for axis, (what, models) in zip(axes[:, 0], panels.items(), strict=True):
        width = 0.8 / len(models)
        for place, (model, values) in enumerate(models.items()):
            at = np.arange(len(classes)) + (place - (len(models) - 1) / 2) * width
            axis.bar(at, values, width, label=model)
        axis.set_ylabel(what)
        axis.grid(axis="y", alpha=0.3)
    if len(classes) <= NAMED:
        axes[-1, 0].set_xticks(range(len(classes)), [shortened(name) for name in classes], rotation=60, ha="right")
    else:
        axes[-1, 0].set_xlabel("class id")
    axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncol=3, frameon=False)
    figure.suptitle(title, fontsize=11, y=1.02)
    _save(figure, path)
    header = ["class", *(f"{what}: {model}" for what, models in panels.items() for model in models)]
    columns = [list(values) for models in panels.values() for values in models.values()]
    _write_csv(path, header, [[name, *row] for name, *row in zip(classes, *columns, strict=True)])


def save_steps(path: Path, lines: Mapping[str, Mapping[str, Mapping[str, Any]]], xlabel: str, ylabel: str) -> None:
    """Lines over steps that lie evenly whatever their names, with one sd above and below: PNG and CSV.

    Args:
        path: ending in .png.
        lines: name -> name of a step -> "mean", "sd" and "n"; None where there is none. All have the same steps.
        xlabel, ylabel: of the axes.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    names = list(next(iter(lines.values())))
    for line, points in lines.items():
        values = np.array(
            [[np.nan if points[x][key] is None else points[x][key] for x in names] for key in ("mean", "sd")]
        )
        axis.errorbar(range(len(names)), values[0], np.nan_to_num(values[1]), marker="o", capsize=3, label=line)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)
    header = [xlabel, *(f"{line}: {key}" for line in lines for key in ("mean", "sd", "n"))]
    _write_csv(
        path, header, [[x, *(lines[line][x][key] for line in lines for key in ("mean", "sd", "n"))] for x in names]
    )


def save_scatter(path: Path, points: Mapping[str, tuple[np.ndarray, Sample]], classes: Sequence[str]) -> None:
    """Points of several domains in one plane, colours by class, markers by domain: PNG and CSV.

    Args:
        path: ending in .png.
        points: domain -> ((N,2) coordinates, what they are of).
        classes: names.
    """
    figure, axis = plt.subplots(figsize=(8, 6.4))
    colors = palette(classes) / 255
    rows: list[list[object]] = []
    for marker, (domain, (plane, sample)) in zip("ox^s", points.items(), strict=False):
        labels = sample.labels.numpy()
        for class_id in np.unique(labels):
            mine = plane[labels == class_id]
            axis.scatter(mine[:, 0], mine[:, 1], s=9, marker=marker, linewidths=0.7, color=colors[class_id])
        axis.scatter([], [], marker=marker, color="black", label=domain)
        rows += [[domain, classes[c], float(x), float(y)] for c, (x, y) in zip(labels, plane, strict=True)]
    for class_id in sorted({int(c) for _, sample in points.values() for c in sample.labels.unique()})[:NAMED]:
        axis.scatter([], [], color=colors[class_id], label=shortened(classes[class_id]))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path)
    _write_csv(path, ["domain", "class", "x", "y"], rows)


def save_relation(path: Path, relations: Mapping[str, tuple[np.ndarray, np.ndarray]], classes: Sequence[str]) -> None:
    """Similarity against IoU, a point per class, a colour per model (the claim of Fig. 1): PNG and CSV.

    Args:
        path: ending in .png.
        relations: model, with its correlations -> (similarity, IoU in %), (K,) each.
        classes: K names.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    for place, (model, (similarity, iou)) in enumerate(relations.items()):
        axis.scatter(similarity, iou, s=22, color=f"C{place}", label=model)
        for name, x, y in zip(classes, similarity, iou, strict=True):
            if np.isfinite(x) and np.isfinite(y):
                axis.annotate(shortened(name), (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
    axis.set_xlabel("similarity of class centres, source to target")
    axis.set_ylabel("IoU on the target, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9)
    _save(figure, path)
    rows = [
        [model, name, float(x), float(y)]
        for model, pairs in relations.items()
        for name, x, y in zip(classes, *pairs, strict=True)
    ]
    _write_csv(path, ["model", "class", "similarity", "iou"], rows)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
