"""Confusion matrices of label maps, and the scores read off them.

Apart from `mean_iou`, because that imports the evaluate library and `evaluate.load` runs a copy of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Pixels at a time: the working memory stays in the cache, 1 to 4 MB for any image size.
_CHUNK = 65_536
_CHUNK_OF_BYTES = 262_144


def confusion_matrix(predictions: Any, labels: Any, num_classes: int, ignore_index: int = 255) -> np.ndarray:
    """Count how often class `row` was labelled and class `column` predicted.

    Args:
        predictions: class ids in [0, num_classes), any shape, any integer dtype, array or tensor. What stands on
            ignored pixels is not looked at.
        labels: class ids in [0, num_classes) or `ignore_index`, of the same shape.
        num_classes: K >= 1.
        ignore_index: label of pixels that are not counted.

    Returns:
        (K, K) int64; all zeros if every pixel is ignored.

    Raises:
        ValueError: for ids out of range, listing them with their counts: left out silently they would change the
            mean. Also for shapes that differ and for values that are not integers.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
    predictions, labels = whole_numbers(predictions, "predictions"), whole_numbers(labels, "labels")
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and labels must have the same shape, got {predictions.shape} and {labels.shape}. "
            "Resize the logits to the labels before argmax; never resize the labels."
        )
    predictions, labels = predictions.reshape(-1), labels.reshape(-1)
    if predictions.dtype == labels.dtype == np.uint8:
        counts = _count_bytes(predictions, labels)
        if 0 <= ignore_index < 256:
            counts[ignore_index] = 0
        inside = counts[:num_classes, :num_classes]
        if inside.sum() != counts.sum():
            _refuse(predictions, labels, num_classes, ignore_index)
        matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
        matrix[: len(inside), : len(inside)] = inside
        return matrix
    counts = np.zeros(num_classes * num_classes, dtype=np.int64)
    for start in range(0, labels.size, _CHUNK):
        rows, columns = labels[start : start + _CHUNK], predictions[start : start + _CHUNK]
        valid = rows != ignore_index
        rows, columns = rows[valid], columns[valid]
        if rows.size == 0:
            continue
        if min(rows.min(), columns.min()) < 0 or max(rows.max(), columns.max()) >= num_classes:
            _refuse(predictions, labels, num_classes, ignore_index)
        pairs = rows.astype(np.intp)
        pairs *= num_classes
        pairs += columns.astype(np.intp)
        counts += np.bincount(pairs, minlength=counts.size)
    return counts.reshape(num_classes, num_classes)


def _count_bytes(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(256, 256) int64 counts of all pairs (label, prediction) of two flat uint8 arrays.

    Neighbouring pixels mostly show the same pair, so runs of equal pairs are counted, not pixels: twice as fast on
    street maps. Where there are few such runs, as in noise, pixels are.
    """
    counts = np.zeros(65_536, dtype=np.int64)
    for start in range(0, labels.size, _CHUNK_OF_BYTES):
        rows, columns = labels[start : start + _CHUNK_OF_BYTES], predictions[start : start + _CHUNK_OF_BYTES]
        is_end = np.ones(rows.size, dtype=bool)
        np.not_equal(rows[1:], rows[:-1], out=is_end[:-1])
        is_end[:-1] |= columns[1:] != columns[:-1]
        if 4 * np.count_nonzero(is_end) > rows.size:
            counts += np.bincount(rows.astype(np.uint16) << 8 | columns, minlength=counts.size)
        else:
            ends = np.flatnonzero(is_end)
            np.add.at(counts, rows[ends].astype(np.uint16) << 8 | columns[ends], np.diff(ends, prepend=-1))
    return counts.reshape(256, 256)


def counts_of_pairs(predictions: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> None:
    """Add to `counts` (256,256) int64 how often each pair (label, prediction) of bytes occurs; no wait for a device."""
    pairs = (labels.flatten().long() << 8) | predictions.flatten()
    counts.view(-1).scatter_add_(0, pairs, torch.ones((), dtype=torch.int64, device=pairs.device).expand_as(pairs))


def scores(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Scores of a confusion matrix, all in [0, 1], with the keys of evaluate's `mean_iou`.

    IoU_c = M_cc / (Σ_j M_cj + Σ_i M_ic − M_cc). A class that is neither labelled nor predicted is 0/0: NaN, and left
    out of the mean. One that is predicted but never labelled counts as 0 in mean_iou and is left out of mean_accuracy.

    Args:
        matrix: (K, K) counts, rows = labels, columns = predictions.
        class_names: K names; adds the key `iou`, a dict from name to IoU.

    Returns:
        mean_iou, mean_accuracy, overall_accuracy (share of right pixels): floats, NaN if nothing was counted;
        per_category_iou, per_category_accuracy: (K,) float64 arrays.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix has the shape (K, K), got {matrix.shape}.")
    if class_names is not None and len(class_names) != len(matrix):
        raise ValueError(f"the matrix has {len(matrix)} classes, but {len(class_names)} names were given.")
    right = matrix.diagonal().astype(np.float64)
    labelled, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):
        iou = right / (labelled + predicted - right)
        accuracy = right / labelled
        overall = right.sum() / matrix.sum()
    result: dict[str, Any] = {
        "mean_iou": _mean_of_numbers(iou),
        "mean_accuracy": _mean_of_numbers(accuracy),
        "overall_accuracy": float(overall),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }
    if class_names is not None:
        result["iou"] = dict(zip(class_names, iou.tolist(), strict=True))
    return result


def whole_numbers(values: Any, name: str) -> np.ndarray:
    """`values` as an array of their own integer dtype; a ValueError that calls them `name` for any other dtype."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers (class ids), got {array.dtype}. Scores need argmax first.")
    return array


def _mean_of_numbers(values: np.ndarray) -> float:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else float("nan")


def _refuse(predictions: np.ndarray, labels: np.ndarray, num_classes: int, ignore_index: int) -> None:
    """Raise a ValueError that names every id out of range with its number of pixels (the first ten of them)."""
    valid = labels != ignore_index
    reasons = []
    for name, values in (("labels", labels[valid]), ("predictions", predictions[valid])):
        ids, counts = np.unique(values[(values < 0) | (values >= num_classes)], return_counts=True)
        if ids.size:
            listed = [f"{i} ({n} pixels)" for i, n in zip(ids[:10].tolist(), counts[:10].tolist(), strict=True)]
            rest = [f"{ids.size - 10} more ids"] if ids.size > 10 else []
            reasons.append(f"{name} contain {', '.join(listed + rest)}")
    raise ValueError(
        f"{'; '.join(reasons)}, but there are {num_classes} classes (0..{num_classes - 1}) and {ignore_index} for "
        "ignored pixels. Map the ids of the data set to class ids first."
    )
