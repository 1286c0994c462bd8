"""Run folders made by hand: what is read from them, and what their pages say to somebody who was not there."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from running import unpainted

from t2sda_hf.commands.compare import compare_proxies
from t2sda_hf.evaluation.confusion import scores
from t2sda_hf.evaluation.page import command_to_repeat, write_comparison, write_page
from t2sda_hf.evaluation.run_folder import read_run, write_data_record
from t2sda_hf.labels import CITYSCAPES_CLASSES


@pytest.fixture(autouse=True)
def unpainted_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first test; test_figures.py looks at what is painted."""
    if request.function is not test_a_finished_run_explains_itself:
        unpainted(monkeypatch)


CLASSES = ["road", "building", "sky", "car"]
# Every class is taken for each other one in 10 pixels.
ADAPTED = np.diag([60, 80, 70, 0]) + 10
BEFORE = np.diag([95, 30, 70, 0]) + 10


def result(matrix: np.ndarray, classes: list[str] = CLASSES, domain: str = "city (validation)") -> dict:
    found = scores(matrix, classes)
    return {
        "domain": domain,
        "num_images": 7,
        "unreadable": [],
        "miou": 100 * found["mean_iou"],
        "pixel_accuracy": 100 * found["overall_accuracy"],
        "mean_accuracy": 100 * found["mean_accuracy"],
        "iou": {name: 100 * value for name, value in found["iou"].items()},
        "confusion": matrix.tolist(),
    }


