"""The interval of a gain against resampling by hand, and what a run says of itself at its end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2sda_hf.commands.train import _verdict, judge
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.evaluation.confusion import scores
from t2sda_hf.evaluation.gain import GROUPS, GroupCounts, gain_interval, pack
from t2sda_hf.training.derive import without_data


def matrices(right: float, num: int = 40, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """(num, 2, 2) confusion matrices of images with about that share of right pixels."""
    shares = np.clip(right + spread * np.random.default_rng(seed).normal(size=num), 0, 1)
    return np.array([[[round(500 * s), 500 - round(500 * s)], [500 - round(500 * s), round(500 * s)]] for s in shares])


def result(of_images: np.ndarray) -> dict[str, Any]:
    groups = GroupCounts(len(of_images), of_images.shape[1])
    for index, matrix in enumerate(of_images):
        groups.add(index, matrix)
    miou = 100 * scores(of_images.sum(axis=0))["mean_iou"]
    return {"miou": miou, "num_images": len(of_images), "groups": pack(groups.pixels)}


def test_counts_give_the_score_of_the_confusion_matrix_and_are_few():
    some = np.random.default_rng(0).integers(0, 50, (730, 3, 3))
    groups = GroupCounts(730, 3)
    for index, matrix in enumerate(some):
        groups.add(index, matrix)
    assert groups.pixels.shape == (GROUPS, 2, 3)
    intersection, union = groups.pixels.sum(axis=0)
    assert intersection / union == pytest.approx(scores(some.sum(axis=0))["per_category_iou"])
    assert len(json.dumps(pack(groups.pixels))) < 10_000


def test_the_interval_is_that_of_resampling_by_hand():
    new, old = matrices(0.8, spread=0.1, seed=1), matrices(0.7, spread=0.1, seed=2)
    low, high = gain_interval(result(new), result(old))
    rng, gains = np.random.default_rng(5), []
    for _ in range(3000):
        drawn = rng.integers(0, 40, 40)
        gains.append(100 * (scores(new[drawn].sum(0))["mean_iou"] - scores(old[drawn].sum(0))["mean_iou"]))
    assert [low, high] == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=0.5)
    assert gain_interval(result(new), result(old)) == (low, high)
    assert gain_interval(result(old), result(new)) == pytest.approx((-high, -low))


def test_equal_models_gain_nothing_and_where_it_cannot_be_told_nothing_is_said():
    one = result(matrices(0.8, spread=0.1))
    assert gain_interval(one, one) == (0, 0)
    assert gain_interval(one, {"miou": 3.0}) is None  # of an earlier release
    assert gain_interval(result(matrices(0.8, 4)), result(matrices(0.7, 4))) is None
    assert gain_interval(one, result(matrices(0.8, 39))) is None


def run(folder: Path, *words: str, trust: float = 0.5) -> RunConfig:
    (folder / "t2sda").mkdir()
    (folder / "t2sda" / "scalars.jsonl").write_text(f'{{"step": 50, "trust": {trust}}}\n', encoding="utf-8")
    return without_data(load_config(None, ["--baseline=source_only", f"--output_dir={folder}", *words]))


def results(new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
    return {"source_only": {"student": result(old)}, "t2sda": {"student": result(new)}}


def test_a_clear_gain_is_called_one(tmp_path: Path):
    found = judge(run(tmp_path), results(matrices(0.8, spread=0.02), matrices(0.6, spread=0.02, seed=1)))
    assert found["notes"] == []
    assert 0 < found["gain_interval"][0] < found["gain_interval"][1]
    assert _verdict(20.0, found).startswith(" gains +20.00 mIoU (95 % over test images: +")
    assert _verdict(-20.0, found).startswith(" loses 20.00 mIoU")


def test_a_gain_within_the_noise_is_not_celebrated(tmp_path: Path):
    found = judge(run(tmp_path), results(matrices(0.72, spread=0.2, seed=1), matrices(0.7, spread=0.2, seed=2)))
    (note,) = found["notes"]
    assert "within the noise of its 40 test images (95 %: -" in note
    assert _verdict(3.59, found).startswith(" differs by +3.59 mIoU (95 % over test images: -")


def test_a_rate_that_never_rose_is_said(tmp_path: Path):
    """40 updates against a warm-up of 1,500 ended with "gains +3.59 mIoU"."""
    cfg = run(tmp_path, "--train.max_steps=40", "--optim.warmup_steps=1500")
    found = judge(cfg, results(matrices(0.8), matrices(0.6)))
    assert [note.split(":")[0] for note in found["notes"]] == ["The learning rate never reaches its base"]
    assert "gains" not in _verdict(20.0, found)


def test_a_teacher_that_was_never_sure_is_said(tmp_path: Path):
    found = judge(run(tmp_path, trust=0.003), results(matrices(0.8), matrices(0.6)))
    assert ["The teacher was never sure" in note for note in found["notes"]] == [True]


def test_too_few_test_images_are_said(tmp_path: Path):
    found = judge(run(tmp_path), results(matrices(0.8, 3), matrices(0.6, 3)))
    assert found["gain_interval"] is None
    assert "cannot be told from 3 test images" in found["notes"][0]


def test_results_of_an_earlier_release_are_told_as_they_were(tmp_path: Path):
    old = {name: {"student": {"miou": miou, "num_images": 9}} for name, miou in (("source_only", 1.0), ("t2sda", 3.0))}
    found = judge(run(tmp_path), old)
    assert found == {"gain_interval": None, "notes": []}
    assert _verdict(2.0, found) == " gains +2.00 mIoU over"
