"""The table "fair" on planted results, whose figures are known in closed form."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from t2sda_hf.analysis.fair import best, fair_text, figures, halves, images_of_halves, iou_of_half, tried
from t2sda_hf.evaluation.gain import pack

CLASSES = ("road", "pole")


def result(choosing: Sequence[float], shown: Sequence[float], data: str = "d", num_images: int = 5) -> dict[str, Any]:
    """Of five images in four groups, in which the classes have these IoUs in % on the two halves."""
    pixels = np.zeros((4, 2, len(CLASSES)), dtype=np.int64)
    for half, iou in enumerate((choosing, shown)):
        pixels[half::2, 0] = 10 * np.array(iou)
        pixels[half::2, 1] = 1000
    return {
        "domain": "t",
        "num_images": num_images,
        "iou": dict.fromkeys(CLASSES, 0.0),
        "miou": 0.0,
        "groups": pack(pixels),
        "inputs": {"data": data},
    }


def planted() -> dict[str, dict[float, dict[int, Any]]]:
    """Source-only 20, self-training 30, T2S-DA 40, upper bound 60 on the half of the figures, at the better rate."""
    shown = {"source_only": (30, 10), "self_training": (50, 10), "t2sda": (72, 8), "target_only": (90, 30)}
    found: dict[str, dict[float, dict[int, Any]]] = {}
    for row, (road, pole) in shown.items():
        found[row] = {
            1e-3: {0: result((50, 50), (0, 0))},  # the better one to those who look at the other half
            1e-2: {seed: result((60, 50), (road + 2 * seed, pole)) for seed in (0, 1, 2)},
        }
    found["t2sda"][1e-2][2] = result((0, 0), (73, 8))
    return found


def test_each_half_has_every_other_group():
    assert iou_of_half(result((60, 50), (30, 10)), 0) == [60, 50]
    assert iou_of_half(result((60, 50), (30, 10)), 1) == [30, 10]
    assert images_of_halves(5, 4) == (3, 2)  # images 0 and 1 are the first group
    assert sum(images_of_halves(233, 100)) == 233
    assert [len(list(run)) for _, run in groupby(halves(100))] == [10] * 10  # neighbours stay together
    assert images_of_halves(2, 2) == (1, 1)


def test_a_rate_is_chosen_by_the_other_half_and_only_when_its_seeds_are_done():
    rows = planted()
    assert tried(rows["t2sda"], [0]) == {1e-3: 50, 1e-2: 55}
    assert tried(rows["t2sda"], [0, 1]) == {1e-3: None, 1e-2: 55}
    assert best({1e-3: 50, 1e-2: 55, 1: None}) == 1e-2
    assert best({1e-3: 50, 1e-2: 50}) == 1e-3
    assert best({1e-3: None}) is None


def test_the_figures_are_those_of_the_definition():
    found = figures(planted(), [0], [0, 1, 2])
    rows = found["rows"]
    assert {name: row["rate"] for name, row in rows.items()} == dict.fromkeys(rows, 1e-2)
    # road 72, 74, 73 and pole 8: the third seed of T2S-DA is another one
    assert rows["t2sda"]["miou"] == {0: 40, 1: 41, 2: 40.5}
    assert rows["source_only"]["miou"] == {0: 20, 1: 21, 2: 22}
    assert rows["source_only"] | {"sd": 1.0, "n": 3, "mean": 21.0, "iou": [32.0, 10.0]} == rows["source_only"]
    # 20, 20, 18.5 in pairs
    told = found["differences"]["T2S-DA minus source-only"]
    sd = np.std([20, 20, 18.5], ddof=1)
    assert (told["mean"], told["sd"], told["n"]) == (pytest.approx(19.5), pytest.approx(sd), 3)
    assert told["high"] - told["mean"] == pytest.approx(4.302653 * sd / 3**0.5)
    assert found["differences"]["self-training minus source-only"]["mean"] == pytest.approx(10)
    # (40.5 - 21) / (61 - 21), (73 - 32) / (92 - 32), (8 - 10) / (30 - 10)
    assert found["share"]["miou"] == pytest.approx(0.4875)
    assert found["share"]["iou"] == [pytest.approx(41 / 60), pytest.approx(-0.1)]
    assert (found["share"]["missing"], found["images"]) == ([], {"choosing": 3, "shown": 2})
    assert found["lost"] == {"pole": pytest.approx(-2)}


def test_the_text_says_what_was_done_and_what_was_lost():
    text = fair_text(figures(planted(), [0], [0, 1, 2]))
    for said in (
        "All figures are of 2 of the 5 test images",
        "the best of the same 2 values. A fair search has at least three. It was chosen on the other 3 test images",
        "another rate may be better: source-only (0.01), self-training (0.01), T2S-DA (0.01), upper bound (0.01)",
        "**Share of the gap closed, (T2S-DA - source-only) / (upper bound - source-only): 49 %** = "
        "(40.50 - 21.00) / (61.00 - 21.00).",
        "| T2S-DA        | 0.01 |  40.00 |  41.00 |  40.50 | 40.50 | 0.50 |",
        "| pole      |       10.00 |         10.00 |   8.00 |       30.00 |            -10 % |",
        "more than 1 point below source-only: pole (-2.0).",
        "| upper bound                          | 50.00 | 55.00 |",
        "- T2S-DA minus self-training: ",
    ):
        assert said in text, text


def test_what_is_missing_is_said_instead_of_a_share():
    rows = planted()
    rows["target_only"] = {1e-3: {}, 1e-2: {}}
    found = figures(rows, [0], [0, 1, 2])
    assert (found["share"]["miou"], found["share"]["iou"]) == (None, [None, None])
    assert "not known, because upper bound is missing." in fair_text(found)
    rows["target_only"] = {1e-3: {0: result((1, 1), (20, 11))}}
    found = figures(rows, [0], [0])
    assert found["share"]["iou"] == [None, pytest.approx(-2)]  # of road the bound is below: no gap
    assert ": –. The upper bound (15.50) is not above source-only (20.00)." in fair_text(found)
    assert "fewer than two seeds in common" in fair_text(found)
    nothing = figures({name: {1e-3: {}} for name in rows}, [0], [0])
    assert fair_text(nothing) == "No run is finished yet."


def test_results_that_say_nothing_about_each_other_are_refused():
    rows = planted()
    rows["t2sda"][1e-2][1] = result((1, 1), (1, 1), data="other")
    with pytest.raises(ValueError, match="scored on different test images"):
        figures(rows, [0], [0])
    alone = result((1, 1), (1, 1))
    alone["groups"] = {name: lines[:1] for name, lines in alone["groups"].items()}
    with pytest.raises(ValueError, match="cannot be halved"):
        iou_of_half(alone, 0)
