import cv2
import numpy as np
import pytest

from t2sda_hf.data.transforms import (
    PADDING_COLOR,
    Window,
    pad_image,
    pad_labels,
    random_window,
    resize_image,
    resize_labels,
    resized_size,
    shows_several_classes,
)


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((1052, 1914), (720, 1280), (704, 1280)),  # GTA5 "1280x720": min(1280/1914, 720/1052) = 0.66876
        ((1046, 1914), (720, 1280), (700, 1280)),
        ((1052, 1914), (1440, 2560), (1407, 2560)),
        ((1046, 1914), (1440, 2560), (1399, 2560)),
        ((1024, 2048), (512, 1024), (512, 1024)),  # Cityscapes
        ((760, 1280), (760, 1280), (760, 1280)),  # SYNTHIA
        ((1280, 704), (720, 1280), (1280, 704)),  # long sides meet long sides, whatever the orientation
        ((10, 3000), (64, 128), (1, 128)),  # a side is never lost
    ],
)
def test_keep_ratio_is_mmcvs_rule(size, wanted, expected):
    assert resized_size(size, wanted, "keep_ratio") == expected


def test_exact_resizing_is_exact():
    assert resized_size((1052, 1914), (720, 1280), "exact") == (720, 1280)


@pytest.mark.parametrize("size", [(48, 64), (37, 91), (140, 200), (7, 5)])
def test_images_are_resized_as_opencv_does_within_one_grey_level(size):
    image = np.random.default_rng(0).integers(0, 256, (105, 191, 3), dtype=np.uint8)
    expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(resize_image(image, size).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(48, 64), (37, 91), (140, 200), (7, 5)])
def test_labels_are_resized_as_opencv_does(size):
    labels = np.random.default_rng(0).integers(0, 20, (105, 191), dtype=np.uint8)
    expected = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(resize_labels(labels, size), expected)


def test_the_same_size_is_the_same_array():
    image = np.zeros((4, 6, 3), np.uint8)
    assert resize_image(image, (4, 6)) is image
    assert resize_labels(image[..., 0], (4, 6)).shape == (4, 6)


def test_padding_goes_below_and_to_the_right():
    image, labels = np.full((3, 8, 3), 7, np.uint8), np.full((3, 8), 2, np.uint8)
    padded, padded_labels = pad_image(image, (5, 6)), pad_labels(labels, (5, 6))
    assert padded.shape == (5, 8, 3)
    assert (padded[:3] == 7).all()
    assert (padded[3:] == PADDING_COLOR).all()
    assert (padded_labels[:3] == 2).all()
    assert (padded_labels[3:] == 255).all()
    assert pad_image(image, (3, 8)) is image


def test_the_padding_colour_normalises_to_about_zero():
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    assert np.abs((np.array(PADDING_COLOR) - mean) / std).max() < 0.01


def test_a_window_in_a_window():
    array = np.arange(100).reshape(10, 10)
    outer, inner = Window(2, 3, 6, 5), Window(1, 2, 3, 2)
    assert np.array_equal(inner.of(outer.of(array)), outer.inside(inner).of(array))
    assert outer.inside(inner) == Window(3, 5, 3, 2)


def test_every_offset_is_drawn_equally_often_and_the_last_one_too():
    rng = np.random.default_rng(0)
    windows = [random_window((5, 7), (3, 7), rng) for _ in range(3000)]
    counts = np.bincount([window.top for window in windows])
    assert len(counts) == 3
    assert np.abs(counts - 1000).max() < 120  # 4.6 standard deviations
    assert {window.left for window in windows} == {0}


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((75, 25), False), ((74, 26), True), ((100, 0), False), ((0, 0), False), ((40, 20), True), ((45, 15), False)],
)
def test_a_crop_shows_several_classes_if_none_covers_three_quarters_of_what_is_labelled(shares, expected):
    labels = np.full(100, 255, np.uint8)  # the rest is ignored and does not count
    labels[: shares[0]] = 3
    labels[shares[0] : sum(shares)] = 5
    assert shows_several_classes(labels.reshape(10, 10), 0.75) is expected
