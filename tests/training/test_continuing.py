"""A finished run goes on with a further target: what it starts from, which images it sees, what its tables show."""

import json
from pathlib import Path

import pytest
from faults.arena import RUN, outcome
from running import stopped_before, undrawn

from t2sda_hf.cli import main
from t2sda_hf.config import continued, load_config
from t2sda_hf.training.build import build_student, weights_contents

SMALL = ["--train.max_steps=3", "--train.save_every=3", "--train.evaluate_every=3"]


def go_on(config: str, *words: str, target: str = "streets-night", replay: float = 0.25):
    return load_config(*continued(config, target, replay, words))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tiny run that is done."""
    undrawn(monkeypatch)
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}/old\n{RUN}", encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *SMALL, "--baseline=source_only"]) == 0
    return tmp_path / "old"


def test_the_old_target_is_replayed_and_both_are_scored_before_and_after(finished, tmp_path, monkeypatch, capsys):
    words = ["train", "--config", str(finished), "--continue_on", "streets-night", *SMALL, "--train.save_every=1"]
    cfg = go_on(str(finished))
    assert [(one.path, one.num_images, one.share) for one in cfg.targets] == [
        ("streets-target", 6, 0.25),
        ("streets-night", None, 0.75),
    ]
    assert [(one.path, one.split, one.num_images) for one in cfg.tests] == [
        ("streets-target", "validation", 1),
        ("streets-night", "validation", 1),
    ]
    assert (cfg.method, cfg.baseline, cfg.output_dir) == ("t2sda", "none", f"{finished}_continued")
    assert cfg == go_on(str(tmp_path / "run.yaml"))  # its output_dir has the run
    again = go_on(str(finished), "--target.num_images=3", "--output_dir=elsewhere", target="{path: a, split: b}")
    assert [(one.path, one.split, one.num_images) for one in again.targets][1] == ("a", "b", 3)
    assert (again.tests[1].path, again.tests[1].split, again.output_dir) == ("a", "validation", "elsewhere")
    started = build_student(cfg)
    source_only = load_config(str(finished / "source_only" / "resolved_config.yaml"))
    assert weights_contents(started).fingerprint != weights_contents(build_student(source_only)).fingerprint

    few = ["--target.num_images=4"]
    assert main([*words, *few]) == 0
    table = capsys.readouterr().out.partition("Every IoU is the mean over the test domains.\n")[2].splitlines()
    header, rows = table[0].split("|"), [line.split("|") for line in table[2:5]]
    assert [cell.strip() for cell in header[1:-1]] == ["mIoU", "t2sda", "t2sda (teacher)", "t2sda (start)"]
    assert [row[1].strip() for row in rows] == ["streets-target (validation)", "streets-night (validation)", "mean"]
    before = json.loads((finished / "t2sda" / "metrics.json").read_text(encoding="utf-8"))["student"]["miou"]
    assert float(rows[0][4]) == pytest.approx(before, abs=0.01)  # the finished student is what it starts from
    stopped_before(monkeypatch, 2)
    cut = [*words, *few, "--output_dir", str(tmp_path / "cut"), "--resume=auto"]
    assert [main(cut), main(cut)] == [143, 0]
    assert outcome(tmp_path / "cut") == outcome(Path(f"{finished}_continued"))
    assert main([*cut, "--replay=0.5"]) == 2
    assert "target.1.share: 0.25 before, 0.5 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--config={old}", "--continue_on=streets-night", "--replay=1"],
            "--replay must be a share between 0 and 1, got",
        ),
        (["--config={old}", "--continue_on=streets-target"], "'streets-target' (train) is a target of "),
        (["--config={old}"], " is the folder of a run, and no config. Give METHOD/resolved_config.yaml in it"),
        (["--config=demo", "--replay=0.5"], "--replay is the share of the old targets, so it needs --continue_on"),
        (["--continue_on=streets-night"], "--continue_on needs --config with the folder of a finished run, or what it"),
        (["--config=demo", "--continue_on=streets-night"], "'outputs/demo' holds no finished run of method t2sda or"),
        (
            ["--config={old}", "--continue_on={{split: a}}"],
            "--continue_on must be a path, or keys of a domain with a path",
        ),
        (
            ["--config={old}", "--continue_on=x", "--baseline=source_only"],
            "baseline must be none with method t2sda and a",
        ),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "old" / "t2sda"
    folder.mkdir(parents=True)
    (folder / "resolved_config.yaml").write_text(RUN, encoding="utf-8")
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    assert main(["train", *(word.format(old=tmp_path / "old") for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_another_spelling_of_an_old_target_is_no_further_one(tmp_path):
    photos = tmp_path / "photos"
    (tmp_path / "t2sda").mkdir()
    photos.mkdir()
    text = RUN.replace("target: {path: streets-target", f"target: {{path: {photos}")
    (tmp_path / "t2sda" / "resolved_config.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "t2sda" / "metrics.json").write_text("{}", encoding="utf-8")
    for spelling in (f"{photos}/", f"{tmp_path}/t2sda/../photos"):
        with pytest.raises(ValueError, match=r"is a target of .* already\. Give a further one"):
            go_on(str(tmp_path), "--test=[{path: a}, {path: b}]", target=spelling)


def test_labels_of_the_old_target_are_learned_on(tmp_path):
    folder = tmp_path / "t2sda"
    folder.mkdir()
    (folder / "resolved_config.yaml").write_text(f"{RUN}target_labels: 2\n", encoding="utf-8")
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    old, cfg = load_config(str(folder / "resolved_config.yaml")), go_on(str(tmp_path))
    assert old.labelled_target is not None
    assert (cfg.target_labels, cfg.labelled_target) == (2, old.labelled_target)


def test_a_test_that_does_not_lie_at_the_target_must_be_said(tmp_path):
    folder = tmp_path / "t2sda"
    folder.mkdir()
    text = RUN.replace("test: {path: streets-target", "test: {path: streets-source")
    (folder / "resolved_config.yaml").write_text(text, encoding="utf-8")
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="on which labelled images of 'streets-night' is the run tested"):
        go_on(str(tmp_path))
    assert len(go_on(str(tmp_path), target="streets-source").tests) == 1  # it is tested there already
    assert len(go_on(str(tmp_path), "--test=[{path: a}, {path: b}]").tests) == 2
