"""Pictures of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from torch import nn

from ..labels import IGNORE_INDEX, palette
from .evaluator import LabelledDomain
from .inference import Size, predict_labels, to_pixel_values


def colorize(labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """(H,W) class ids, 255 ignored -> (H,W,3) uint8 RGB, ignored pixels black."""
    colors = np.zeros((IGNORE_INDEX + 1, 3), np.uint8)
    colors[: len(classes)] = palette(classes)
    return colors[labels]


def save_panel(
    path: Path, domain: LabelledDomain, models: Mapping[str, nn.Module], image_size: Size | None, classes: Sequence[str]
) -> None:
    """One row for each of four test images, evenly spread: image, truth, and the prediction of every model.

    Args:
        path: PNG to write.
        domain: labelled.
        models: column title -> model in eval mode.
        image_size: network input (height, width); None keeps the image's.
        classes: names, for colours and legend.
    """
    rows = np.linspace(0, len(domain) - 1, num=min(4, len(domain)), dtype=int).tolist()
    titles = ["target image", "truth", *models]
    first = domain.image(rows[0])
    aspect = first.shape[0] / first.shape[1]
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(3.2 * len(titles), 3.2 * aspect * len(rows) + 0.9), squeeze=False
    )
    seen: set[int] = set()
    for line, index in zip(axes, rows, strict=True):
        image, labels = domain.image(index), domain.labels(index)
        maps = [labels]
        for model in models.values():
            device = next(model.parameters()).device
            maps.append(
                predict_labels(model, to_pixel_values(image, image_size, device), labels.shape)[0].cpu().numpy()
            )
        seen |= {int(value) for label_map in maps for value in np.unique(label_map)} - {IGNORE_INDEX}
        for axis, title, picture in zip(
            line, titles, [image, *(colorize(label_map, classes) for label_map in maps)], strict=True
        ):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if index == rows[0]:
                axis.set_title(title, fontsize=11)
    colors = palette(classes) / 255
    handles = [Patch(color=colors[class_id], label=classes[class_id]) for class_id in sorted(seen)]
    handles.append(Patch(color="black", label="ignored"))
    figure.legend(handles=handles, loc="lower center", ncol=min(len(handles), 7), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / figure.get_size_inches()[1] * 0.65, 1, 1), pad=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
