import io

import numpy as np
import pytest
from PIL import Image

from t2sda_hf.data.streets import STREETS_CLASSES, draw_scene, streets
from t2sda_hf.labels import CITYSCAPES_CLASSES

DOMAINS = ("source", "target", "simulator", "night")


def scene(domain, seed=0, height=96, width=192):
    return draw_scene(domain, np.random.default_rng(seed), height, width)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_scene_is_a_function_of_the_random_state(domain):
    (image, labels), (again, labels_again), (other, _) = scene(domain), scene(domain), scene(domain, seed=1)
    assert image.shape == (96, 192, 3)
    assert image.dtype == labels.dtype == np.uint8
    assert np.array_equal(image, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(image, other)


@pytest.mark.parametrize("domain", DOMAINS)
def test_labels_are_train_ids_of_the_named_classes_without_ignored_pixels(domain):
    shown = np.unique(np.concatenate([scene(domain, seed)[1].ravel() for seed in range(60)]))
    assert [CITYSCAPES_CLASSES[i] for i in shown] == sorted(STREETS_CLASSES, key=CITYSCAPES_CLASSES.index)


def test_labels_of_the_source_are_exact_at_every_pixel():
    """The source is flat: where two neighbours differ in class they differ in colour, with no mixed pixel between."""
    image, labels = scene("source", 3)
    colours = {tuple(colour) for colour in image.reshape(-1, 3)}
    assert len(colours) < 600  # of 18,432 pixels: no anti-aliasing
    edge = labels[:, 1:] != labels[:, :-1]
    same_colour = (image[:, 1:] == image[:, :-1]).all(axis=2)
    assert not (edge & same_colour).any()


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_street_drawn_larger_is_the_same_street(domain):
    small, large = scene(domain)[1], scene(domain, height=192, width=384)[1]
    assert (large[::2, ::2] == small).mean() > 0.95


def test_the_domains_differ_in_colour_and_texture_but_not_in_classes():
    images = {domain: np.stack([scene(domain, seed)[0] for seed in range(10)]).astype(float) for domain in DOMAINS}
    assert images["night"].mean() < 0.6 * images["target"].mean()
    means = {domain: stack.mean(axis=(0, 1, 2)) for domain, stack in images.items()}
    assert np.abs(means["source"] - means["target"]).max() > 10
    noise = {domain: np.abs(np.diff(stack, axis=2)).__gt__(0).mean() for domain, stack in images.items()}
    assert max(noise["source"], noise["simulator"]) < 0.5 < min(noise["target"], noise["night"])


def test_a_set_is_reproducible_extendable_and_splits_share_nothing():
    few, more = streets("target", "train", 3, seed=5), streets("target", "train", 5, seed=5)
    for index in range(3):
        assert few[index]["file_name"] == more[index]["file_name"] == f"target_train_{index:05d}.png"
        assert np.array_equal(np.array(few[index]["image"]), np.array(more[index]["image"]))
        assert np.array_equal(np.array(few[index]["label"]), np.array(more[index]["label"]))
    others = (streets("target", "validation", 3, 5), streets("target", "train", 3, 6), streets("source", "train", 3, 5))
    for other in others:
        assert not np.array_equal(np.array(few[0]["image"]), np.array(other[0]["image"]))


def test_a_row_holds_png_files():
    rows = streets("source", "validation", 1)
    row = rows.with_format("arrow")[0]
    assert Image.open(io.BytesIO(row["label"][0]["bytes"].as_py())).mode == "L"
    assert Image.open(io.BytesIO(row["image"][0]["bytes"].as_py())).mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "sauce"}, "Unknown domain 'sauce'. The streets have the domains source, target"),
        ({"split": "test"}, "Unknown split 'test'. The streets have the splits train, validation"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"height": 31}, "at least 32 pixels in height and width, got 31x192"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        streets(**{"domain": "source", "split": "train", "num_images": 1} | arguments)


def test_the_simulator_has_the_streets_of_the_target_and_the_night_its_photographs():
    (flat, labels), (photo, of_photo), (dark, of_dark) = (scene(d, 4) for d in ("simulator", "target", "night"))
    assert np.array_equal(labels, of_photo)
    assert np.array_equal(labels, of_dark)
    assert not np.array_equal(flat, photo)
    assert dark.mean() < photo.mean()
