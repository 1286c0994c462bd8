"""Mean intersection over union from one confusion matrix: constant memory, exact, summable over processes.

`evaluate.load("<path of this file>", num_labels=19)` copies the file away and runs the copy: imports of this package
must be absolute, and no line may import two modules, which evaluate's scanner does not understand.
"""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np

from t2sda_hf.evaluation.confusion import confusion_matrix, scores, whole_numbers

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
