"""The metric's folder loads by its path, in an interpreter's own words, and is the code of the package."""

import importlib
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from huggingface_hub import HfApi
from server import Hub

from t2sda_hf.evaluation.confusion import confusion_matrix, scores
from t2sda_hf.hub.metric import NAME, metric_source
from t2sda_hf.hub.push import push_folder

FOLDER = Path(__file__).parents[2] / "model_cards" / NAME


@pytest.fixture(autouse=True)
def modules_are_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """evaluate imports copies from a cache folder; Python remembers what was there for an earlier test."""
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()


def test_the_folder_holds_the_code_of_the_package() -> None:
    source = (FOLDER / f"{NAME}.py").read_text(encoding="utf-8")
    assert source == metric_source()
    assert "from t2sda_hf" not in source


def test_it_loads_by_path_and_gives_the_scores_of_the_package() -> None:
    metric = evaluate.load(str(FOLDER), num_labels=4)
    assert not type(metric).__module__.startswith("t2sda_hf")
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, (3, 20, 30)), rng.integers(0, 4, (3, 20, 30))
    labels[:, :5] = 255
    metric.add_batch(predictions=predictions, references=labels)
    expected = scores(confusion_matrix(predictions, labels, 4))
    found = metric.compute()
    assert found["mean_iou"] == expected["mean_iou"]
    np.testing.assert_array_equal(found["per_category_iou"], expected["per_category_iou"])


def test_the_example_of_its_card_gives_what_the_card_says() -> None:
    metric = evaluate.load(str(FOLDER), num_labels=3)
    metric.add_batch(predictions=[[[0, 1], [2, 2]]], references=[[[0, 1], [1, 255]]])
    assert metric.compute()["mean_iou"] == pytest.approx(0.5)  # IoU 1, 1/2 and 0


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # see test_push
def test_it_is_pushed_as_a_space(hub: Hub, api: HfApi) -> None:
    push_folder(FOLDER, f"me/{NAME}", repo_type="space", space_sdk="gradio", api=api)
    assert {"README.md", "app.py", "requirements.txt", f"{NAME}.py"} <= set(hub.files(f"me/{NAME}"))
