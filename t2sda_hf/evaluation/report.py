"""The picture of a run: test images, truth, what every model says, and where the last one is wrong."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.transforms import InputSize
from .evaluator import LabelledDomain
from .inference import predict_labels, to_pixel_values
from .pictures import Column, errors, save_grid


def save_panel(
    path: Path,
    domain: LabelledDomain,
    models: Mapping[str, nn.Module],
    image_size: InputSize | Callable[[int], InputSize],
    classes: Sequence[str],
    num_images: int = 4,
    predictions_only: bool = False,
    narrow: Path | None = None,
    **windows: Any,
) -> None:
    """One row for each of some test images, evenly spread: image, truth, predictions, errors of the last model.

    Args:
        path: PNG to write.
        domain: labelled.
        models: column title -> model in eval mode.
        image_size: of the network's input, or what gives that of an image.
        classes: names, for colours and legend.
        num_images: rows.
        predictions_only: leave out what is the data set's own, or shows it: images, truth and errors.
        narrow: another PNG, for a phone: two of the images, each as two pictures above two.
        windows: mode, window and stride of `predict_labels`; the whole image without them.
    """
    rows = np.linspace(0, len(domain) - 1, num=min(num_images, len(domain)), dtype=int).tolist()
    images, labels = [domain.image(row) for row in rows], [domain.labels(row) for row in rows]
    columns = [Column("target image", images), Column("truth", labels, "classes")]
    sizes = [image_size(row) if callable(image_size) else image_size for row in rows]
    for title, model in models.items():
        device = next(model.parameters()).device
        columns.append(
            Column(
                title,
                [
                    predict_labels(model, to_pixel_values(image, size, device), truth.shape, **windows)[0].cpu().numpy()
                    for image, truth, size in zip(images, labels, sizes, strict=True)
                ],
                "classes",
            )
        )
    if predictions_only:
        save_grid(path, columns[2:], classes)
        return
    wrong = [errors(said, truth) for said, truth in zip(columns[-1].pictures, labels, strict=True)]
    columns.append(Column(f"errors of {columns[-1].title}", wrong, "error"))
    save_grid(path, columns, classes)
    if narrow is not None:
        few = slice(0, len(rows), max(1, len(rows) // 2))
        save_grid(narrow, [Column(c.title, c.pictures[few], c.kind) for c in columns[:4]], classes, beside=2)
