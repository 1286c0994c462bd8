import math

import pytest

from t2sda_hf.evaluation.models import titled
from t2sda_hf.evaluation.table import CLASS_SETS, class_sets_of, format_table, markdown, spread, subset_miou, summarise
from t2sda_hf.labels import CITYSCAPES_CLASSES


def result(iou: dict, miou: float) -> dict:
    return {"iou": iou, "miou": miou, "pixel_accuracy": 90.0, "mean_accuracy": 80.0}


def test_class_sets_of_the_benchmarks() -> None:
    assert [len(CLASS_SETS[name]) for name in ("cs19", "syn16", "syn13")] == [19, 16, 13]
    assert set(CLASS_SETS["cs19"]) - set(CLASS_SETS["syn16"]) == {"terrain", "truck", "train"}
    assert set(CLASS_SETS["syn16"]) - set(CLASS_SETS["syn13"]) == {"wall", "fence", "pole"}


def test_mean_over_16_classes_is_not_19_sixteenths_of_that_over_19() -> None:
    scores = result({name: float(place) for place, name in enumerate(CITYSCAPES_CLASSES)}, 9.0)
    of_16 = (sum(range(19)) - 9 - 14 - 16) / 16  # terrain, truck, train
    assert subset_miou(scores, CLASS_SETS["syn16"]) == pytest.approx(of_16)
    assert of_16 != pytest.approx(9.0 * 19 / 16)
    assert subset_miou(scores, CLASS_SETS["cs19"]) == 9.0


def test_a_class_of_the_set_that_does_not_occur_is_left_out_of_its_mean() -> None:
    scores = result({"road": 80.0, "sky": None, "car": 40.0}, 60.0)
    assert subset_miou(scores, ["road", "sky"]) == 80
    assert subset_miou(scores, ["sky"]) is None


@pytest.mark.parametrize("names", [["road", "boat"], []])
def test_a_set_with_other_classes_is_refused_with_both_lists(names: list) -> None:
    with pytest.raises(ValueError, match=r"needs classes that the model has; it has road, sky"):
        subset_miou(result({"road": 80.0, "sky": 1.0}, 40.5), names)


def test_only_sets_that_say_something_new_are_offered() -> None:
    assert list(class_sets_of(CITYSCAPES_CLASSES)) == ["syn16", "syn13"]
    assert list(class_sets_of(CLASS_SETS["syn16"])) == ["syn13"]
    assert class_sets_of(["road", "sky"]) == {}


def test_spread_by_hand() -> None:
    assert spread([1.0, 2.0, None, 6.0]) == {
        "mean": 3.0,
        "sd": pytest.approx(math.sqrt(7)),
        "sd_population": pytest.approx(math.sqrt(14 / 3)),
        "n": 3,
    }
    assert spread([4.0]) == {"mean": 4.0, "sd": None, "sd_population": 0.0, "n": 1}
    assert spread([None]) == {"mean": None, "sd": None, "sd_population": None, "n": 0}


def test_rows_of_a_summary_stand_in_the_order_of_the_table() -> None:
    rows = summarise([result({"road": 80.0, "sky": 20.0}, 50.0)], {"flat": ["road"]})
    assert list(rows) == ["road", "sky", "mIoU", "mIoU (flat, 1 classes)", "pixel accuracy", "mean accuracy"]
    assert rows["mIoU (flat, 1 classes)"]["mean"] == 80


def test_seeds_are_shown_as_mean_and_sd_beside_single_models_of_other_classes() -> None:
    table = format_table(
        {
            "T2S-DA": [result({"road": 80.0, "sky": 20.0}, 50.0), result({"road": 90.0, "sky": 20.0}, 55.0)],
            "old": result({"road": 70.0, "bus": 10.0}, 40.0),
        }
    )
    assert table.splitlines() == [
        "| class          |       T2S-DA |   old |",
        "| :------------- | -----------: | ----: |",
        "| road           | 85.00 ± 7.07 | 70.00 |",
        "| sky            | 20.00 ± 0.00 |     - |",
        "| bus            |            - | 10.00 |",
        "| mIoU           | 52.50 ± 3.54 | 40.00 |",
        "| pixel accuracy | 90.00 ± 0.00 | 90.00 |",
        "| mean accuracy  | 80.00 ± 0.00 | 80.00 |",
        "| n              |            2 |     1 |",
    ]


def test_a_model_may_have_a_title_and_a_path_an_equals_sign(tmp_path) -> None:
    assert titled("ours=some/model") == ("ours", "some/model")
    assert titled("some/model") == ("some/model", "some/model")
    folder = tmp_path / "lr=1e-3"
    folder.mkdir()
    assert titled(str(folder)) == (str(folder), str(folder))
    assert titled(f"ours={folder}") == ("ours", str(folder))


def test_what_would_break_a_cell_is_escaped_and_narrow_columns_have_a_rule() -> None:
    """As GitHub reads it: a bar in a cell needs a backslash, a backslash too, and a rule needs a hyphen."""
    lines = markdown(["a|b", "n"], [["two\nlines", "1"], ["C:\\x|", ""]]).split("\n")
    assert lines == [
        r"| a\|b      | n |",
        r"| :-------- | - |",
        r"| two lines | 1 |",
        r"| C:\\x\|   |   |",
    ]
