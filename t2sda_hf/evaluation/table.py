"""Results side by side: models, seeds, and the class sets of the benchmarks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..labels import CITYSCAPES_CLASSES, shortened

Result = Mapping[str, Any]  # of `evaluate_model`

_NOT_IN_SYNTHIA = ("terrain", "truck", "train")
# The classes that benchmarks average over (method 3.1).
CLASS_SETS: dict[str, tuple[str, ...]] = {
    "cs19": CITYSCAPES_CLASSES,
    "syn16": tuple(name for name in CITYSCAPES_CLASSES if name not in _NOT_IN_SYNTHIA),
    "syn13": tuple(name for name in CITYSCAPES_CLASSES if name not in (*_NOT_IN_SYNTHIA, "wall", "fence", "pole")),
}


def subset_miou(result: Result, names: Sequence[str]) -> float | None:
    """Mean IoU in % over some of the classes of a result; None if all of them are 0/0.

    The confusion matrix is that of all classes: predicting terrain on vegetation costs vegetation, although a mean
    over 16 classes has no terrain (method 6.1). The shortcut mIoU19 * 19/16 is not this.

    Raises:
        ValueError: for names that the result does not have, with both lists.
    """
    missing = [name for name in names if name not in result["iou"]]
    if missing or not names:
        raise ValueError(
            f"a mean over {', '.join(names) or 'no class'} needs classes that the model has; it has "
            f"{', '.join(result['iou'])}."
        )
    return mean_of_known([result["iou"][name] for name in names])


def class_sets_of(classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Those of `CLASS_SETS` that are wholly in `classes` and not all of them: their mean says something new."""
    known = set(classes)
    return {title: names for title, names in CLASS_SETS.items() if set(names) < known}


def kinds_of_test(results: Sequence[Result]) -> list[tuple[Any, ...]]:
    """For each result on what it was scored: equal if two may stand in one table, and be averaged.

    These are the classes, the number of images, and the content of the test set. Results of earlier releases do not
    tell the content; if there is one of these, the name of the test set decides.
    """
    told = [(result.get("inputs") or {}).get("data") for result in results]
    names = [result["domain"] for result in results]
    return [
        (tuple(result["iou"]), result["num_images"], which)
        for result, which in zip(results, names if None in told else told, strict=True)
    ]


def summarise(
    results: Sequence[Result], subsets: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, float | int | None]]:
    """Mean and spread of every score over several results of one kind: seeds of one method.

    Args:
        results: one or more, of the same classes.
        subsets: title -> class names; each becomes a row "mIoU (title, number of classes)".

    Returns:
        Row title -> mean, sd (sample, ddof 1; None for fewer than two), sd_population, n. First the classes, then
        mIoU, subsets, pixel accuracy, mean accuracy. None where every result is 0/0; such results do not count in n.
    """
    rows: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for result in results for name in result["iou"]):
        rows[name] = [result["iou"].get(name) for result in results]
    rows["mIoU"] = [result["miou"] for result in results]
    for title, names in (subsets or {}).items():
        rows[f"mIoU ({title}, {len(names)} classes)"] = [subset_miou(result, names) for result in results]
    rows["pixel accuracy"] = [result["pixel_accuracy"] for result in results]
    rows["mean accuracy"] = [result["mean_accuracy"] for result in results]
    return {title: spread(values) for title, values in rows.items()}


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """mean, sd (ddof 1), sd_population and n of the values that are not None."""
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    return {
        "mean": float(numbers.mean()) if numbers.size else None,
        "sd": float(numbers.std(ddof=1)) if numbers.size > 1 else None,
        "sd_population": float(numbers.std()) if numbers.size else None,
        "n": int(numbers.size),
    }


def format_table(
    results: Mapping[str, Result | Sequence[Result]], subsets: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Results side by side, as a Markdown table that is aligned as plain text too.

    Args:
        results: column title -> result, or results of several seeds, which are shown as mean ± sd.
        subsets: as in `summarise`.

    Returns:
        One row per class, then mIoU, subsets, pixel accuracy and mean accuracy, in % with two decimals; a last row n
        if there are several seeds. "-" is 0/0, or a class that this column does not have.
    """
    several = {title: [given] if isinstance(given, Mapping) else list(given) for title, given in results.items()}
    columns = {title: summarise(seeds, subsets) for title, seeds in several.items()}
    scores = {
        "mIoU",
        "pixel accuracy",
        "mean accuracy",
        *(row for c in columns.values() for row in c if "mIoU (" in row),
    }
    titles = dict.fromkeys(row for column in columns.values() for row in column)
    ordered = [row for row in titles if row not in scores] + [row for row in titles if row in scores]
    lines = [[shortened(row, 60), *(_cell(column.get(row)) for column in columns.values())] for row in ordered]
    if any(len(seeds) > 1 for seeds in several.values()):
        lines.append(["n", *(str(len(seeds)) for seeds in several.values())])
    return markdown(["class", *columns], lines)


def miou_by_domain(results: Mapping[str, Result]) -> dict[str, dict[str, float | None]]:
    """Test domain, and "mean", -> column -> mIoU in %, of the results of `joint_result`; {} of one domain."""
    first = next(iter(results.values()), {})
    names = [one["domain"] for one in first.get("domains", ())]
    rows = {
        name: {title: result["domains"][place]["miou"] for title, result in results.items()}
        for place, name in enumerate(names)
    }
    return rows | {"mean": {title: result["miou"] for title, result in results.items()}} if rows else {}


def format_domains(results: Mapping[str, Result]) -> str:
    """`miou_by_domain` as a Markdown table that is aligned as plain text too."""
    rows = miou_by_domain(results).items()
    return markdown(["mIoU", *results], [[name, *map(number, row.values())] for name, row in rows])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned as plain text too: the first to the left, the others to the right."""
    lines = [[escape_cell(cell) for cell in line] for line in (header, *rows)]
    widths = [max(1, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    rule = ["-" if cell == ":" else cell for cell in rule]  # a colon alone makes no table
    return "\n".join(_line(row, widths) for row in [lines[0], rule, *lines[1:]])


def escape_cell(text: str) -> str:
    """A text as it stands in one cell of a Markdown table: no bar of its own ends it, nor does a line break."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.splitlines()))


def number(value: float | None, form: str = ".2f") -> str:
    """A score as text; "-" for one that does not exist: of nothing that was labelled there is none."""
    return "-" if value is None or np.isnan(value) else format(value, form)


def difference(new: float | None, old: float | None) -> float | None:
    """How much higher the first score is; None if one of them does not exist."""
    return None if new is None or old is None else new - old


def _cell(score: Mapping[str, float | int | None] | None) -> str:
    if score is None or score["mean"] is None:
        return "-"
    return f"{score['mean']:.2f}" + ("" if score["sd"] is None else f" ± {score['sd']:.2f}")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that exist; None of none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
