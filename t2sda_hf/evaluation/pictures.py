"""Pictures of images, label maps and confidences side by side, with a legend."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from ..labels import IGNORE_INDEX, palette, shortened

matplotlib.rcParams["text.parse_math"] = False  # names of classes are text, whatever is in them

RIGHT, WRONG, IGNORED = (225, 225, 225), (200, 30, 30), (0, 0, 0)  # colours of an error map
CELL = 2.7  # inches
IN_LEGEND = 40  # classes that the legend below a grid has, those with most pixels


@dataclass(frozen=True)
class Column:
    """One column of `save_grid`.

    Attributes:
        title: shown above.
        pictures: one array per row. "image": (H,W,3) uint8; "classes": (H,W) class ids, 255 ignored; "confidence":
            (H,W) in [0,1]; "error": (H,W) 0 right, 1 wrong, 255 ignored.
        kind: what they are.
    """

    title: str
    pictures: Sequence[np.ndarray]
    kind: Literal["image", "classes", "confidence", "error"] = "image"


def colorize(labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """(H,W) class ids, 255 ignored -> (H,W,3) uint8 RGB, ignored pixels black."""
    colors = np.zeros((IGNORE_INDEX + 1, 3), np.uint8)
    colors[: len(classes)] = palette(classes)
    return colors[labels]


def errors(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(H,W) uint8: 0 where the prediction is right, 1 where it is wrong, 255 where the label is ignored."""
    return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, predictions != labels).astype(np.uint8)


def save_grid(
    path: Path, columns: Sequence[Column], classes: Sequence[str], title: str = "", beside: int | None = None
) -> None:
    """Write pictures side by side, one row per image, as PNG.

    Args:
        path: file to write.
        columns: all with the same number of pictures.
        classes: names, for colours and legend.
        title: above all of it.
        beside: so many pictures stand beside each other, and the others of the image below them; None is all.
    """
    beside = beside or len(columns)
    lines = [
        [(column, row) for column in columns[first : first + beside]]
        for row in range(len(columns[0].pictures))
        for first in range(0, len(columns), beside)
    ]
    titled = range(len(lines)) if beside < len(columns) else range(1)
    num_rows = len(lines)
    height, width = columns[0].pictures[0].shape[:2]
    maps = [np.bincount(p.ravel(), minlength=256) for c in columns if c.kind == "classes" for p in c.pictures]
    pixels = np.sum(maps, axis=0) if maps else np.zeros(256, int)
    shown = np.flatnonzero(pixels[: len(classes)])
    largest = sorted(shown[np.argsort(-pixels[shown], kind="stable")][:IN_LEGEND].tolist())
    has_errors = any(column.kind == "error" for column in columns)
    colors = palette(classes) / 255
    handles = [Patch(color=colors[c], label=shortened(classes[c])) for c in largest]
    if len(shown) > len(largest):
        handles.append(Patch(facecolor="none", label=f"and {len(shown) - len(largest)} smaller classes"))
    if pixels[IGNORE_INDEX] or has_errors:
        handles.append(Patch(color=_unit(IGNORED), label="ignored"))
    if has_errors:
        handles += [Patch(facecolor=_unit(RIGHT), label="right"), Patch(color=_unit(WRONG), label="wrong")]
    in_row = max(1, min(len(handles), int(1.3 * beside) + 1))
    legend = 0.1 + 0.22 * -(-len(handles) // in_row)
    has_scale = any(column.kind == "confidence" for column in columns)
    gaps = 0.3 * (len(titled) - 1)  # for titles between pictures
    total = CELL * height / width * num_rows + legend + 0.3 + gaps + 0.3 * bool(title) + 0.35 * has_scale
    figure, axes = plt.subplots(num_rows, beside, figsize=(CELL * beside, total), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, line in enumerate(lines):
        for place, (column, image) in enumerate(line):
            axis, picture = axes[row, place], column.pictures[image]
            if row in titled:
                axis.set_title(column.title, fontsize=11)
            if column.kind == "confidence":
                shade = axis.imshow(picture, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
                if row == num_rows - 1:
                    below = axis.inset_axes((0, -0.1, 1, 0.05))
                    figure.colorbar(shade, cax=below, orientation="horizontal", ticks=[0, 0.5, 1])
            else:
                axis.imshow(_rgb(picture, column.kind, classes), interpolation="nearest")
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    if handles:
        figure.legend(handles=handles, loc="lower center", ncol=in_row, fontsize=9, frameon=False)
    # By hand: a tight layout measures titles before pictures keep their shape, and cuts them off.
    top, bottom = 1 - (0.3 + 0.3 * bool(title)) / total, (legend + 0.35 * has_scale) / total
    space = 0.02 + 0.3 * (len(titled) > 1) * width / (CELL * height)
    figure.subplots_adjust(left=0.004, right=0.996, top=top, bottom=bottom, wspace=0.02, hspace=space)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_legend(classes: Sequence[str]) -> bytes:
    """A PNG with the colour of every class, in the order of their ids; equal for equal names."""
    named = zip(classes, palette(classes), strict=True)
    handles = [Patch(color=color / 255, label=shortened(name, 60)) for name, color in named]
    figure = plt.figure(figsize=(3, 0.3))
    figure.legend(handles=handles, loc="upper left", ncol=-(-len(handles) // 40), fontsize=11, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def _rgb(picture: np.ndarray, kind: str, classes: Sequence[str]) -> np.ndarray:
    if kind == "classes":
        return colorize(picture, classes)
    if kind == "error":
        colors = np.zeros((IGNORE_INDEX + 1, 3), np.uint8)
        colors[0], colors[1], colors[IGNORE_INDEX] = RIGHT, WRONG, IGNORED
        return colors[picture]
    return picture


def _unit(color: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255
