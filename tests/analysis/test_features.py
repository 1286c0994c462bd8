import csv

import numpy as np
import pytest
import torch
from encoders import automatic, write_encoder
from tiny import CLASSES, tiny_config, tiny_model

from t2sda_hf.analysis.embedding import Sample, embed, sample_pixels
from t2sda_hf.analysis.features import KINDS, feature_map, labelled_features
from t2sda_hf.analysis.plots import save_bars, save_relation, save_scatter
from t2sda_hf.analysis.unlabelled import measure
from t2sda_hf.training.build import build_student


class Blocks:
    """Two images of 32x64 with noise, labels in blocks of 8, a column of them ignored."""

    name = "blocks"

    def __len__(self) -> int:
        return 2

    def image(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (32, 64, 3), dtype=np.uint8)

    def labels(self, index: int) -> np.ndarray:
        blocks = np.random.default_rng(index).integers(0, len(CLASSES), (4, 8), dtype=np.uint8)
        blocks[:, 0] = 255
        return blocks.repeat(8, 0).repeat(8, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@pytest.mark.parametrize(("kind", "width"), [("head", 16), ("encoder_concat", 8 + 16 + 24 + 32), ("proj", 16)])
def test_maps_have_the_size_of_the_finest_level(model, kind: str, width: int) -> None:
    features = feature_map(model, torch.randn(2, 3, 32, 64), kind)
    assert features.shape == (2, width, 8, 16)
    assert not features.requires_grad


def test_the_head_feature_is_what_the_classifier_reads(model) -> None:
    images = torch.randn(1, 3, 32, 64)
    features = feature_map(model, images, "head")
    assert features.min() >= 0
    with torch.no_grad():
        torch.testing.assert_close(model.decode_head.classifier(features), model(images).logits)


def test_a_model_of_two_resolutions_shows_its_context() -> None:
    hrda = tiny_model(
        tiny_config(
            "--hrda={enabled: true, crop_size: [32, 32]}", "--data={crop_size: [64, 64], outer_crop_size: [64, 96]}"
        )
    ).eval()
    assert feature_map(hrda, torch.randn(1, 3, 64, 128), "head").shape[-2:] == (8, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_shows_no_padding(kind: str, tmp_path) -> None:
    """36x48 pixels are padded to 64x64 for it, and are 9x12 cells."""
    backbone = build_student(automatic(write_encoder("convnext", tmp_path))).eval()
    assert feature_map(backbone, torch.randn(1, 3, 36, 48), kind).shape[-2:] == (9, 12)


def test_labels_are_taken_at_the_cells_and_ignored_ones_left_out(model) -> None:
    found = list(labelled_features(model, Blocks(), None))
    assert len(found) == 2
    for index, (features, labels) in enumerate(found):
        cells = torch.from_numpy(Blocks().labels(index)[::4, ::4]).flatten()
        assert labels.tolist() == cells[cells != 255].tolist()
        assert features.shape == (8 * 16 - 8 * 2, 16)
    assert len(list(labelled_features(model, Blocks(), None, limit=1))) == 1


def test_pixels_are_drawn_evenly_and_once_from_a_stream() -> None:
    numbers = torch.arange(1000.0)[:, None]
    labels = (torch.arange(1000) >= 990).long()  # 990 of class 0, 10 of class 1
    sample = sample_pixels(zip(numbers.split(64), labels.split(64), strict=True), 3, per_class=100)
    drawn = sample.features[:, 0]
    assert sample.labels.bincount(minlength=3).tolist() == [100, 10, 0]
    assert len(set(drawn.tolist())) == 110
    assert sorted(drawn[sample.labels == 1].tolist()) == list(range(990, 1000))
    of_first = drawn[sample.labels == 0]
    assert 400 < of_first.mean() < 590  # evenly from the whole stream: sd of the mean is 27
    again = sample_pixels([(numbers, labels)], 3, per_class=100)
    assert again.features.shape == sample.features.shape
    with pytest.raises(ValueError, match="no pixel is labelled"):
        sample_pixels([], 3)


def test_the_plane_keeps_apart_what_is_apart_in_any_scale() -> None:
    random = torch.Generator().manual_seed(0)
    near = torch.tensor([1.0, 0, 0, 0]) + 0.02 * torch.randn(60, 4, generator=random)
    far = torch.tensor([0, 1.0, 0, 0]) + 0.02 * torch.randn(60, 4, generator=random)
    ones = Sample(100 * near, torch.zeros(60, dtype=torch.long))  # unit length is taken, so the factor is nothing
    others = Sample(far, torch.ones(60, dtype=torch.long))
    planes = embed([ones, others], perplexity=10)
    assert [plane.shape for plane in planes] == [(60, 2), (60, 2)]
    middles = [plane.mean(0) for plane in planes]
    spread = max(np.linalg.norm(plane - middle, axis=1).max() for plane, middle in zip(planes, middles, strict=True))
    assert np.linalg.norm(middles[0] - middles[1]) > spread
    np.testing.assert_array_equal(embed([ones, others], perplexity=10)[0], planes[0])


def test_too_few_pixels_for_the_plane_are_refused() -> None:
    with pytest.raises(ValueError, match="needs more than 90 pixels, got 60"):
        embed([Sample(torch.rand(60, 4), torch.zeros(60, dtype=torch.long))])


def test_every_figure_has_its_numbers_beside_it(tmp_path) -> None:
    def rows(name: str) -> list:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
            return list(csv.reader(file))

    save_bars(tmp_path / "bars.png", {"CCD": {"a": [1.5, np.nan], "b": [2, 3]}}, ["road", "sky"])
    assert rows("bars") == [["class", "CCD: a", "CCD: b"], ["road", "1.5", "2"], ["sky", "nan", "3"]]
    save_relation(tmp_path / "relation.png", {"a": ([0.5, np.nan], [80.0, 1.0])}, ["road", "sky"])
    assert rows("relation")[1:] == [["a", "road", "0.5", "80.0"], ["a", "sky", "nan", "1.0"]]
    sample = Sample(torch.rand(2, 3), torch.tensor([1, 0]))
    save_scatter(tmp_path / "plane.png", {"source": (np.array([[0.0, 1.0], [2.0, 3.0]]), sample)}, ["road", "sky"])
    assert rows("plane")[1:] == [["source", "sky", "0.0", "1.0"], ["source", "road", "2.0", "3.0"]]


class Broken(Blocks):
    def image(self, index: int) -> np.ndarray:
        if index == 1:
            raise ValueError("row 1 of blocks is cut off")
        return super().image(index)


def test_models_are_compared_without_labels(model) -> None:
    other = tiny_model(seed=1).eval()
    both = {"a": (model, None), "b": (other, None)}
    proxies, shares, unreadable = measure(both, Broken(), len(CLASSES), threshold=0.0)
    assert unreadable == ["row 1 of blocks is cut off"]
    assert proxies["a"]["coverage"] == 1
    assert proxies["a"]["agreement with b"] == proxies["b"]["agreement with a"]
    assert shares["a"].sum() == pytest.approx(1)
    same, _, _ = measure({"a": (model, None), "copy": (model, None)}, Blocks(), len(CLASSES), threshold=0.5)
    assert same["a"]["agreement with copy"] == 1
