"""The sample stream: a pure function of (seed, position), and the pipeline of method 3.4 against a slow twin."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import CLASSES, tiny_config

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import check_domain, load_domain
from t2sda_hf.data.pairs import PairDataset, PositionSampler, batches, collate
from t2sda_hf.data.rare_class_sampling import rare_classes
from t2sda_hf.data.transforms import PADDING_COLOR

COUNT = 6
SOURCE = load_domain(DomainConfig(path="streets-source", num_images=COUNT), CLASSES)
TARGET = load_domain(DomainConfig(path="streets-target", num_images=COUNT), CLASSES, labelled=False)


def pairs(*overrides, source=SOURCE, target=TARGET, rare=None):
    return PairDataset(tiny_config("--rcs.enabled=false", *overrides), source, target, rare)


def find(crop, image):
    """Top and left of `crop` in `image`, None if it is not there."""
    height, width = crop.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(image, (height, width), axis=(0, 1))
    corner = np.argwhere((windows[:, :, :, 0, 0] == crop[0, 0]).all(axis=2))
    for top, left in corner:
        if np.array_equal(image[top : top + height, left : left + width], crop):
            return int(top), int(left)
    return None


def origin(crop, domain):
    """(image index, top, left, flipped) of a crop."""
    for index in range(len(domain)):
        for flipped in (False, True):
            place = find(crop[:, ::-1] if flipped else crop, domain.image(index))
            if place:
                return index, *place, flipped
    raise AssertionError("the crop is from nowhere")


def same(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_sample_is_a_function_of_seed_and_position():
    dataset, again = pairs(), pairs()
    last = dataset[11]
    for position in range(4):
        dataset[position]
    assert same(dataset[11], last)
    assert same(again[11], last)
    assert not same(again[12], last)
    assert not same(pairs("--seed=1")[11], last)


def test_crops_are_parts_of_their_images_and_labels_go_with_them():
    dataset = pairs()
    for position in range(6):
        sample = dataset[position]
        index, top, left, flipped = origin(sample["source_images"], SOURCE)
        labels = SOURCE.labels(index)[top : top + 32, left : left + 64]
        assert np.array_equal(sample["source_labels"], labels[:, ::-1] if flipped else labels)
        origin(sample["target_images"], TARGET)  # raises if it is not a crop of the target


def test_the_crop_lies_in_the_window_and_all_three_flip_together():
    dataset = pairs()
    flips = set()
    for position in range(12):
        sample = dataset[position]
        top, left = sample["inner_corner"]
        assert np.array_equal(sample["outer_source"][top : top + 32, left : left + 64], sample["source_images"])
        *_, flipped = origin(sample["outer_source"], SOURCE)
        style = sample["style_reference"]
        flips.add(flipped)
        # The style is a whole target image resized to the window, the same one the crop is from, flipped as the source.
        index, *_ = origin(sample["target_images"], TARGET)
        expected = TARGET.image(index)[::2, ::2].astype(int)
        near = np.abs((style[:, ::-1] if flipped else style) - expected).mean()
        assert near < np.abs((style if flipped else style[:, ::-1]) - expected).mean()
    assert flips == {False, True}


def test_source_and_target_flip_on_their_own():
    dataset = pairs()
    seen = set()
    for position in range(24):
        sample = dataset[position]
        seen.add((origin(sample["source_images"], SOURCE)[3], origin(sample["target_images"], TARGET)[3]))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}
    plain = pairs("--data.flip=false")
    assert not any(origin(plain[position]["source_images"], SOURCE)[3] for position in range(8))


def test_without_translation_there_is_no_window_and_every_offset_is_as_likely():
    dataset = pairs("--translate.engine=none", "--data.cat_max_ratio=1", "--data.flip=false")
    assert set(dataset[0]) == {"source_images", "source_labels", "target_images"}
    lefts = np.array([origin(dataset[position]["source_images"], SOURCE)[2] for position in range(60)])
    assert lefts.max() <= 128
    # Uniform on 0..128: a third of the crops lies in each third. Two draws on top of each other would crowd the middle.
    assert np.histogram(lefts, 3, (0, 129))[0].min() >= 10


def test_source_only_reads_no_target():
    assert set(pairs(target=None)[0]) == {"source_images", "source_labels"}


class OneImage:
    """A domain of a single image, with labels as given."""

    name = "one"

    def __init__(self, labels):
        self.array = labels.astype(np.uint8)

    def draw(self, rng):
        return int(rng.integers(1))

    def __len__(self):
        return 1

    def resized_image(self, index):
        return np.dstack([self.array] * 3)

    def labels(self, index):
        return self.array


def test_uniform_crops_are_drawn_again():
    """Left two thirds one class: only crops at the right show less than 3/4 of it. A crop is tried 11 times."""
    labels = np.zeros((48, 240))
    labels[:, 200:] = np.arange(40) % 5
    options = ("--translate.engine=none", "--loss_weights.pull=0")
    free = pairs(*options, "--data.cat_max_ratio=1", source=OneImage(labels), target=None)
    limited = pairs(*options, source=OneImage(labels), target=None)

    def shares(dataset):
        crops = [dataset[position]["source_labels"] for position in range(80)]
        return np.mean([np.bincount(crop.ravel()).max() < 0.75 * crop.size for crop in crops])

    # P(one draw is good) = p; P(one of 11 is) = 1 - (1-p)^11. Offsets are 0..176, good ones leave < 3/4 to class 0.
    good = 0
    for left in range(177):
        counts = np.bincount(labels[:32, left : left + 64].astype(int).ravel())
        good += counts.max() < 0.75 * 32 * 64
    p = good / 177
    assert shares(free) == pytest.approx(p, abs=0.1)
    assert shares(limited) == pytest.approx(1 - (1 - p) ** 11, abs=0.12)


def test_crops_are_drawn_again_until_they_show_enough_of_the_rare_class():
    labels = np.tile([0, 1, 2], (48, 80))
    labels[:, 236:] = 3  # 4 columns at the right end
    rare = rare_classes(np.bincount(labels.astype(int).ravel(), minlength=5)[None], 0.001, 10)
    assert rare.probabilities[3] > 0.99
    options = ("--translate.engine=none", "--rcs.min_crop_ratio=0.5")
    source = OneImage(labels)
    wanting = pairs(*options, "--rcs.min_pixels=100", source=source, target=None, rare=rare)
    easy = pairs(*options, "--rcs.min_pixels=100", source=source, target=None)
    with_rare = [np.mean([(d[i]["source_labels"] == 3).sum() > 50 for i in range(150)]) for d in (easy, wanting)]
    p = 3 / 177  # offsets 174, 175, 176 show 2, 3 and 4 columns of 32: more than 50 pixels
    assert with_rare[0] <= p + 0.04
    assert with_rare[1] == pytest.approx(1 - (1 - p) ** 11, abs=0.09)


def test_rare_classes_get_their_share_of_the_images():
    counts = check_domain(SOURCE, CLASSES)
    rare = rare_classes(counts, 0.05, 20)
    dataset = PairDataset(tiny_config("--translate.engine=none"), SOURCE, None, rare)
    drawn = [rare.draw(np.random.default_rng([0, 1, position])) for position in range(40)]
    for position, (index, _) in enumerate(drawn[:8]):
        assert origin(dataset[position]["source_images"], SOURCE)[0] == index
    names = [CLASSES[class_id] for _, class_id in drawn]
    assert names.count("person") > names.count("road")


def test_small_images_are_padded_and_ignored():
    options = ("--data={crop_size: [128, 256], outer_crop_size: [128, 256]}", "--data.flip=false")
    sample = pairs(*options)[0]
    assert sample["source_images"].shape == (128, 256, 3)
    assert (sample["source_labels"][96:] == 255).all()
    assert (sample["source_labels"][:, 192:] == 255).all()
    assert (sample["source_images"][96:] == PADDING_COLOR).all()
    assert (sample["target_images"][:, 192:] == PADDING_COLOR).all()
    trusted = np.zeros((128, 256), dtype=bool)
    trusted[:96, :192] = True
    assert np.array_equal(sample["target_valid"], trusted)


def test_a_batch_of_padded_and_whole_target_crops_trusts_the_whole_ones_everywhere():
    whole_crops = "--data={crop_size: [96, 192], outer_crop_size: [96, 192]}"
    small = replace(TARGET, config=replace(TARGET.config, resize=(48, 96)))
    half, whole = pairs(whole_crops, target=small)[0], pairs(whole_crops)[0]
    assert half["target_valid"].sum() == 48 * 96
    assert "target_valid" not in whole
    for order in ([half, whole], [whole, half]):
        batch = collate([dict(sample) for sample in order])
        assert batch.target_valid.sum(dim=(1, 2)).tolist() == [
            48 * 96 if sample is half else 96 * 192 for sample in order
        ]


def test_a_validity_mask_goes_with_the_target_crop():
    mask = np.zeros((96, 192), dtype=bool)
    mask[:40, 50:] = True
    domain = replace(TARGET, valid=mask)
    for position in range(6):
        sample = pairs(target=domain)[position]
        _, top, left, flipped = origin(sample["target_images"], TARGET)
        expected = mask[top : top + 32, left : left + 64]
        assert np.array_equal(sample["target_valid"], expected[:, ::-1] if flipped else expected)


def test_processes_take_turns_and_a_later_start_sees_the_same():
    def positions(rank, world, micro=1, start=0):
        return list(PositionSampler(2, micro, rank, world, start, 3))

    assert positions(0, 1) == [0, 1, 2, 3, 4, 5]
    assert positions(0, 1, micro=2) == list(range(12))
    two = [positions(rank, 2) for rank in range(2)]
    assert two == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert positions(1, 2, start=2) == two[1][4:]
    assert len(PositionSampler(2, 3, 0, 4, 1, 3)) == len(positions(0, 4, 3, 1)) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_and_leave_the_global_random_state_alone(workers):
    dataset = pairs(f"--data.num_workers={workers}", "--train={max_steps: 3, batch_size: 2}")
    before = torch.random.get_rng_state()
    loaded = list(batches(dataset, start_step=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(loaded) == 2
    for number, batch in enumerate(loaded):
        expected = [dataset[2 * (number + 1) + i] for i in range(2)]
        images = np.stack([sample["source_images"] for sample in expected]).transpose(0, 3, 1, 2)
        assert np.array_equal(batch.source_images.numpy(), images)
        assert batch.source_images.dtype == batch.source_labels.dtype == torch.uint8
        assert np.array_equal(batch.source_labels.numpy(), np.stack([sample["source_labels"] for sample in expected]))
