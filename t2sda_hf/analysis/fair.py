"""A fair comparison: every method at the learning rate that suits it, and no image that chose a rate in a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.gain import GROUPS, group_pixels
from ..evaluation.table import Result, difference, kinds_of_test, markdown, number, spread
from .statistics import paired_difference

# The rows, and what they are called in the table.
ROWS = {"source_only": "source-only", "self_training": "self-training", "t2sda": "T2S-DA", "target_only": "upper bound"}
CHOOSING, SHOWN = 0, 1  # the halves of the test images: the blocks of groups with even and with odd numbers
BLOCKS = 10  # of neighbouring groups: the frames of a drive are alike, and every other one would be in both halves
DIFFERENT_TESTS = (
    "runs of this table were scored on different test images or label maps, so their scores say nothing about each "
    "other. `t2sda train` with --resume auto scores a finished run again; or pass another --output."
)
PAIRS = (("t2sda", "source_only"), ("t2sda", "self_training"), ("self_training", "source_only"))
LOST = 1.0  # points of IoU below source-only from which a class is named

Results = Mapping[str, Mapping[float, Mapping[int, Result]]]  # row -> rate -> seed -> of `evaluate_model`


def iou_of_half(result: Result, half: int) -> list[float | None]:
    """IoU of each class in % on every other block of neighbouring test images; None for 0/0.

    Args:
        result: of `evaluate_model`.
        half: `CHOOSING` or `SHOWN`.

    Raises:
        ValueError: if the result has fewer than two groups.
    """
    pixels = group_pixels(result)
    if pixels is None or pixels.shape[1] < 2:
        raise ValueError(
            f"{result['num_images']} test images of {result['domain']} cannot be halved: one half chooses the learning "
            "rates, the other one makes the figures. Test on at least two images, with this release."
        )
    intersection, union = pixels[:, halves(pixels.shape[1]) == half].sum(axis=1)
    return [100 * float(own / both) if both else None for own, both in zip(intersection, union, strict=True)]


def halves(num_groups: int) -> np.ndarray:
    """(G,) of `CHOOSING` and `SHOWN`, by group of test images."""
    blocks = min(BLOCKS, num_groups)
    return np.arange(num_groups) * blocks // num_groups % 2


def halves_of_images(num_images: int, num_groups: int | None = None) -> np.ndarray:
    """(N,) of `CHOOSING` and `SHOWN`, by test image; None: as many groups as `evaluate_model` makes."""
    groups = min(num_images, GROUPS) if num_groups is None else num_groups
    return halves(groups)[np.arange(num_images) * groups // num_images]


def images_of_halves(num_images: int, num_groups: int) -> tuple[int, int]:
    """How many test images choose, and of how many the figures are."""
    of_half = np.bincount(halves_of_images(num_images, num_groups), minlength=2)
    return int(of_half[CHOOSING]), int(of_half[SHOWN])


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that exist."""
    return spread(values)["mean"]


def tried(of_row: Mapping[float, Mapping[int, Result]], search_seeds: Sequence[int]) -> dict[float, float | None]:
    """Rate -> mIoU on the choosing half, the mean over the seeds of the search; None as long as one is missing."""
    scores: dict[float, float | None] = {}
    for rate, by_seed in of_row.items():
        done = all(seed in by_seed for seed in search_seeds)
        scores[rate] = mean([mean(iou_of_half(by_seed[s], CHOOSING)) for s in search_seeds]) if done else None
    return scores


def best(scores: Mapping[float, float | None]) -> float | None:
    """The rate with the highest score, the first of equal ones; None where there is no score."""
    known = {rate: score for rate, score in scores.items() if score is not None}
    return max(known, key=lambda rate: known[rate]) if known else None


