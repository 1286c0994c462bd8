"""Show several runs on one page: their scores, their curves, and the differences between their configs.

    t2sda compare outputs/demo_0 outputs/demo_1 --output outputs/comparison
    t2sda compare --proxies outputs/repeat/*/seed_* --output proxies.csv

Runs with different test images or classes stand in different tables, and are not averaged. The page needs no server and
no network. The command first updates the page of each run, its index.html. It also writes
this page for a run that is still going.

With --proxies the command answers another question. A proxy is a number that needs no labels of the target and may
tell good models from bad ones. Can it choose the best weights of a run, or the best of several runs? The command reads
what training wrote, and compares each proxy with the mIoU on labelled images. train.evaluate_every of the runs must be
several times smaller than train.max_steps. The columns of the table are:

within          Spearman correlation between the proxy and the student's mIoU, over the evaluations of one run (mean
                over the runs; "lowest" is the lowest run)
regret          points of mIoU that are lost by taking the weights with the best proxy instead of the best weights (mean
                over the runs; "worst" is the worst run)
across          the same correlation over the last weights of all runs, with a 95% interval. The interval assumes that
                runs are independent, but two seeds of one config are not quite independent
regret across   points of mIoU that are lost by taking the run whose last weights have the best proxy
n               number of runs

The row "last" always takes the last weights of a run, and one of the runs at random. A proxy that is not better than
this row is of no use. With --proxies, --output is a CSV file with every evaluation and its proxies.
"""

import csv
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..analysis.statistics import ProxyScore, evaluations, rank_proxies
from ..evaluation.page import write_comparison, write_page
from ..evaluation.run_folder import RunFolder, read_run
from ..evaluation.table import kinds_of_test, markdown
from ..storage import outputs, refuse_foreign


def run(args: Namespace) -> int:
    if args.proxies:
        compare_proxies(args.runs, args.output)
        return 0
    output = args.output or Path("outputs/comparison")
    refuse_foreign("compare", [output], map(str, args.runs))
    for page in (folder / "index.html" for folder in args.runs):
        if page.is_file() and "t2sda" not in page.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{page} is no page of a run. Move it away: the page of the run is written there.")
    for folder in args.runs:
        write_page(folder)
    with outputs("compare", output):
        print(write_comparison(args.runs, output))
    return 0


def compare_proxies(folders: Sequence[Path], output: Path | None) -> None:
    """Print the table, and save every evaluation as CSV."""
    if output:
        refuse_foreign("compare", [output])
    read = [read_run(folder) for folder in folders]
    refuse_different_tests(read)
    runs = [evaluations(run.main) for run in read]
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
        with outputs("compare", output), output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *(names := ["step", "miou", *(n for n in scores if n != "step")])])
            for folder, points in zip(folders, runs, strict=True):
                writer.writerows([folder, *(point.get(name, "") for name in names)] for point in points)


def refuse_different_tests(runs: Sequence[RunFolder]) -> None:
    """ValueError if finished runs were scored on other images or classes: a figure over all of them means nothing."""
    finished = [run for run in runs if run.main.results]
    kinds = kinds_of_test([run.main.results["student"] for run in finished])
    other = next((run for run, kind in zip(finished, kinds, strict=True) if kind != kinds[0]), None)
    if other is not None:
        one, two = (run.main.results["student"] for run in (finished[0], other))
        raise ValueError(
            f"{finished[0].path} and {other.path} were not scored on the same: {one['domain']}, {one['num_images']} "
            f"images, {len(one['iou'])} classes, and {two['domain']}, {two['num_images']} images, {len(two['iou'])} "
            "classes. Give runs with the same test images and classes."
        )


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
