"""Charts of a run: curves, confusion matrices, class shares."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..labels import palette, shortened

matplotlib.rcParams["text.parse_math"] = False  # names of classes are text, whatever is in them

Series = Sequence[tuple[int, float]]
NAMED = 40  # classes up to which an axis has their names; beyond it has their ids


def save_curves(
    path: Path,
    curves: Mapping[str, Series],
    ylabel: str,
    levels: Mapping[str, float] | None = None,
    right: Mapping[str, Series] | None = None,
    right_label: str = "",
) -> None:
    """One chart of several curves over updates. Names ending in ", source" are dashed.

    Args:
        path: PNG to write.
        curves: name -> points.
        ylabel: of the axis.
        levels: name -> height of a horizontal line to compare with.
        right: name -> points of another scale, in grey, with an axis on the right.
        right_label: of that axis.
    """
    figure, axis = plt.subplots(figsize=(8, 4.2))
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, "--" if name.endswith(", source") else "-", marker="o", markersize=3, label=name)
    for place, (name, level) in enumerate((levels or {}).items()):
        axis.axhline(level, color=_grey(place), linestyle=":", label=name)
    axis.set_xlabel("updates")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if right:
        other = axis.twinx()
        for place, (name, points) in enumerate(right.items()):
            steps, values = zip(*points, strict=True)
            other.plot(steps, values, "--", marker="^", markersize=3, color=_grey(place), label=name)
        other.set_ylabel(right_label)
        other.set_ylim(bottom=0)
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def save_losses(path: Path, losses: Mapping[str, Mapping[str, Series]]) -> None:
    """One small chart for each loss term, every method in it.

    Args:
        path: PNG to write.
        losses: method -> term -> points.
    """
    terms = list(dict.fromkeys(term for of_method in losses.values() for term in of_method))
    columns = min(3, len(terms))
    rows = -(-len(terms) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False)
    for axis, term in zip(axes.flat, terms, strict=False):
        for place, (method, of_method) in enumerate(losses.items()):
            if term in of_method:
                steps, values = zip(*of_method[term], strict=True)
                marker = "o" if len(steps) < 3 else ""  # a single point has no line
                axis.plot(steps, values, marker=marker, color=f"C{place}", label=method)
        axis.set_title(term, fontsize=10)
        axis.set_xlabel("updates", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(terms) :]:
        axis.set_axis_off()
    _save(figure, path)


def save_confusion(path: Path, matrices: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Confusion matrices side by side, every row in % of its labelled pixels; rows without any stay empty.

    A matrix is one image. Cells have a number, and axes the names, of up to `NAMED` classes; more make the picture no
    larger.

    Args:
        path: PNG to write.
        matrices: title -> (K,K) counts, rows = labels, columns = predictions.
        classes: K names.
    """
    side = max(4.0, 0.42 * min(len(classes), NAMED) + 1.2)
    figure, axes = plt.subplots(1, len(matrices), figsize=(side * len(matrices) + 0.5, side), squeeze=False)
    for axis, (title, counts) in zip(axes[0], matrices.items(), strict=True):
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.divide(100 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        if len(classes) <= NAMED:
            for row, column in np.argwhere(shares >= 0.5):
                dark = shares[row, column] > 55
                text = f"{shares[row, column]:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            names = [shortened(name) for name in classes]
            axis.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
            axis.set_yticks(range(len(classes)), names, fontsize=8)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("predicted" if len(classes) <= NAMED else "predicted (class id)")
    axes[0, 0].set_ylabel("labelled" if len(classes) <= NAMED else "labelled (class id)")
    _save(figure, path)


def save_class_shares(path: Path, shares: Mapping[str, Sequence[float]], classes: Sequence[str]) -> None:
    """Bars of shares per class, on a logarithmic axis because rare classes are what matters; from 0.01% up.

    Args:
        path: PNG to write.
        shares: title -> K shares in [0,1].
        classes: K names.
    """
    figure, axis = plt.subplots(figsize=(max(6.0, 0.55 * min(len(classes), NAMED) + 2), 3.6))
    width = 0.8 / len(shares)
    for place, (title, values) in enumerate(shares.items()):
        at = np.arange(len(classes)) + (place - (len(shares) - 1) / 2) * width
        axis.bar(at, 100 * np.asarray(values, dtype=float), width, label=title)
    axis.set_yscale("log")
    axis.set_ylim(0.01, 100)  # the sampling of rare classes leaves common ones 1e-10 and less
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("%")
    axis.yaxis.set_minor_formatter("")
    if len(classes) <= NAMED:
        names = [shortened(name) for name in classes]
        axis.set_xticks(range(len(classes)), names, rotation=60, ha="right", fontsize=9)
    else:
        axis.set_xlabel("class id")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncol=len(shares) if len(shares) < 4 else 2, frameon=False)
    _save(figure, path)


def hex_colors(classes: Sequence[str]) -> list[str]:
    """Display colours as #rrggbb."""
    return ["#{:02x}{:02x}{:02x}".format(*color) for color in palette(classes).tolist()]


def _grey(place: int) -> str:
    return f"{0.35 + 0.3 * place}"


def _save(figure: Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})  # equal for equal runs
    plt.close(figure)
