"""Error bars and rankings against values by hand."""

import csv
import math
from pathlib import Path

import pytest

from t2sda_hf.analysis.statistics import evaluations, paired_difference, rank_proxies
from t2sda_hf.cli import main
from t2sda_hf.evaluation.run_folder import MethodFolder


def test_a_paired_difference_and_its_interval_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, sd 1; t(0.975, 2 degrees) is 4.302653, half an interval 4.302653/√3 = 2.48414."""
    found = paired_difference({0: 11, 1: 22, 2: 33, 9: 50}, {0: 10, 1: 20, 2: 30, 8: 70})
    assert (found.mean, found.sd, found.n) == (2, 1, 3)
    assert (found.low, found.high) == (pytest.approx(-0.48414, abs=1e-5), pytest.approx(4.48414, abs=1e-5))
    assert str(found) == "+2.00 [-0.48, +4.48] (95% interval, n = 3): no difference can be told"


def test_pairs_show_what_two_means_hide() -> None:
    """Seeds differ by 10 points, the two sides by 1 on every one."""
    values, others = {seed: 10.0 * seed + 1 + 0.1 * (seed % 2) for seed in range(6)}, {s: 10.0 * s for s in range(6)}
    assert str(paired_difference(values, others)).endswith("higher")
    assert str(paired_difference(others, values)).endswith("lower")


def test_fewer_than_two_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least two seeds in common, there are 1"):
        paired_difference({0: 1.0, 1: 2.0}, {1: 2.0, 2: 3.0})


def points(*rows: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations of one run: (mIoU, proxy)."""
    return [{"step": 100.0 * place, "miou": miou, "good": proxy} for place, (miou, proxy) in enumerate(rows, start=1)]


# The best weights are in the middle of the second run. The proxy finds them; the last weights lose four points.
RUNS = [points((10, 0.1), (20, 0.2), (30, 0.3)), points((12, 0.2), (40, 0.5), (36, 0.4)), points((5, 0.9), (6, 0.8))]


def test_a_proxy_is_ranked_within_runs_and_across_them() -> None:
    found = rank_proxies(RUNS)
    good, last = found["good"], found["step"]
    assert good.within == pytest.approx((1, 1))  # two evaluations have no correlation
    assert good.regret_within == pytest.approx((0, 0, 1))
    assert last.within == pytest.approx((1, 0.5))
    assert last.regret_within == pytest.approx((0, 4, 0))
    # The last weights have mIoU 30, 36, 6 and proxy 0.3, 0.4, 0.8: ranks 2 3 1 and 1 2 3.
    assert good.across == pytest.approx(1 - 6 * (1 + 1 + 4) / (3 * 8))
    assert good.regret_across == 30  # it takes the third
    assert good.n == 3
    assert last.regret_across == 36 - (30 + 36) / 2  # one at random of those that trained longest


def test_the_interval_of_a_correlation_by_hand() -> None:
    """Ranks 2 1 4 3 5 against 1 to 5: 1 - 6·4/120 = 0.8, atanh 1.0986; half an interval 1.96 √(1.06/2) = 1.4269."""
    runs = [[{"step": 9.0, "miou": float(miou), "p": place}] for place, miou in enumerate((2, 1, 4, 3, 5))]
    found = rank_proxies(runs)["p"]
    assert found.across == pytest.approx(0.8)
    assert (found.across_low, found.across_high) == (
        pytest.approx(math.tanh(1.0986 - 1.4269), abs=1e-4),
        pytest.approx(math.tanh(1.0986 + 1.4269), abs=1e-4),
    )


def test_a_run_that_lacks_a_proxy_does_not_count_for_it() -> None:
    runs = [*RUNS, [{"step": 100.0, "miou": 90.0}, {"step": 200.0, "miou": 95.0}]]
    found = rank_proxies(runs)
    assert (found["good"].n, found["step"].n) == (3, 4)
    assert found["good"].regret_across == 30


def test_nothing_to_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="no run has an evaluation with proxies"):
        rank_proxies([[]])


def method(miou: list, proxies: dict) -> MethodFolder:
    return MethodFolder("t2sda", Path(), {}, {}, [], {"student": miou}, {}, {}, proxies, {}, [])


def test_evaluations_join_scores_and_proxies_of_equal_steps() -> None:
    found = evaluations(method([(200, 20.0), (100, 10.0), (300, 30.0)], {"prior": [(100, 0.5), (200, 0.6)]}))
    assert found == [{"step": 100, "miou": 10.0, "prior": 0.5}, {"step": 200, "miou": 20.0, "prior": 0.6}]


def test_compare_prints_the_table_and_saves_every_evaluation(tmp_path: Path, capsys) -> None:
    for place, run in enumerate(RUNS):
        folder = tmp_path / f"run_{place}" / "t2sda"
        folder.mkdir(parents=True)
        (folder / "resolved_config.yaml").write_text("method: t2sda")
        (folder / "scalars.jsonl").write_text(
            "".join(
                f'{{"step": {point["step"]:.0f}, "student/miou": {point["miou"]}, "proxy/good": {point["good"]}}}\n'
                for point in run
            )
        )
    runs = [str(path) for path in sorted(tmp_path.glob("run_*"))]
    assert main(["compare", "--proxies", *runs, "--output", str(tmp_path / "new" / "rank.csv")]) == 0
    printed = capsys.readouterr().out
    assert "3 runs, 8 evaluations" in printed
    assert "| good                     |   1.00 |   1.00 |   0.33 |  1.00 |  -0.50 |         30.00 | 3 |" in printed
    with (tmp_path / "new" / "rank.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[4] == {"run": runs[1], "step": "200", "miou": "40", "good": "0.5"}
    assert len(rows) == 8

    assert main(["compare", "--proxies", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
