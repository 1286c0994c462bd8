"""Which pixels of a mixed image show the source."""

from collections import Counter

import pytest
import torch
from torch import Generator

from t2sda_hf.augment.class_mix import sample_class_mix
from t2sda_hf.batch import shown_ids


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def mixed(labels: torch.Tensor, classes_from: str, generator: Generator) -> torch.Tensor:
    return sample_class_mix(labels, shown_ids(labels), classes_from, generator)


def labels_of(*images: list[int]) -> torch.Tensor:
    """One row of pixels per image, each class four times."""
    return torch.tensor([[image * 4] for image in images])


def pasted(labels: torch.Tensor, from_source: torch.Tensor) -> list[set[int]]:
    """Classes pasted in each image; fails if one is pasted in part."""
    for image, mask in zip(labels, from_source, strict=True):
        for class_id in image.unique():
            assert len(mask[image == class_id].unique()) == 1
    return [set(image[mask].tolist()) for image, mask in zip(labels, from_source, strict=True)]


@pytest.mark.parametrize(
    ("classes", "number"), [([3], 1), ([1, 4], 1), ([0, 1, 2], 2), ([0, 1, 2, 3], 2), ([5, 6, 7, 8, 9], 3)]
)
@pytest.mark.parametrize("classes_from", ["batch", "image"])
def test_half_of_the_classes_rounded_up_are_pasted_whole(classes, number, classes_from):
    labels = labels_of(classes, classes)
    for seed in range(10):
        for image in pasted(labels, mixed(labels, classes_from, random(seed))):
            assert len(image) == number


def test_a_single_class_is_pasted_whole():
    labels = torch.full((2, 4, 4), 7)
    assert mixed(labels, "batch", random()).all()


def test_ignored_pixels_are_a_class_and_may_be_drawn():
    labels = labels_of([0, 255])
    drawn = Counter(frozenset(pasted(labels, mixed(labels, "batch", random(seed)))[0]) for seed in range(50))
    assert set(drawn) == {frozenset({0}), frozenset({255})}


def test_by_image_each_draws_from_its_own_classes():
    labels = labels_of([0, 1, 2, 3], [8, 9, 8, 9])
    for seed in range(20):
        first, second = pasted(labels, mixed(labels, "image", random(seed)))
        assert (len(first), len(second)) == (2, 1)


def test_by_batch_classes_of_the_other_image_are_drawn_in_vain():
    labels = labels_of([0, 1], [2, 3])
    sizes = Counter(len(image) for seed in range(200) for image in pasted(labels, mixed(labels, "batch", random(seed))))
    # 2 of 4 classes are drawn: both, one or none of an image's two with probability 1/6, 4/6, 1/6.
    assert sizes[0] / 400 == pytest.approx(1 / 6, abs=0.06)
    assert sizes[1] / 400 == pytest.approx(4 / 6, abs=0.08)


def test_images_draw_on_their_own():
    labels = labels_of([0, 1, 2, 3], [0, 1, 2, 3])
    pairs = [pasted(labels, mixed(labels, "batch", random(seed))) for seed in range(50)]
    assert any(first != second for first, second in pairs)


def test_every_class_is_drawn_equally_often():
    labels = labels_of([0, 1, 2, 3, 255])
    times: Counter[int] = Counter()
    for seed in range(500):
        times.update(pasted(labels, mixed(labels, "image", random(seed)))[0])
    for class_id in (0, 1, 2, 3, 255):
        assert times[class_id] / 500 == pytest.approx(3 / 5, abs=0.08)


@pytest.mark.parametrize("classes_from", ["batch", "image"])
def test_a_function_of_labels_and_generator(classes_from):
    labels = torch.randint(0, 9, (3, 8, 8), generator=random())
    first, again, other = (mixed(labels, classes_from, random(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.bool
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
