"""The same files through this project and through the official evaluator of Cityscapes.

cityscapes_evaluator.json is what that evaluator (PyPI: cityscapesScripts 2.3.0) wrote about the files of `write_files`:

    python -c "from test_cityscapes_evaluator import write_files; write_files('DIR')"
    CITYSCAPES_DATASET=DIR CITYSCAPES_RESULTS=DIR/results CITYSCAPES_EXPORT_DIR=DIR csEvalPixelLevelSemanticLabeling

reduced to its scores and to the 19 x 19 part of its confusion matrix. Nothing of that package is needed here.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from t2sda_hf.evaluation.evaluator import evaluate_model
from t2sda_hf.labels import CITYSCAPES_CLASSES, LABEL_SPACES

OFFICIAL = json.loads((Path(__file__).parent / "cityscapes_evaluator.json").read_text(encoding="utf-8"))
NAMES = np.array(LABEL_SPACES["cityscapes_ids"])  # position = label id on disk
ID_OF = np.array([int(np.flatnonzero(name == NAMES)[0]) for name in CITYSCAPES_CLASSES])


def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Label ids 0..33 as on disk, void ones among them, and predicted classes 0..18; (48,64) uint8 each.

    No train (class 16) is labelled, and one pixel in a hundred is predicted to be one; terrain (9) is neither.
    """
    rng = np.random.default_rng(index)
    labels = np.repeat(np.repeat(rng.integers(0, 34, (12, 16)), 4, 0), 4, 1)
    labels[(labels == ID_OF[16]) | (labels == ID_OF[9])] = ID_OF[2]
    class_of = np.full(34, 255)
    class_of[ID_OF] = np.arange(19)
    right = class_of[labels]
    others = np.array([c for c in range(19) if c not in (9, 16)])
    predictions = np.where((rng.random(right.shape) < 0.6) & (right < 255), right, rng.choice(others, right.shape))
    predictions[rng.random(right.shape) < 0.01] = 16
    return labels.astype(np.uint8), predictions.astype(np.uint8)


def write_files(folder: str) -> None:
    """Four images as the official evaluator expects them."""
    truth, results = Path(folder) / "gtFine" / "val" / "town", Path(folder) / "results"
    truth.mkdir(parents=True)
    results.mkdir()
    for index in range(4):
        labels, predictions = draw(index)
        name = f"town_{index:06d}_000019"
        Image.fromarray(labels).save(truth / f"{name}_gtFine_labelIds.png")
        Image.fromarray(labels.astype(np.uint16)).save(truth / f"{name}_gtFine_instanceIds.png")
        Image.fromarray(ID_OF[predictions].astype(np.uint8)).save(results / f"{name}_pred.png")


class Drawn:
    """The files as a domain. An image shows the class that is to be predicted as its red value."""

    name = "drawn"

    def __len__(self) -> int:
        return 4

    def image(self, index: int) -> np.ndarray:
        return np.repeat(10 * draw(index)[1][..., None], 3, axis=2)

    def labels(self, index: int) -> np.ndarray:
        names = NAMES[draw(index)[0]]
        labels = np.full(names.shape, 255, np.uint8)
        for class_id, name in enumerate(CITYSCAPES_CLASSES):
            labels[names == name] = class_id
        return labels


class ReadsRed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        red = 25.5 * (pixel_values[:, :1] * 0.229 + 0.485)
        return SimpleNamespace(logits=-((red - torch.arange(19.0).view(1, 19, 1, 1)) ** 2))


@pytest.fixture(scope="module")
def ours() -> dict:
    return evaluate_model(ReadsRed(), Drawn(), image_size=None, classes=CITYSCAPES_CLASSES, progress=False)


def test_every_pixel_is_counted_as_the_official_evaluator_counts_it(ours: dict) -> None:
    assert ours["confusion"] == OFFICIAL["confusion"]


def test_scores_are_those_of_the_official_evaluator(ours: dict) -> None:
    for name, official in OFFICIAL["classScores"].items():
        if official is None:  # 0/0
            assert ours["iou"].get(name) is None  # "bridge" and others are no classes of the benchmark
        else:
            assert ours["iou"][name] == pytest.approx(100 * official, abs=1e-6)
    assert ours["iou"]["terrain"] is None
    assert ours["iou"]["train"] == 0
    assert ours["miou"] == pytest.approx(100 * OFFICIAL["averageScoreClasses"], abs=1e-6)
