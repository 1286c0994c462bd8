"""Several runs on one page that opens offline: scores, curves, and in what their configs differ.

    t2sda compare outputs/demo_0 outputs/demo_1 --output outputs/comparison
    t2sda compare --proxies outputs/repeat/*/seed_* --output proxies.csv

The page of each run, its index.html, is brought up to date first. A run that is still going has one, too.

--proxies: how far can a checkpoint or a run be chosen without target labels? Proxies against labelled mIoU over many
runs, from what training wrote (train.evaluate_every must be several times smaller than max_steps):

within   Spearman correlation of the proxy with the student's mIoU over the evaluations of one run, mean over runs
regret   points of mIoU lost by taking the weights with the best proxy instead of the best weights: mean, worst run
across   the same two for choosing one of the runs by the proxies of their last weights, with a 95% interval that takes
         runs as independent (two seeds of one config are less than that)
last     the row of the number of updates: always taking the last weights, and one of the runs at random. A proxy that
         does not beat it is no help

--output then is a CSV file of every evaluation with its proxies.
"""

import csv
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..analysis.statistics import ProxyScore, evaluations, rank_proxies
from ..evaluation.page import write_comparison, write_page
from ..evaluation.run_folder import read_run
from ..evaluation.table import markdown


def run(args: Namespace) -> int:
    if args.proxies:
        compare_proxies(args.runs, args.output)
        return 0
    for folder in args.runs:
        write_page(folder)
    print(write_comparison(args.runs, args.output or Path("outputs/comparison")))
    return 0


def compare_proxies(folders: Sequence[Path], output: Path | None) -> None:
    """Print the table, and save every evaluation as CSV."""
    runs = [evaluations(read_run(folder).main) for folder in folders]
    empty = [str(folder) for folder, points in zip(folders, runs, strict=True) if len(points) < 2]
    used = [points for points in runs if len(points) >= 2]
    scores = rank_proxies(used)
    order = sorted(scores, key=lambda name: (name == "step", np.mean(scores[name].regret_within)))
    print(f"{len(used)} runs, {sum(map(len, used))} evaluations\n")
    header = ["proxy", "within", "lowest", "regret", "worst", "across", "regret across", "n"]
    print(markdown(header, [[_title(name), *_cells(scores[name])] for name in order]))
    if empty:
        print(f"\nNot used, fewer than two evaluations with proxies: {', '.join(empty)}", file=sys.stderr)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *(names := ["step", "miou", *(n for n in scores if n != "step")])])
            for folder, points in zip(folders, runs, strict=True):
                writer.writerows([folder, *(point.get(name, "") for name in names)] for point in points)


def _title(name: str) -> str:
    return "last (number of updates)" if name == "step" else name


def _cells(score: ProxyScore) -> list[str]:
    within, regrets = np.array(score.within), np.array(score.regret_within)
    numbers = [
        within.mean() if within.size else np.nan,
        within.min() if within.size else np.nan,
        regrets.mean(),
        regrets.max(),
        score.across,
        score.regret_across,
    ]
    cells = ["-" if np.isnan(number) else f"{number:.2f}" for number in numbers]
    if not np.isnan(score.across_low):
        cells[4] += f" [{score.across_low:.2f}, {score.across_high:.2f}]"
    return [*cells, str(score.n)]