def row_figures(results: Results, search_seeds: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """What a table with a search says of each of its rows, for JSON.

    Args:
        results: of every row and rate, also where there is none yet.
        search_seeds: that choose the rates.
        seeds: of the figures.

    Returns:
        - images: "choosing" and "shown", how many of the test images; None without a result.
        - classes: their names.
        - rows: by name, "rates" (rate -> score on the choosing half), "rate" (the chosen one), "miou" (by seed), their
          mean, sd, sd_population and n, "iou" (mean over seeds, of each class).

    Raises:
        ValueError: if results are of different test images, or have fewer than two groups.
    """
    found = [result for of_row in results.values() for by_seed in of_row.values() for result in by_seed.values()]
    if len(set(kinds_of_test(found))) > 1:
        raise ValueError(DIFFERENT_TESTS)
    images, classes = None, list[str]()
    if found:
        pixels, classes = group_pixels(found[0]), list(found[0]["iou"])
        groups = 1 if pixels is None else pixels.shape[1]
        images = dict(zip(("choosing", "shown"), images_of_halves(found[0]["num_images"], groups), strict=True))
    rows: dict[str, dict[str, Any]] = {}
    for name, of_row in results.items():
        scores = tried(of_row, search_seeds)
        rate = best(scores)
        done = {} if rate is None else {seed: of_row[rate][seed] for seed in seeds if seed in of_row[rate]}
        iou = {seed: iou_of_half(result, SHOWN) for seed, result in done.items()}
        miou = {seed: mean(of_seed) for seed, of_seed in iou.items()}
        rows[name] = {"rates": {f"{rate:g}": score for rate, score in scores.items()}, "rate": rate, "miou": miou}
        rows[name] |= spread(list(miou.values()))
        rows[name]["iou"] = [mean(of_class) for of_class in zip(*iou.values(), strict=True)] or [None] * len(classes)
    known = {"images": images, "classes": classes, "rows": rows}
    return known | {"search_seeds": list(search_seeds), "seeds": list(seeds)}


def figures_over_labels(results: Results, search_seeds: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """What the table "labels" says: `row_figures`, where a row is named by its method and its number of labels.

    Returns:
        Also numbers: of labels, as they are named; differences: by number, "T2S-DA minus source-only" with that many.
    """
    found = row_figures(results, search_seeds, seeds)
    numbers = list(dict.fromkeys(name.split()[1] for name in results))
    pairs = {number: (f"t2sda {number}", f"source_only {number}") for number in numbers}
    return found | {"numbers": numbers, "differences": {n: _pairs(found["rows"], *pair) for n, pair in pairs.items()}}


def figures(results: Results, search_seeds: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """All that the table "fair" says.

    Returns:
        Those of `row_figures`, and

        - differences: "T2S-DA minus source-only" ... -> mean, low, high, sd, n of the pairs; None for fewer than two.
        - share: of the gap that is closed, "miou" and "iou" of each class; None where there is no gap. "missing": the
          rows without which there is no share.
        - lost: class -> change against source-only, of those that lost more than a point.
    """
    found = row_figures(results, search_seeds, seeds)
    rows, classes = found["rows"], found["classes"]
    told = {f"{ROWS[new]} minus {ROWS[old]}": _pairs(rows, new, old) for new, old in PAIRS}
    bounds = {name: rows[name] for name in ("t2sda", "source_only", "target_only")}
    share = {
        "miou": share_of_gap(*(row["mean"] for row in bounds.values())),
        "iou": [share_of_gap(*of_class) for of_class in zip(*(row["iou"] for row in bounds.values()), strict=True)],
        "missing": [ROWS[name] for name, row in bounds.items() if not row["n"]],
    }
    changes = map(difference, rows["t2sda"]["iou"], rows["source_only"]["iou"])
    lost = {name: change for name, change in zip(classes, changes, strict=True) if (change or 0) < -LOST}
    return found | {"differences": told, "share": share, "lost": lost}


def share_of_gap(ours: float | None, lower: float | None, upper: float | None) -> float | None:
    """(ours - lower) / (upper - lower); None where the upper bound is not above the lower one, or one is missing."""
    if ours is None or lower is None or upper is None or upper <= lower:
        return None
    return (ours - lower) / (upper - lower)


def fair_text(content: Mapping[str, Any]) -> str:
    """The table of `figures`, in Markdown."""
    rows, share, images = content["rows"], content["share"], content["images"]
    if images is None:
        return "No run is finished yet."
    num_rates = max(len(row["rates"]) for row in rows.values())
    said = [_said_of_search(content), "Source-only is the one row that has seen no image of the target."]
    unfinished = [ROWS[name] for name, row in rows.items() if None in row["rates"].values() and row["rate"]]
    if unfinished:
        said.append(f"Not every learning rate has a result yet (or ever, if its run failed): {', '.join(unfinished)}.")
    edges = [
        f"{ROWS[name]} ({row['rate']:g})"
        for name, row in rows.items()
        if row["rate"] is not None and num_rates > 1 and row["rate"] in (min(rates := _rates(row)), max(rates))
    ]
    if edges:
        said.append(f"At the end of what was tried, so that another rate may be better: {', '.join(edges)}.")

    seeds = content["seeds"]
    lines = [
        [
            ROWS[name],
            "–" if row["rate"] is None else f"{row['rate']:g}",
            *(number(row["miou"].get(seed)) for seed in seeds),
            *(number(row[key]) for key in ("mean", "sd")),
        ]
        for name, row in rows.items()
    ]
    parts = [" ".join(said), _headline(content)]
    parts.append(markdown(["mIoU", "rate", *(f"seed {seed}" for seed in seeds), "mean", "sd"], lines))
    parts.append("\n".join(f"- {title}: {_paired(told)}" for title, told in content["differences"].items()))
    lines = [
        [name, *(number(row["iou"][place]) for row in rows.values()), _percent(share["iou"][place])]
        for place, name in enumerate(content["classes"])
    ]
    lines.append(["mIoU", *(number(row["mean"]) for row in rows.values()), _percent(share["miou"])])
    parts.append(markdown(["IoU, mean", *(ROWS[name] for name in rows), "share of the gap"], lines))
    if content["lost"]:
        lost = ", ".join(f"{name} ({change:+.1f})" for name, change in content["lost"].items())
        parts.append(f"Under T2S-DA these classes are more than {LOST:g} point below source-only: {lost}.")
    elif rows["t2sda"]["n"] and rows["source_only"]["n"]:
        parts.append(f"Under T2S-DA no class is more than {LOST:g} point below source-only.")
    rates = list(dict.fromkeys(rate for row in rows.values() for rate in row["rates"]))
    scores = [[ROWS[name], *(number(row["rates"].get(rate)) for rate in rates)] for name, row in rows.items()]
    parts.append(markdown(["mIoU on the choosing images, by rate", *rates], scores))
    return "\n\n".join(parts)


def label_curve_text(content: Mapping[str, Any]) -> str:
    """The table "labels" of `figures_over_labels`, in Markdown."""
    if content["images"] is None:
        return "No run is finished yet."
    rows = content["rows"]
    lines = []
    for count in content["numbers"]:
        both = rows[f"t2sda {count}"], rows[f"source_only {count}"]
        cells = [f"{number(row['mean'])} ± {number(row['sd'])} ({row['n']})" for row in both]
        rates = ["–" if row["rate"] is None else f"{row['rate']:g}" for row in both]
        lines.append([count, cells[0], rates[0], cells[1], rates[1], _paired(content["differences"][count])])
    header = ["labelled target images", "T2S-DA (seeds)", "rate", "source-only + labels (seeds)", "rate", "difference"]
    return "\n\n".join([_said_of_search(content), markdown(header, lines)])


def _headline(content: Mapping[str, Any]) -> str:
    share, rows = content["share"], content["rows"]
    title = "Share of the gap closed, (T2S-DA - source-only) / (upper bound - source-only)"
    if share["missing"]:
        return f"{title}: not known, because {' and '.join(share['missing'])} is missing."
    ours, lower, upper = (rows[name]["mean"] for name in ("t2sda", "source_only", "target_only"))
    if share["miou"] is None:
        return f"{title}: –. The upper bound ({upper:.2f}) is not above source-only ({lower:.2f})."
    values = f"({ours:.2f} - {lower:.2f}) / ({upper:.2f} - {lower:.2f})"
    return f"**{title}: {_percent(share['miou'])}** = {values}."


def _said_of_search(content: Mapping[str, Any]) -> str:
    images, num_rates = content["images"], max(len(row["rates"]) for row in content["rows"].values())
    few = ". A fair search has at least three" if num_rates < 3 else ""
    return (
        f"All figures are of {images['shown']} of the {sum(images.values())} test images, in %. The learning rate of "
        f"each row is the best of the same {num_rates} values{few}. It was chosen on the other {images['choosing']} "
        f"test images, every other block of neighbours, with {_seeds(content['search_seeds'])}, whose own figures may "
        "be a little high for that."
    )


def said_of_absent(absent: Sequence[Sequence[str]]) -> list[str]:
    """Sentences about classes that none of the test images shows that choose, and none of those of the figures."""
    return [
        f"None of the test images {which} shows {', '.join(names)}: the IoU is 0 there if it is predicted anywhere, "
        "and otherwise left out of the mean."
        for which, names in zip(("that choose", "of the figures"), absent, strict=True)
        if names
    ]


def _pairs(rows: Mapping[str, Any], new: str, old: str) -> dict[str, Any] | None:
    both = rows[new]["miou"], rows[old]["miou"]
    return vars(paired_difference(*both)) if len(both[0].keys() & both[1].keys()) > 1 else None


def _paired(told: Mapping[str, float] | None) -> str:
    if told is None:
        return "fewer than two seeds in common"
    return f"{told['mean']:+.2f} (95 % over seeds: {told['low']:+.2f} to {told['high']:+.2f}, n = {told['n']})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _rates(row: Mapping[str, Any]) -> list[float]:
    return [float(rate) for rate in row["rates"]]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
