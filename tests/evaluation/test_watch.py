"""Proxies against values by hand, and what is kept by them."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from t2sda_hf.evaluation.watch import (
    SELECTED,
    SELECTED_FILE,
    Watch,
    describe_selected,
    drop_selected_after,
    panel_due,
    read_selected,
    save_panel_of_step,
    selects,
)


def logits_of(shares: list[list[list[float]]]) -> Tensor:
    """(1,K,1,W) whose softmax is `shares`, given per pixel."""
    return torch.tensor(shares).log().permute(2, 0, 1)[None]


def alone(sums: Tensor) -> Tensor:
    return sums


# Two classes, four pixels in a row: sure of 0, of 0, of 1, and undecided between the two (called 0).
TEACHER = logits_of([[[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]])
H = {p: -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) for p in (0.9, 0.8)}


def test_target_proxies_by_hand() -> None:
    watch = Watch([10, 30], threshold=0.85)
    watch.look({"teacher_logits": TEACHER})
    found = watch.read(alone)
    assert found["confidence"] == pytest.approx(1 - (2 * H[0.9] + H[0.8] + 1) / 4)
    assert found["coverage"] == 0.5
    assert found["prior"] == pytest.approx(1 - (abs(0.75 - 0.25) + abs(0.25 - 0.75)) / 2)
    assert set(found) == {"confidence", "coverage", "prior"}


def test_agreement_counts_target_pixels_of_the_mixed_image_only() -> None:
    watch = Watch([1, 1], threshold=0.5)
    student = logits_of([[[0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]])  # 1 0 1 1 against 0 0 1 0
    pasted = torch.tensor([[[True, True, False, False, False, False, False, False]]])  # twice the width: pixel 0
    watch.look({"teacher_logits": TEACHER, "mixed_logits": student, "from_source": pasted})
    found = watch.read(alone)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["combined"] == pytest.approx((2 / 3 * found["confidence"] * found["prior"]) ** (1 / 3))


def test_stability_compares_with_the_updates_before() -> None:
    watch = Watch([1, 1], threshold=0.5)
    watch.look({"teacher_logits": TEACHER})  # shares 3/4, 1/4
    assert "stability" not in watch.read(alone)
    watch.look({"teacher_logits": logits_of([[[0.1, 0.9], [0.9, 0.1]]])})  # 1/2, 1/2
    assert watch.read(alone)["stability"] == pytest.approx(0.75)


def test_source_is_the_miou_on_labelled_source_pixels() -> None:
    watch = Watch([1, 1], threshold=0.5)
    labels = torch.tensor([[[0, 1, 1, 255]]])
    watch.look({"source_logits": TEACHER, "source_labels": labels})  # says 0 0 1 0
    assert watch.read(alone) == {"source": pytest.approx((1 / 2 + 1 / 2) / 2)}


def test_batches_add_up_and_reading_starts_anew() -> None:
    both, one = Watch([1, 1], 0.85), Watch([1, 1], 0.85)
    both.look({"teacher_logits": torch.cat([TEACHER, TEACHER.flip(1)])})
    one.look({"teacher_logits": TEACHER})
    one.look({"teacher_logits": TEACHER.flip(1)})
    assert one.read(alone) == both.read(alone)
    assert one.read(alone) == {}


def test_two_processes_read_what_one_process_with_all_the_batches_reads() -> None:
    """sum_over_processes adds what the other process saw."""
    mine, other, whole = (Watch([3, 1], 0.85) for _ in range(3))
    mine.look({"teacher_logits": TEACHER})
    other.look({"teacher_logits": TEACHER.flip(1)})
    for logits in (TEACHER, TEACHER.flip(1)):
        whole.look({"teacher_logits": logits})
    theirs = torch.cat([other.sums, other.shares, other.confusion.flatten()])
    assert mine.read(lambda sums: sums + theirs) == whole.read(alone)
    assert torch.equal(mine.before, whole.before)


def test_its_state_goes_through_a_checkpoint() -> None:
    watch, again = Watch([1, 1], 0.85), Watch([1, 1], 0.85)
    watch.look({"teacher_logits": TEACHER})
    watch.read(alone)
    watch.look({"teacher_logits": TEACHER.flip(1)})
    again.load_state_dict(watch.state_dict())
    assert again.read(alone) == watch.read(alone)


def test_proxies_are_never_above_one_or_below_zero() -> None:
    watch = Watch([5, 0, 2], 0.9)
    random = torch.Generator().manual_seed(0)
    for _ in range(2):
        watch.look(
            {
                "teacher_logits": 9 * torch.randn(2, 3, 4, 4, generator=random),
                "mixed_logits": torch.randn(2, 3, 4, 4, generator=random),
                "from_source": torch.rand(2, 8, 8, generator=random) < 0.5,
                "source_logits": torch.randn(2, 3, 4, 4, generator=random),
                "source_labels": torch.randint(0, 3, (2, 8, 8), generator=random),
            }
        )
        found = watch.read(alone)
        assert all(0 <= value <= 1 for value in found.values()), found
    assert set(found) == {"confidence", "coverage", "agreement", "stability", "prior", "source", "combined"}


def keep(folder: Path, proxies: dict, done: int) -> bool:
    if not selects(folder, "proxy:agreement", proxies):
        return False
    (folder / SELECTED).mkdir(exist_ok=True)
    (folder / SELECTED / SELECTED_FILE).write_text(describe_selected("proxy:agreement", proxies, done))
    return True


def test_the_best_weights_by_a_proxy_are_kept_and_ties_keep_the_earlier(tmp_path: Path) -> None:
    values = [0.5, 0.7, 0.7, 0.6]
    assert [keep(tmp_path, {"agreement": v}, step) for step, v in enumerate(values)] == [True, True, False, False]
    assert json.loads((tmp_path / SELECTED / SELECTED_FILE).read_text()) == {
        "proxy": "agreement",
        "value": 0.7,
        "step": 1,
    }


def test_what_another_proxy_kept_or_a_later_step_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / SELECTED).mkdir()
    (tmp_path / SELECTED / SELECTED_FILE).write_text(describe_selected("proxy:prior", {"prior": 0.9}, 6))
    assert selects(tmp_path, "proxy:agreement", {"agreement": 0.1, "prior": 0.1})
    drop_selected_after(tmp_path, 6)
    assert read_selected(tmp_path) == {"proxy": "prior", "value": 0.9, "step": 6}
    drop_selected_after(tmp_path, 5)
    assert read_selected(tmp_path) is None
    drop_selected_after(tmp_path, 5)


def test_nothing_is_kept_without_the_proxy_or_when_the_last_weights_are_wanted(tmp_path: Path) -> None:
    assert not selects(tmp_path, "proxy:stability", {"agreement": 0.5})
    assert not selects(tmp_path, "last", {"agreement": 0.5})


def test_panels_are_due_at_evaluations_and_at_four_updates_at_least() -> None:
    def due(max_steps: int, every: int) -> list[int]:
        return [done for done in range(1, max_steps + 1) if panel_due(done, max_steps, every)]

    assert due(800, 200) == [200, 400, 600, 800]
    assert due(800, 10_000) == [200, 400, 600, 800]
    assert due(100, 30) == [25, 50, 75, 100]
    assert due(110, 20) == [20, 40, 60, 80, 100, 110]


def test_a_panel_shows_what_the_objective_saw(tmp_path: Path) -> None:
    seen = {
        "target_images": torch.rand(3, 3, 8, 12),
        "pseudo_labels": torch.zeros(3, 8, 12, dtype=torch.long),
        "confidence": torch.rand(3, 8, 12),
        "mixed_images": torch.rand(3, 3, 8, 12),
        "trust": torch.tensor(0.5),
    }
    path = save_panel_of_step(tmp_path / "panels", 200, seen, ["road", "sky"])
    assert path == tmp_path / "panels" / "step_000200.png"
    with Image.open(path) as picture:
        assert picture.width > 3 * picture.height / 2  # four columns, two rows
    assert save_panel_of_step(tmp_path / "panels", 200, {"source_images": torch.rand(1, 3, 8, 8)}, ["road"]) is None
