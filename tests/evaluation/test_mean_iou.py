import math
import os
import socket
import tracemalloc
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import jaccard_score

from t2sda_hf.evaluation import confusion, mean_iou
from t2sda_hf.evaluation.confusion import confusion_matrix, scores
from t2sda_hf.evaluation.mean_iou import MeanIoU

METRIC_FILE = Path(mean_iou.__file__)


def slow_scores(pairs, num_classes, ignore_index=255):
    """The definition in plain Python: sets of pixels per class, counted one by one."""
    iou, accuracy, right, counted = [], [], 0, 0
    for c in range(num_classes):
        intersection = union = labelled = 0
        for prediction_map, label_map in pairs:
            for prediction, label in zip(
                prediction_map.reshape(-1).tolist(), label_map.reshape(-1).tolist(), strict=True
            ):
                if label == ignore_index:
                    continue
                intersection += prediction == c and label == c
                union += prediction == c or label == c
                labelled += label == c
        iou.append(intersection / union if union else math.nan)
        accuracy.append(intersection / labelled if labelled else math.nan)
        right += intersection
        counted += labelled
    known = [v for v in iou if not math.isnan(v)]
    reached = [v for v in accuracy if not math.isnan(v)]
    return {
        "mean_iou": sum(known) / len(known),
        "mean_accuracy": sum(reached) / len(reached),
        "overall_accuracy": right / counted,
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def assert_same_scores(result, expected):
    assert set(result) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(result[key], value, rtol=1e-12, err_msg=key)


def random_pair(rng, num_classes, shape, dtype=np.uint8, ignored=0.2):
    labels = rng.integers(0, num_classes, shape)
    predictions = np.where(rng.random(shape) < 0.5, labels, rng.integers(0, num_classes, shape))
    labels = np.where(rng.random(shape) < ignored, 255, labels)
    return predictions.astype(dtype), labels.astype(dtype)


def test_scores_of_a_two_class_map_by_hand():
    labels = np.array([[0, 0, 0, 1], [1, 1, 255, 255]])
    predictions = np.array([[0, 0, 1, 1], [1, 0, 0, 1]])

    matrix = confusion_matrix(predictions, labels, 2)
    result = scores(matrix, ["road", "sky"])

    assert matrix.tolist() == [[2, 1], [1, 2]]  # rows are labels: one road pixel was called sky
    assert result["iou"] == {"road": 2 / 4, "sky": 2 / 4}
    assert result["mean_iou"] == 0.5
    assert result["overall_accuracy"] == 4 / 6
    assert result["mean_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("num_classes", [1, 2, 7, 19])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_metric_equals_the_definition_on_random_maps(num_classes, dtype):
    rng = np.random.default_rng(num_classes)
    pairs = [random_pair(rng, num_classes, shape, dtype) for shape in [(9, 13), (1, 1), (16, 5)]]
    metric = MeanIoU(num_labels=num_classes)

    for prediction, label in pairs:
        metric.add(prediction=prediction, reference=label)

    assert_same_scores(metric.compute(), slow_scores(pairs, num_classes))


def test_metric_equals_scikit_learn_on_maps_larger_than_a_chunk():
    rng = np.random.default_rng(0)
    predictions, labels = random_pair(rng, 5, (300, 501))
    valid = labels != 255

    matrix = confusion_matrix(predictions, labels, 5)

    assert labels.size > 2 * confusion._CHUNK
    assert labels.size % confusion._CHUNK
    np.testing.assert_array_equal(matrix, sklearn_confusion_matrix(labels[valid], predictions[valid], labels=range(5)))
    expected = jaccard_score(labels[valid], predictions[valid], average=None)
    np.testing.assert_allclose(scores(matrix)["per_category_iou"], expected, rtol=1e-12)


def test_class_that_never_occurs_is_nan_and_left_out_of_the_mean():
    result = scores(confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 3))

    assert math.isnan(result["per_category_iou"][2])
    assert math.isnan(result["per_category_accuracy"][2])
    assert result["mean_iou"] == 0.5


def test_class_that_is_only_predicted_counts_as_zero_in_the_iou_and_not_in_the_accuracy():
    result = scores(confusion_matrix(np.array([0, 0, 2]), np.array([0, 0, 0]), 3))

    assert result["per_category_iou"][2] == 0
    assert result["mean_iou"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["mean_accuracy"] == pytest.approx(2 / 3)


def test_ignored_maps_alone_give_nan_without_a_warning():
    metric = MeanIoU(num_labels=2)
    result = metric.compute(predictions=[np.zeros((2, 2), int)], references=[np.full((2, 2), 255)])

    assert math.isnan(result["mean_iou"])
    assert math.isnan(result["mean_accuracy"])
    assert math.isnan(result["overall_accuracy"])


@pytest.mark.parametrize("ignore_index", [-100, 0, 65535])
def test_any_integer_can_mark_ignored_pixels(ignore_index):
    labels = np.array([ignore_index, 1, 2, 2], dtype=np.int32)
    predictions = np.array([1, 1, 2, 1], dtype=np.int32)

    matrix = confusion_matrix(predictions, labels, 3, ignore_index)

    assert matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_predictions_on_ignored_pixels_are_not_looked_at():
    labels = np.array([255, 255, 1], dtype=np.uint8)

    matrix = confusion_matrix(np.array([200, 1, 1], dtype=np.uint8), labels, 2)

    assert matrix.tolist() == [[0, 0], [0, 1]]


def test_tensors_lists_and_arrays_that_are_not_contiguous_give_the_same_matrix():
    rng = np.random.default_rng(1)
    predictions, labels = random_pair(rng, 4, (6, 8))
    expected = confusion_matrix(predictions, labels, 4)

    from_tensors = confusion_matrix(torch.from_numpy(predictions).long(), torch.from_numpy(labels), 4)
    from_lists = confusion_matrix(predictions.tolist(), labels.tolist(), 4)
    from_views = confusion_matrix(predictions.T, np.ascontiguousarray(labels.T), 4)

    for matrix in (from_tensors, from_lists, from_views):
        np.testing.assert_array_equal(matrix, expected)


def test_labels_out_of_range_are_an_error_that_lists_ids_and_counts():
    labels = np.zeros(200_000, dtype=np.uint8)
    labels[[5, 150_000, 199_999]] = [30, 30, 33]

    with pytest.raises(ValueError, match=r"labels contain 30 \(2 pixels\), 33 \(1 pixels\).* 19 classes \(0\.\.18\)"):
        confusion_matrix(np.zeros_like(labels), labels, 19)


def test_negative_ids_are_an_error():
    with pytest.raises(ValueError, match=r"labels contain -1 \(1 pixels\)"):
        confusion_matrix(np.array([0, 0]), np.array([-1, 0]), 2)
    with pytest.raises(ValueError, match=r"predictions contain -1 \(1 pixels\)"):
        confusion_matrix(np.array([0, -1]), np.array([0, 0]), 2)


def test_predictions_out_of_range_on_counted_pixels_are_an_error():
    with pytest.raises(ValueError, match=r"predictions contain 2 \(2 pixels\), but there are 2 classes"):
        confusion_matrix(np.array([2, 2, 2]), np.array([0, 1, 255]), 2)


def test_message_about_very_many_wrong_ids_stays_short():
    with pytest.raises(ValueError, match=r"11 \(1 pixels\), 88 more ids, but"):
        confusion_matrix(np.zeros(100, int), np.arange(100), 2)


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)


def test_scores_instead_of_class_ids_are_an_error():
    with pytest.raises(ValueError, match=r"predictions must be whole numbers.*argmax"):
        confusion_matrix(np.zeros((2, 2)), np.zeros((2, 2), int), 2)


def test_wrong_number_of_names_is_an_error():
    with pytest.raises(ValueError, match="2 classes, but 3 names"):
        scores(np.eye(2, dtype=int), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"shape \(K, K\), got \(2, 3\)"):
        scores(np.zeros((2, 3), int))


def test_full_size_map_needs_less_than_five_megabytes():
    predictions, labels = random_pair(np.random.default_rng(0), 19, (1024, 2048))
    tracemalloc.start()

    confusion_matrix(predictions, labels, 19)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_batches_and_single_maps_and_one_call_give_the_same_result():
    rng = np.random.default_rng(2)
    pairs = [random_pair(rng, 6, (7, 11)) for _ in range(4)]
    predictions, references = np.stack([p for p, _ in pairs]), np.stack([r for _, r in pairs])
    expected = slow_scores(pairs, 6)
    metric = MeanIoU(num_labels=6)

    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    assert_same_scores(metric.compute(), expected)

    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add_batch(predictions=torch.from_numpy(predictions[3:]), references=torch.from_numpy(references[3:]))
    assert_same_scores(metric.compute(), expected)

    assert_same_scores(metric.compute(predictions=predictions, references=references), expected)


def test_compute_starts_anew_and_without_data_is_an_error():
    metric = MeanIoU(num_labels=2)
    metric.compute(predictions=[[0, 0]], references=[[0, 1]])

    assert not metric.matrix.any()
    with pytest.raises(ValueError, match="nothing was added"):
        metric.compute()
    assert metric.compute(predictions=[[0, 1]], references=[[0, 1]])["mean_iou"] == 1


def test_batch_with_one_wrong_map_adds_nothing():
    metric = MeanIoU(num_labels=2)

    with pytest.raises(ValueError, match="labels contain 7"):
        metric.add_batch(predictions=[[0, 1], [0, 1]], references=[[0, 1], [0, 7]])
    with pytest.raises(ValueError, match="shorter than"):
        metric.add_batch(predictions=[[0, 1], [0, 1]], references=[[0, 1]])

    assert not metric.matrix.any()


def test_matrices_of_two_processes_sum_to_the_result_of_one():
    rng = np.random.default_rng(3)
    pairs = [random_pair(rng, 5, (8, 8)) for _ in range(5)]
    shards = [MeanIoU(num_labels=5), MeanIoU(num_labels=5)]
    for index, (prediction, reference) in enumerate(pairs):
        shards[index % 2].add(prediction=prediction, reference=reference)
    whole = MeanIoU(num_labels=5)

    whole.add_matrix(torch.from_numpy(shards[0].matrix + shards[1].matrix))

    assert_same_scores(whole.compute(), slow_scores(pairs, 5))


def test_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must have the shape \(2, 2\), got \(3, 3\)"):
        MeanIoU(num_labels=2).add_matrix(np.zeros((3, 3), int))


def test_missing_arguments_are_named():
    with pytest.raises(ValueError, match="number of classes"):
        MeanIoU()
    with pytest.raises(ValueError, match="num_process"):
        MeanIoU(num_labels=2, num_process=2)
    with pytest.raises(ValueError, match="prediction and a reference"):
        MeanIoU(num_labels=2).add(prediction=[0])
    with pytest.raises(ValueError, match="predictions and references"):
        MeanIoU(num_labels=2).compute(predictions=[[0]])


@pytest.fixture
def loaded_class(tmp_path, monkeypatch):
    """What evaluate.load makes of the file, in a fresh modules cache and without any network."""

    def refuse(*_):
        raise AssertionError("the metric must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return lambda **arguments: evaluate.load(str(METRIC_FILE), **arguments)


def test_metric_loads_from_its_path_without_a_network_and_agrees_with_the_package(loaded_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions, references = random_pair(np.random.default_rng(4), 19, (2, 12, 10))

    metric = loaded_class(num_labels=19)

    assert type(metric) is not MeanIoU
    assert type(metric).__name__ == "MeanIoU"
    expected = MeanIoU(num_labels=19).compute(predictions=predictions, references=references)
    assert_same_scores(metric.compute(predictions=predictions, references=references), expected)


def test_metric_writes_nothing_to_the_cache(tmp_path):
    metric = MeanIoU(num_labels=2, cache_dir=str(tmp_path / "cache"))

    metric.compute(predictions=[[0, 1]], references=[[0, 1]])

    assert os.listdir(tmp_path) == []


def test_metric_can_be_combined_with_others():
    combined = evaluate.combine([MeanIoU(num_labels=2)])
    combined.add(predictions=[0, 1], references=[0, 0])
    assert combined.compute()["mean_iou"] == pytest.approx((1 / 2 + 0) / 2)
