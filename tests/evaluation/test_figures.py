"""Charts of names that nobody foresaw and of more classes than a page can name."""

import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from t2sda_hf.analysis.plots import save_bars, save_relation
from t2sda_hf.evaluation import figures
from t2sda_hf.evaluation.figures import NAMED, save_class_shares, save_confusion, save_curves, save_losses
from t2sda_hf.evaluation.pictures import IN_LEGEND, Column, draw_legend, save_grid
from t2sda_hf.evaluation.table import difference, format_table, number
from t2sda_hf.labels import shortened

ODD = ("$\\frac$", "$", "a_{b}^c $x$", "straße", "x" * 250, "%s {0} <b>", "\\alpha")


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_names_of_classes_are_text_in_every_picture(tmp_path: Path) -> None:
    counts, values = np.eye(len(ODD), dtype=int), np.linspace(0, 1, len(ODD))
    save_confusion(tmp_path / "confusion.png", {"$\\frac$": counts}, ODD)
    save_class_shares(tmp_path / "shares.png", {"$\\frac$": values}, ODD)
    save_curves(tmp_path / "curves.png", {name: [(1, 0.5)] for name in ODD[:4]}, "$\\frac$", {"$\\frac$": 0.1})
    save_losses(tmp_path / "losses.png", {"t2sda": {name: [(1, 0.5)] for name in ODD[:4]}})
    ids = np.arange(len(ODD), dtype=np.uint8).repeat(16).reshape(-1, 16)
    save_grid(tmp_path / "grid.png", [Column("$\\frac$", [ids], "classes")], ODD, "$\\frac$")
    save_bars(tmp_path / "bars.png", {"$\\frac$": {"$\\frac$": values}}, ODD, "$\\frac$")
    save_relation(tmp_path / "relation.png", {"$\\frac$": (values, values)}, ODD)
    (tmp_path / "legend.png").write_bytes(draw_legend(ODD))
    for path in tmp_path.glob("*.png"):  # 250 letters make no picture wider than others
        assert max(size_of(path)) < 2500, path


def test_a_long_name_keeps_its_ends() -> None:
    assert shortened("road") == "road"
    assert shortened("traffic light of the second kind") == "traffic light o…ond kind"
    assert len(shortened("x" * 250)) == 24
    row = {"x" * 250: 1.0}
    result = {"iou": row, "miou": None, "pixel_accuracy": None, "mean_accuracy": None}
    assert max(map(len, format_table({"model": result}).splitlines())) < 80


def test_many_classes_make_the_confusions_no_larger_and_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 classes took 27 s and 1.7 GB: a text for every cell and an inch for every other name."""
    texts: list[int] = []
    keep = figures._save

    def counted(figure: Figure, path: Path) -> None:
        texts.append(sum(len(axis.texts) for axis in figure.axes))
        keep(figure, path)

    monkeypatch.setattr(figures, "_save", counted)
    sizes = {}
    for num_classes in (NAMED, 255):
        rng, path = np.random.default_rng(0), tmp_path / f"{num_classes}.png"
        names = [f"class {index}" for index in range(num_classes)]
        began = time.process_time()
        save_confusion(path, {"model": rng.integers(0, 3, (num_classes, num_classes))}, names)
        spent = time.process_time() - began
        sizes[num_classes] = size_of(path)
    assert texts[0] > NAMED
    assert texts[1] == 0
    assert max(sizes[255]) <= 1.1 * max(sizes[NAMED])
    assert spent < 5
    save_class_shares(tmp_path / "shares.png", {"source": np.full(255, 1 / 255)}, names)
    assert max(size_of(tmp_path / "shares.png")) < 3000


def test_the_legend_of_a_grid_names_the_largest_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: seen.extend(_legend(figure)))
    ids = np.repeat(np.arange(100, dtype=np.uint8), np.arange(100, 0, -1))
    columns = [Column("truth", [ids[None]], "classes")]
    save_grid(tmp_path / "grid.png", columns, [f"k{index}" for index in range(255)])
    assert seen == [*(f"k{index}" for index in range(IN_LEGEND)), f"and {100 - IN_LEGEND} smaller classes"]


def _legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_score_of_nothing_is_a_dash() -> None:
    assert [number(None), number(float("nan")), number(1.0), number(2.5, "+.1f")] == ["-", "-", "1.00", "+2.5"]
    assert difference(None, 3.0) is difference(3.0, None) is None
    assert difference(3.0, 1.0) == 2.0
