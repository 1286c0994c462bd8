"""A few labelled target images: which ones, how often they are drawn, and what is learned of them."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from tiny import CLASSES, tiny_config

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.data.few_labels import covering_order, how_many
from t2sda_hf.data.pairs import LabelledTarget, PairDataset
from t2sda_hf.data.rare_class_sampling import rare_classes

SOURCE = load_domain(DomainConfig(path="streets-source", num_images=4), CLASSES)
TARGET = load_domain(DomainConfig(path="streets-target", num_images=4), CLASSES, labelled=False)
FEW = load_domain(DomainConfig(path="streets-target", num_images=3), CLASSES)


def slow_order(counts: Sequence[Sequence[int]], random_order: Sequence[int]) -> list[int]:
    """The greedy choice, with sets."""
    shown = [{c for c, pixels in enumerate(row) if pixels} for row in counts]
    left, order, missing = list(random_order), list[int](), set[int]()
    while left:
        if not any(shown[i] & missing for i in left):
            missing = set().union(*(shown[i] for i in left))
        best = max(left, key=lambda i: len(shown[i] & missing))  # the first of equal ones
        left.remove(best)
        order.append(best)
        missing -= shown[best]
    return order


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_slow_twin(seed):
    counts = np.random.default_rng(seed).integers(-6, 3, (30, 8)).clip(0)
    random_order = np.random.default_rng([seed, 2]).permutation(30).tolist()
    assert covering_order(counts, seed) == slow_order(counts.tolist(), random_order)


def test_the_first_images_show_every_class_and_other_seeds_take_others():
    counts = np.zeros((40, 6), dtype=int)
    counts[:, 0] = 100
    for class_id in range(1, 6):
        counts[7 * class_id, class_id] = 1  # one image alone shows it
    orders = [covering_order(counts, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert set(order[:5]) == {7, 14, 21, 28, 35}
        assert sorted(order) == list(range(40))


def test_a_share_is_rounded_up_and_more_than_there_are_is_refused():
    assert [how_many(f"1/{n}", 2975) for n in (64, 16, 8, 4, 2, 1)] == [47, 186, 372, 744, 1488, 2975]
    assert [how_many(None, 5), how_many(3, 5), how_many("1/64", 5)] == [5, 3, 1]
    with pytest.raises(ValueError, match="asks for 6 labelled target images, and there are 5"):
        how_many(6, 5)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.9])
def test_positions_of_the_target_are_spread_evenly(share):
    few = LabelledTarget(FEW, share)
    taken = [few.has(position) for position in range(200)]
    assert all(abs(sum(taken[:n]) - n * share) < 1 for n in range(201))
    assert sum(taken) == math.floor(200 * share + 1e-9)


def whose(image: np.ndarray) -> str:
    for name, domain in (("source", SOURCE), ("few", FEW)):
        for index in range(len(domain)):
            if any(np.array_equal(image, whole) for whole in (domain.image(index), domain.image(index)[:, ::-1])):
                return name
    return "nowhere"


def test_every_batch_has_its_share_with_labels_and_is_its_own_style():
    size = "{crop_size: [96, 192], outer_crop_size: [96, 192]}"  # whole images
    cfg = tiny_config("--rcs.enabled=false", f"--data={size}", "--target_labels=3", "--target.path=streets-target")
    dataset = PairDataset(cfg, SOURCE, TARGET, None, labelled_target=LabelledTarget(FEW, 0.5))
    for position in range(6):
        sample = dataset[position]
        assert bool(sample["from_target"]) == (position % 2 == 1)
        assert whose(sample["source_images"]) == ("few" if position % 2 else "source")
        own = np.array_equal(sample["style_reference"], sample["outer_source"])
        assert own == (position % 2 == 1)
    plain = PairDataset(cfg, SOURCE, TARGET, None)
    for position in (0, 2):  # those of the source are what they are without
        with_few = dataset[position]
        assert all(np.array_equal(value, with_few[name]) for name, value in plain[position].items())


def test_classes_are_rare_by_what_both_domains_show():
    source, few = np.array([[90, 10, 0], [90, 10, 0]]), np.array([[40, 20, 40]])
    joint = 0.75 * np.array([0.9, 0.1, 0]) + 0.25 * np.array([0.4, 0.2, 0.4])
    for counts, shows in ((source, (1, 1, 0)), (few, (1, 1, 1))):
        weights = [math.exp((1 - share) / 0.1) * there for share, there in zip(joint, shows, strict=True)]
        expected = [weight / sum(weights) for weight in weights]
        assert rare_classes(counts, 0.1, 5, joint).probabilities == pytest.approx(expected)
