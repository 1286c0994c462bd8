"""The speed table: what it prints, never how fast this machine is."""

from pathlib import Path

import pytest
import torch

from scripts import benchmark


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians() -> None:
    row = benchmark.Row.ratio("a over b", [1.0, 4.0, 9.0], [2.0, 2.0, 30.0], "1")  # ratios 0.5, 2 and 0.3
    assert (row.measured, row.what) == ("0.50", "a over b (4e+03 / 2e+03 ms)")
    assert benchmark.Row.ratio("small", [1.0], [40.0], "1/20").measured == "1/40"
    assert benchmark.Row.ratio("over an ideal", [8.0], [2.0], "1", scale=4).measured == "1.00"


def test_extra_memory_sees_what_was_freed_again() -> None:
    assert 90 < benchmark.extra_memory(lambda: torch.ones(25_000_000).sum()) < 200


def test_extra_memory_counts_what_the_heap_has_free() -> None:
    """200 MB of it, below memory that is in use: another round of malloc would take them from there."""
    in_use = []
    for _ in range(3):  # the first round teaches malloc to keep pieces of this size
        pieces = [torch.ones(5_000_000) for _ in range(10)]
        in_use.append(torch.ones(30_000))
        del pieces
    assert 90 < benchmark.extra_memory(lambda: torch.ones(25_000_000).sum()) < 200


def test_the_ideal_is_that_of_the_forwards_and_backwards() -> None:
    """Hand count for B0 at 256 px (E 2.42, S 0.41, P 1.33 GFLOP for two images): (11E+7S+5P) / (3E+3S) = 4.26."""
    over_supervised, over_dacs = benchmark.ideal_ratio(benchmark.small_run())
    assert over_supervised == pytest.approx(4.26, abs=0.1)
    assert over_dacs == pytest.approx(1.83, abs=0.05)


def test_a_table_and_a_wrong_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(["--rows", "ema", "--rounds", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {4}
    with pytest.raises(SystemExit) as error:
        benchmark.main(["--rows", "ema", "--peer-path", str(tmp_path)])
    assert error.value.code == 2
    assert "mmseg" in capsys.readouterr().err
