"""Mean intersection over union in constant memory: evaluate.load("<this folder>", num_labels=19).

Written by t2sda_hf.hub.metric from evaluation/confusion.py and evaluation/mean_iou.py of t2sda_hf; change it there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
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


_DESCRIPTION = """
Intersection over union of predicted and given label maps, per class and averaged over the classes that occur, with
the definition and the keys of evaluate's own `mean_iou`. Maps are counted when they are added and not kept.
"""

_INPUTS = """
Maps are arrays, tensors or nested lists of whole numbers with equal shapes in a pair; pairs may differ in size.
"""

_CITATION = """
@article{everingham2010pascal,
  title={The PASCAL Visual Object Classes (VOC) Challenge},
  author={Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  journal={International Journal of Computer Vision},
  year={2010}
}
"""


class MeanIoU(evaluate.Metric):
    """evaluate's `mean_iou`, streaming: K² numbers of memory, nothing on disk, errors instead of dropped ids.

    For several processes give each its own MeanIoU, sum their `matrix` (`accelerator.reduce(..., "sum")`) and hand
    the sum to `add_matrix` of a fresh one. evaluate's own `num_process` would wait on lock files and is refused.

    Attributes:
        matrix: (num_labels, num_labels) int64, everything added since the last `compute`.
    """

    def __init__(self, num_labels: int | None = None, ignore_index: int = 255, **kwargs: Any) -> None:
        if num_labels is None or num_labels < 1:
            raise ValueError(f"MeanIoU needs the number of classes, e.g. num_labels=19; got {num_labels}.")
        super().__init__(**kwargs)
        if self.num_process != 1:
            raise ValueError("MeanIoU takes no num_process: sum .matrix over the processes and use add_matrix.")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self._reset()

    def add(
        self, *, prediction: Any = None, reference: Any = None, predictions: Any = None, references: Any = None
    ) -> None:
        """Count one pair of label maps. The plural names are what `evaluate.combine` passes.

        Raises:
            ValueError: see `confusion_matrix`; nothing is counted then.
        """
        prediction = predictions if prediction is None else prediction
        reference = references if reference is None else reference
        if prediction is None or reference is None:
            raise ValueError("add needs a prediction and a reference.")
        self.add_matrix(confusion_matrix(prediction, reference, self.num_labels, self.ignore_index))

    def add_batch(self, *, predictions: Iterable[Any] | None = None, references: Iterable[Any] | None = None) -> None:
        """Count pairs of label maps: (B, H, W), or a sequence of maps of any sizes.

        Raises:
            ValueError: see `confusion_matrix`, or if there are more maps on one side; nothing of the batch is
                counted then.
        """
        if predictions is None or references is None:
            raise ValueError("add_batch needs predictions and references.")
        total = np.zeros_like(self.matrix)
        for prediction, reference in zip(predictions, references, strict=True):
            total += confusion_matrix(prediction, reference, self.num_labels, self.ignore_index)
        self.add_matrix(total)

    def add_matrix(self, matrix: Any) -> None:
        """Add a confusion matrix of other maps, for example the sum over processes: (K, K) whole numbers."""
        matrix = whole_numbers(matrix, "matrix")
        if matrix.shape != self.matrix.shape:
            raise ValueError(f"the matrix must have the shape {self.matrix.shape}, got {matrix.shape}.")
        self.matrix += matrix.astype(np.int64)
        self._filled = True

    def compute(
        self, *, predictions: Iterable[Any] | None = None, references: Iterable[Any] | None = None
    ) -> dict[str, Any]:
        """Scores of everything added since the last `compute` and of the maps given here; then start anew.

        Returns:
            The dict of `scores`.

        Raises:
            ValueError: if nothing was added.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._filled:
            raise ValueError("nothing was added: call add, add_batch or add_matrix before compute.")
        result = scores(self.matrix)
        self._reset()
        return result

    def _reset(self) -> None:
        self.matrix = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)
        self._filled = False

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.Image(mode="L")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": image, "references": image}),
        )

    def _build_data_dir(self) -> str:
        # Nothing is ever written, so a read-only cache folder must not stop anybody.
        return ""