def write_method(folder: Path, config: dict, lines: list[dict], results: dict | None, panels: tuple[int, ...] = ()):
    folder.mkdir(parents=True)
    (folder / "resolved_config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if results is not None:
        (folder / "metrics.json").write_text(json.dumps(results))
    for step in panels:
        (folder / "panels").mkdir(exist_ok=True)
        Image.new("RGB", (60, 20)).save(folder / "panels" / f"step_{step:06d}.png")


def write_run(folder: Path, seed: int = 0, classes: list[str] = CLASSES, finished: bool = True) -> Path:
    config = {
        "method": "t2sda",
        "seed": seed,
        "classes": classes,
        "source": {"path": "data/game"},
        "target": {"path": "data/city <i>"},
        "test": {"path": "data/city", "split": "validation"},
        "model": {"size": "mit_b0", "head": "daformer", "pretrained": None},
        "train": {"max_steps": 400, "batch_size": 2, "micro_batches": 1},
        "optim": {"lr": 1e-3},
        "uda": {"pseudo_threshold": 0.8},
    }
    matrices = [np.pad(m, (0, len(classes) - len(m)), constant_values=1) for m in (ADAPTED + seed, BEFORE)]
    own, before = (result(matrix, classes) for matrix in matrices)
    evaluated = {"step": 200, "student/miou": 30.0, "student/iou/road": 30.0, "proxy/coverage": 0.25}
    evaluated |= {"teacher/miou": 20.0, "teacher/pixel_accuracy": 61.4, "teacher/iou/road": 55.0}
    evaluated |= {"student_source/miou": 50.0, "proxy/agreement": 0.75, "proxy/source": 0.5}
    lines = [
        {"step": 100, "source": 1.0, "target": 0.9, "pull": 5.0, "trust": 0.2, "lr": 1e-3, "data_share": 0.1},
        {"step": 150, "skipped": "loss 'pull' is nan on process 0"},
        {"step": 160, "unreadable": "street_7.png is gone"},
        {"step": 170, "unreadable": "street_7.png is gone"},
        {"step": 200, "source": 0.5, "target": 0.8, "pull": 4.0, "trust": 0.3, "lr": 1e-3, "data_share": 0.1},
        evaluated,
    ]
    last = [{"step": 400, "lr": 0.0}] if finished else []
    results = {"student": own, "teacher": own, "student_source": own} if finished else None
    write_method(folder / "source_only", config | {"method": "source_only"}, lines[:1] + last, {"student": before})
    write_method(folder / "t2sda", config, lines + last, results, (100, 200, 300, 400))
    write_data_record(
        folder,
        seed=seed,
        domains={"source": {"name": "game (train)", "num_images": 9, "fingerprint": "ab" * 32}},
        classes=classes,
        source_pixels=range(1, len(classes) + 1),
        sampling=None,
    )
    record = {"command": f"t2sda train --seed {seed}", "commit": "0a1b2c", "hardware": "CPU"}
    (folder / "run.json").write_text(json.dumps(record))
    Image.new("RGB", (60, 20)).save(folder / "panel.png")
    if finished:
        gain = own["miou"] - before["miou"]
        (folder / "summary.json").write_text(json.dumps({"gain": gain, "seconds": 90, "num_processes": 1}))
    return folder


class Page(HTMLParser):
    """Text, and the values of every attribute that a browser loads or follows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.links, self.ids, self.tags, self.text = path, [], set(), set(), ""
        self.open, self.bare_tables, self.pictures_before_text = list[str](), 0, 0
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.tags.add(tag)
        self.bare_tables += tag == "table" and not any("scroll" in around for around in self.open)
        self.pictures_before_text += tag == "img" and "A segmentation model" not in self.text
        if tag not in {"img", "meta", "link", "br", "source"}:
            self.open.append(given.get("class") or "")
        self.text += "" if tag in {"span", "b", "code", "a"} else " "
        self.links += [given[name] for name in ("href", "src", "srcset", "action", "data") if name in given]
        self.ids |= {given["id"]} if "id" in given else set()

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def is_whole(page: Page) -> bool:
    """Everything it loads lies beside it; it needs no network and runs nothing."""
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        else:
            assert "://" not in link, link
            assert not link.startswith("/"), link
            assert (page.path.parent / link).is_file(), link
    assert not page.open  # every element has its end
    assert not page.bare_tables  # a wide one scrolls in itself, not the page
    styles = page.path.read_text(encoding="utf-8")
    assert "url(" not in styles
    assert "@import" not in styles
    return not page.tags & {"script", "link", "iframe", "object"}


def test_a_finished_run_explains_itself(tmp_path: Path) -> None:
    page = Page(write_page(write_run(tmp_path / "run")))
    assert is_whole(page)
    assert f"t2sda train --seed 0 --output_dir {tmp_path / 'run_again'}" in page.text
    assert "labelled images of data/game" in page.text
    assert "city <i>" in page.text  # a name is a text, never HTML
    drawn = {"miou", "losses", "proxies", "confusion", "classes"}
    assert {f"figures/{name}.png" for name in drawn} <= set(page.links)
    assert {f"t2sda/panels/step_{step:06d}.png" for step in (100, 200, 300, 400)} <= set(page.links)
    assert "panel.png" in page.links
    assert "abababababababab" in page.text
    assert "0a1b2c" in page.text
    assert "pseudo_threshold: 0.8" in page.text
    assert "150: loss 'pull' is nan on process 0" in page.text


def test_a_page_opens_with_the_picture_and_a_phone_gets_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    Image.new("RGB", (30, 40)).save(folder / "panel_narrow.png")
    page = Page(write_page(folder))
    assert is_whole(page)
    assert page.pictures_before_text == 1
    assert "what source-only and t2sda say" in page.text
    assert '<source media="(max-width: 700px)" srcset="panel_narrow.png">' in page.path.read_text()
    (folder / "panel.png").unlink()  # in the middle of a run there is only the newest panel
    assert "Pseudo-labels after 400 updates." in Page(write_page(folder)).text
    other = write_page(write_run(tmp_path / "b", seed=1)).parent
    comparison = Page(write_comparison([folder, other], tmp_path / "both"))
    assert is_whole(comparison)
    assert {"../b/panel.png", "../run/t2sda/panels/step_000400.png"} <= set(comparison.links)


def test_what_a_run_says_of_itself_stands_on_its_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name, more in (("data.json", {"derived": ["crop 2x3"]}), ("summary.json", {"notes": ["It is noise."]})):
        content = json.loads((folder / name).read_text()) | more
        (folder / name).write_text(json.dumps(content))
    text = Page(write_page(folder)).text
    assert text.index("It is noise.") < text.index("crop 2x3") < text.index("Which classes got better")


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("t2sda train --config a.yaml --output-dir out --seed 1", "t2sda train --config a.yaml --seed 1"),
        ("OMP_NUM_THREADS=1 t2sda train --output_dir=out --resume auto", "OMP_NUM_THREADS=1 t2sda train"),
        ("t2sda train '--classes=[a, b]'", "t2sda train '--classes=[a, b]'"),
        ("accelerate launch scripts/train_uda.py --config a", "accelerate launch scripts/train_uda.py --config a"),
    ],
)
def test_the_command_of_a_run_repeats_it_beside_it(tmp_path: Path, command: str, again: str) -> None:
    assert command_to_repeat(tmp_path / "run", command) == f"{again} --output_dir {tmp_path / 'run_again'}"
    (tmp_path / "run_again").mkdir()
    assert command_to_repeat(tmp_path / "run", command) == f"{again} --output_dir {tmp_path / 'run_again2'}"


@pytest.mark.parametrize("place", [".", "..", "../t2sda"])
def test_a_page_can_be_made_from_inside_of_its_folder(tmp_path: Path, monkeypatch, place: str) -> None:
    (tmp_path / "run" / "t2sda").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / ("" if place == "." else "t2sda"))
    beside = "../t2sda_again" if place == "../t2sda" else tmp_path / "run_again"
    assert command_to_repeat(Path(place), "t2sda train") == f"t2sda train --output_dir {beside}"


def test_which_classes_got_worse(tmp_path: Path) -> None:
    """IoU of road 70/130 and not 105/165, of building 90/150 and not 40/100, the others as before."""
    page = Page(write_page(write_run(tmp_path / "run")))
    worse, better, same = "Worse than source-only: road (-9.8).", "Better: building (+20.0).", "sky, car."
    assert f"{worse} {better} Within half a point: {same}" in page.text
    assert "road 27.03 63.64 53.85 -9.79 53.85" in page.text  # 100 of 370 pixels, before, now, change, teacher


def test_were_the_pseudo_labels_any_good_at_step_200(tmp_path: Path) -> None:
    page = Page(write_page(write_run(tmp_path / "run")))
    row = page.text[page.text.index("confidence stability") :]
    assert row.startswith("confidence stability 200 61% 20.00 25% 75% – – 400 ")
    assert "step-200" in page.ids
    assert "Step 200. On the test images the teacher's IoU was then: road 55." in page.text
    assert "at least 0.8" in page.text


def test_a_run_that_is_not_finished_has_a_page_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "panel.png").unlink()
    (folder / "run.json").unlink()
    (folder / "data.json").unlink()
    with (folder / "t2sda" / "scalars.jsonl").open("a") as file:
        file.write('{"step": 250, "sour')  # killed while it wrote
    page = Page(write_page(folder))
    assert is_whole(page)
    assert "It has no final scores" in page.text
    assert [step for step, _ in read_run(folder).main.losses["source"]] == [100, 200]


def test_source_only_alone_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for path in sorted((folder / "t2sda").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "t2sda").rmdir()
    (folder / "summary.json").unlink()
    page = Page(write_page(folder))
    assert is_whole(page)
    assert "Source-only training makes none." in page.text
    assert "source-only (student)" in page.text


def test_the_page_of_an_upper_bound_says_that_it_learned_the_target(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "t2sda")
    (folder / "source_only").rename(folder / "target_only")
    (folder / "summary.json").unlink()
    page = Page(write_page(folder))
    assert is_whole(page)
    assert "itself: an upper bound to compare with." in page.text
    assert "Target-only training makes none." in page.text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "labelled images of data/game and from images of city <i> whose labels it never saw, with the"),
        (
            {"target_labels": 16},
            "from images of city <i>, with the method t2sda. 16 of the labelled images of the target were learned with",
        ),
        (
            {"target_labelled": {"path": "few"}},
            "All labelled images of the target were learned with their labels, too.",
        ),
        ({"start_model": "old/student"}, "A segmentation model that began as old/student learned from labelled images"),
        ({"method": "source_only"}, "on labelled images of data/game alone, and tested"),
        (
            {"method": "source_only", "target_labels": 16},
            "images of data/game, and tested on another domain. 16 of",
        ),
        (
            {"method": "source_free", "source": {}, "start_model": "old/student"},
            "A finished segmentation model, old/student, learned from images of city <i> whose labels it never saw",
        ),
        (
            {"method": "distil", "start_model": "old/student"},
            "learned what a finished one, old/student, says of images",
        ),
        (
            {"method": "generalization", "target": {}},
            "of data/game in other styles, and saw no image of another domain",
        ),
    ],
)
def test_the_first_sentence_says_what_a_run_learned_from(keys: dict, said: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "t2sda" / "resolved_config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) | keys
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.rmtree(folder / "source_only")
    (folder / "t2sda").rename(folder / config["method"])
    page = Page(write_page(folder))
    assert is_whole(page)
    assert said in page.text
    assert "All scores are of 7 labelled images of data/city, which were" in page.text


def test_a_run_that_ended_early_does_not_claim_the_updates_that_it_never_made(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "t2sda" / "scalars.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    method = read_run(folder).main
    assert method.reached == 200
    assert method.miou["student"] == [(200, method.results["student"]["miou"])]
    assert "updates200 of 400" in Page(write_page(folder)).text


def test_the_means_of_benchmarks_stand_under_nineteen_classes(tmp_path: Path) -> None:
    page = Page(write_page(write_run(tmp_path / "run", classes=list(CITYSCAPES_CLASSES))))
    assert "mIoU, 19 classes" in page.text
    assert "mIoU, 16 classes (syn16)" in page.text
    assert "mIoU, 13 classes (syn13)" in page.text


def test_what_a_run_left_is_read_back(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    method = run.main
    assert [m.name for m in run.methods] == ["source_only", "t2sda"]
    assert run.baseline is run.methods[0]
    assert method.losses == {
        "source": [(100, 1.0), (200, 0.5)],
        "target": [(100, 0.9), (200, 0.8)],
        "pull": [(100, 5.0), (200, 4.0)],
    }
    assert method.trust == [(100, 0.2), (200, 0.3)]
    student = method.results["student"]
    assert method.miou["student"] == [(200, 30.0), (400, student["miou"])]
    assert method.accuracy["teacher"] == [(200, 61.4), (400, student["pixel_accuracy"])]
    assert method.iou["teacher"][0] == (200, {"road": 55.0})
    assert method.proxies == {"coverage": [(200, 0.25)], "agreement": [(200, 0.75)], "source": [(200, 0.5)]}
    assert method.skipped == [(150, "loss 'pull' is nan on process 0")]
    assert method.unreadable == {"street_7.png is gone": 2}
    assert [step for step, _ in method.panels] == [100, 200, 300, 400]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run folder.*output_dir of `t2sda train`"):
        write_page(tmp_path)


def test_runs_of_equal_name_and_different_classes_on_one_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", seed=1, classes=[*CLASSES, "bus"])]
    for folder in runs:
        write_page(folder)
    page = Page(write_comparison(runs, tmp_path / "comparison"))
    assert is_whole(page)
    assert all(str(folder) in page.text for folder in runs)
    values = [read_run(folder).main.results["student"]["miou"] for folder in runs]
    assert "2 different test sets, or have different classes" in page.text
    assert {"figures/miou.png", "figures/miou1.png"} <= set(page.links)  # a chart for each
    for value, number in zip(values, (4, 5), strict=True):
        table = page.text[page.text.index(f"Means: city (validation), 7 images, {number} classes") :]
        assert f"t2sda (student) {value:.2f} – 1" in table[: table.index("Scores")]
    assert "seed 0 1" in page.text[page.text.index("In what the runs differ") :]


@pytest.mark.parametrize("recorded", [True, False])
def test_runs_with_other_test_images_are_not_averaged(recorded: bool, tmp_path: Path) -> None:
    """What was scored decides; where an earlier release did not write it down, the name of the test set does."""
    runs = [write_run(tmp_path / f"run_{seed}", seed) for seed in range(3)]
    for folder, test in zip(runs, ("a", "a", "b"), strict=True):
        write_page(folder)
        for method in ("source_only", "t2sda"):
            path = folder / method / "metrics.json"
            results = json.loads(path.read_text())
            for result in results.values():
                result |= {"inputs": {"data": test}} if recorded else {"domain": test}
            path.write_text(json.dumps(results))
    page = Page(write_comparison(runs, tmp_path / "comparison"))
    values = [read_run(folder).main.results["student"]["miou"] for folder in runs]
    mean, sd = np.mean(values[:2]), np.std(values[:2], ddof=1)
    assert f"t2sda (student) {mean:.2f} {sd:.2f} 2" in page.text
    assert f"t2sda (student) {values[2]:.2f} – 1" in page.text
    with pytest.raises(ValueError, match=r"run_0 and .*run_2 were not scored on the same"):
        compare_proxies(runs, None)


def test_a_comparison_draws_curves_only_of_runs_that_were_evaluated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    written = [write_comparison([folder], tmp_path / "with").read_text(encoding="utf-8")]
    (folder / "t2sda" / "scalars.jsonl").unlink()
    written.append(write_comparison([folder], tmp_path / "without").read_text(encoding="utf-8"))
    assert ["mIoU over updates" in page for page in written] == [True, False]
    assert not list((tmp_path / "without" / "figures").iterdir())


def test_a_comparison_without_results_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "source_only" / "metrics.json").unlink()
    with pytest.raises(ValueError, match="has results yet"):
        write_comparison([folder], tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()
