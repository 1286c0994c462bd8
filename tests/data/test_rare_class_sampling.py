import math

import numpy as np
import pytest

from t2sda_hf.data.rare_class_sampling import class_probabilities, rare_classes


def test_the_probabilities_of_the_specification():
    probabilities = class_probabilities(np.array([0.6, 0.3, 0.08, 0.02]), 0.01)
    assert probabilities == pytest.approx([6.45e-26, 6.90e-13, 2.4726e-3, 0.99753], rel=1e-3)


def test_probabilities_are_the_softmax_and_absent_classes_are_not_in_it():
    f, T = [0.5, 0.0, 0.3, 0.2], 0.1
    weights = [math.exp((1 - share) / T) if share else 0 for share in f]
    expected = [weight / sum(weights) for weight in weights]
    assert class_probabilities(np.array(f), T) == pytest.approx(expected)


def test_a_tiny_temperature_does_not_overflow():
    assert class_probabilities(np.array([0.9, 0.1]), 1e-6) == pytest.approx([0, 1])


def test_a_high_temperature_draws_all_present_classes_alike():
    assert class_probabilities(np.array([0.9, 0.1, 0.0]), 1e6) == pytest.approx([0.5, 0.5, 0])


def test_images_of_a_class_show_strictly_more_pixels_than_asked():
    counts = np.array([[3000, 9000], [3001, 0], [10, 5000]])
    rare = rare_classes(counts, 0.01, 3000)
    assert [list(images) for images in rare.images] == [[1], [0, 2]]


def test_a_class_without_a_rich_image_takes_all_that_show_it_and_an_absent_one_is_never_drawn():
    counts = np.array([[9000, 5, 0], [9000, 0, 0], [9000, 7, 0]])
    rare = rare_classes(counts, 0.01, 3000)
    assert list(rare.images[1]) == [0, 2]
    assert len(rare.images[2]) == 0
    assert rare.probabilities[2] == 0
    drawn = [rare.draw(np.random.default_rng(seed)) for seed in range(50)]
    assert {class_id for _, class_id in drawn} == {1}  # f = (0.9996, 0.0004): the second practically always
    assert {index for index, _ in drawn} == {0, 2}


def test_classes_follow_the_probabilities_and_images_are_uniform():
    counts = np.array([[50, 50, 0], [0, 60, 40], [0, 0, 100], [100, 0, 0]])
    rare = rare_classes(counts, 0.5, 10)
    rng = np.random.default_rng(0)
    drawn = [rare.draw(rng) for _ in range(6000)]
    shares = np.bincount([class_id for _, class_id in drawn], minlength=3) / 6000
    assert shares == pytest.approx(rare.probabilities, abs=0.03)
    images_of_first = np.bincount([index for index, class_id in drawn if class_id == 0], minlength=4)
    assert images_of_first[1] == images_of_first[2] == 0
    assert images_of_first[0] / images_of_first.sum() == pytest.approx(0.5, abs=0.05)
