"""One pass over a labelled domain: predict, count, sum over processes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ..data.transforms import Size
from .confusion import confusion_matrix, scores
from .inference import Mode, predict_labels, to_pixel_values


class LabelledDomain(Protocol):
    """What evaluation reads of a domain: images (H, W, 3) uint8 RGB and labels (H, W) uint8 class ids or 255."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def image(self, index: int, /) -> np.ndarray: ...

    def labels(self, index: int, /) -> np.ndarray: ...


def evaluate_model(
    model: nn.Module,
    domain: LabelledDomain,
    *,
    image_size: Size | None,
    classes: Sequence[str],
    accelerator: Accelerator | None = None,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
    progress: bool = True,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score `model` on every image of `domain` against labels in their own resolution (method 6.1).

    Collective: call it on every process. Process r takes the images r, r + world, r + 2 world, ...; none is repeated
    to fill up the last round, so the result does not depend on the number of processes. The model is in eval mode
    meanwhile, and every submodule gets its own mode back, also after an error.

    Args:
        model: on the device it shall run on; `model(pixel_values).logits` is (1, len(classes), h, w).
        domain: labels must be of the size of their image.
        image_size: (height, width) of the network's input, or None for the image's own.
        classes: class names, position = class id.
        accelerator: None for a single process.
        mode, window, stride: see `predict_logits`.
        progress: show a bar on the first process.
        limit: only the first so many images.

    Returns:
        On every process the same, ready for JSON. All scores in %, None for 0/0:

        - domain: its name; num_images: how many were scored
        - miou, pixel_accuracy, mean_accuracy: see `confusion.scores`
        - iou: class name -> score. None is a class neither labelled nor predicted, left out of miou
        - confusion: (K, K) list of lists of pixel counts, rows = labels, columns = predictions

    Raises:
        ValueError: if the domain is empty, an image and its labels differ in size, or a label or prediction is not a
            class id. Domain and image are named.
    """
    num_images = len(domain) if limit is None else min(limit, len(domain))
    if num_images < 1:
        raise ValueError(f"nothing to evaluate: {domain.name} has {len(domain)} images and the limit is {limit}.")
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        shard = range(rank, num_images, world)
        for index in tqdm(shard, desc=f"evaluate {domain.name}", disable=not progress or rank != 0):
            image, labels = domain.image(index), domain.labels(index)
            if image.shape[:2] != labels.shape:
                raise ValueError(
                    f"{domain.name}, image {index}: the image has {image.shape[:2]} pixels, its labels {labels.shape}."
                )
            pixel_values = to_pixel_values(image, image_size, device)
            predictions = predict_labels(model, pixel_values, labels.shape, mode, window, stride)[0]
            try:
                matrix += confusion_matrix(predictions, labels, len(classes))
            except ValueError as error:
                raise ValueError(f"{domain.name}, image {index}: {error}") from error
    finally:
        for module, mode_before in modes:
            module.training = mode_before
    if accelerator is not None:
        matrix = accelerator.reduce(torch.from_numpy(matrix).to(accelerator.device), reduction="sum").cpu().numpy()
    result = scores(matrix, classes)
    return {
        "domain": domain.name,
        "num_images": num_images,
        "miou": _percent(result["mean_iou"]),
        "pixel_accuracy": _percent(result["overall_accuracy"]),
        "mean_accuracy": _percent(result["mean_accuracy"]),
        "iou": {name: _percent(value) for name, value in result["iou"].items()},
        "confusion": matrix.tolist(),
    }


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of `evaluate_model` side by side, as a Markdown table that is aligned as plain text too.

    Args:
        results: column title -> result. Classes that one result does not have are shown as "-".

    Returns:
        One row per class and then mIoU, pixel accuracy and mean accuracy, in % with two decimals.
    """
    names = dict.fromkeys(name for result in results.values() for name in result["iou"])
    scored = {name: [result["iou"].get(name) for result in results.values()] for name in names}
    for title, key in (("mIoU", "miou"), ("pixel accuracy", "pixel_accuracy"), ("mean accuracy", "mean_accuracy")):
        scored[title] = [result[key] for result in results.values()]
    rows = [["class", *results], *([title, *map(_cell, values)] for title, values in scored.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], _line(rule, widths), *lines[1:]])


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * share


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"
