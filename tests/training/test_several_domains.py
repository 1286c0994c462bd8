"""Runs with several sources, targets and tests: a stop in between, what is scored and said, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from faults.arena import RUN, outcome
from running import stopped_before, undrawn

from t2sda_hf.cli import main
from t2sda_hf.config import load_config
from t2sda_hf.evaluation.confusion import scores
from t2sda_hf.evaluation.evaluator import joint_result
from t2sda_hf.evaluation.gain import GroupCounts, gain_interval, pack
from t2sda_hf.evaluation.page import write_page
from t2sda_hf.training.build import open_domains, read_batches, settle

SOURCES = "--source=[{path: streets-source, num_images: 6}, {path: streets-simulator, num_images: 3, share: 2}]"
TARGETS = "--target=[{path: streets-target, num_images: 6}, {path: streets-night, num_images: 4}]"
DAY = "path: streets-target, split: validation, num_images: 2"
TESTS = f"--test=[{{{DAY}}}, {{path: streets-night, split: validation, num_images: 1, resize: [48, 96]}}]"
LISTS = (SOURCES, TARGETS, TESTS)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    return str(tmp_path / "run.yaml")


def test_processes_and_micro_batches_see_the_same_pairs(config):
    """What a position shows depends on nothing but the seed: two processes are two micro-batches of one."""
    cfg = load_config(config, [*LISTS, "--train.max_steps=3", "--train.batch_size=2"])
    domains = open_domains(cfg, Accelerator(cpu=True))
    cfg = settle(cfg, domains.facts, Accelerator(cpu=True)).cfg
    whole = list(read_batches(cfg, domains, Accelerator(cpu=True), 0))
    later = list(read_batches(cfg, domains, Accelerator(cpu=True), 1))
    for one, other in zip(whole[1:], later, strict=True):
        assert torch.equal(one.source_images, other.source_images)
        assert torch.equal(one.target_images, other.target_images)
    assert domains.source_pixels.sum() == pytest.approx(domains.source_counts.sum(), abs=10)
    each = [part.sum(axis=0) / part.sum() for part in np.split(domains.source_counts, [6])]
    shares = domains.source_pixels / domains.source_pixels.sum()
    assert shares == pytest.approx(each[0] / 3 + 2 * each[1] / 3, abs=1e-4)


def test_a_run_that_was_stopped_ends_where_another_ends_and_scores_every_test(config, tmp_path, monkeypatch, capsys):
    undrawn(monkeypatch)
    words = ["train", "--config", config, *LISTS]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    table = printed.partition("Every IoU is the mean over the test domains.\n")[2]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == "mIoU"
    assert rows[2:] == ["streets-target (validation)", "streets-night (validation)", "mean"]
    stopped_before(monkeypatch, 8)
    cut = [*words, "--output_dir", str(tmp_path / "cut"), "--resume", "auto"]
    assert [main(cut), main(cut)] == [143, 0]
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    metrics = json.loads((tmp_path / "cut" / "t2sda" / "metrics.json").read_text(encoding="utf-8"))
    student = metrics["student"]
    assert [one["num_images"] for one in student["domains"]] == [2, 1]
    assert student["miou"] == pytest.approx(np.mean([one["miou"] for one in student["domains"]]))
    assert len(metrics["student_source"]["domains"]) == 2
    read = json.loads((tmp_path / "cut" / "data.json").read_text(encoding="utf-8"))
    assert {role: domain["num_images"] for role, domain in read["domains"].items()} == {
        "source": 9,
        "target": 10,
        "test": 3,
    }
    assert [part["num_images"] for part in read["domains"]["source"]["parts"]] == [6, 3]
    assert "source images in the batches: 33% of streets-source (train), 67% of" in " ".join(read["derived"]).lower()
    assert main([*cut, SOURCES.replace("share: 2", "share: 1")]) == 2  # the weights would be others
    assert "source.2.share: 2.0 before, 1.0 now" in capsys.readouterr().err
    page = write_page(tmp_path / "cut").read_text(encoding="utf-8")
    assert "<td>streets-night (validation)</td>" in page
    assert "streets-source, streets-simulator" in page  # the paths in the set-up
    models = [str(tmp_path / "cut" / "t2sda" / "student")]
    assert main(["evaluate", *models]) == 0
    assert re.search(r"\| mean +\| +\d", capsys.readouterr().out)


def test_the_score_over_domains_is_the_mean_of_theirs():
    one, two = ({"domain": name, "num_images": n, "unreadable": [], "miou": miou, "pixel_accuracy": 50.0,
                 "mean_accuracy": None, "iou": {"road": miou, "bus": bus}, "confusion": [[n, 0], [0, 1]]}
                for name, n, miou, bus in (("a", 3, 40.0, None), ("b", 5, 60.0, 20.0)))  # fmt: skip
    assert joint_result([one]) is one
    both = joint_result([one, two])
    assert (both["miou"], both["mean_accuracy"], both["iou"]) == (50, None, {"road": 50, "bus": 20})
    assert (both["domain"], both["num_images"], both["confusion"]) == ("a + b", 8, [[8, 0], [0, 2]])
    assert both["domains"] == [one, two]


def test_the_gain_over_domains_is_resampled_in_each():
    def result(seed: int, number: int, right: float) -> tuple[np.ndarray, dict]:
        shares = np.clip(right + 0.1 * np.random.default_rng(seed).normal(size=number), 0, 1)
        matrices = np.array(
            [[[round(500 * s), 500 - round(500 * s)], [500 - round(500 * s), round(500 * s)]] for s in shares]
        )
        groups = GroupCounts(number, 2)
        for index, matrix in enumerate(matrices):
            groups.add(index, matrix)
        return matrices, {"groups": pack(groups.pixels)}

    new, old = [result(1, 40, 0.8), result(2, 10, 0.6)], [result(3, 40, 0.7), result(4, 10, 0.6)]
    low, high = gain_interval(*({"domains": [one for _, one in results]} for results in (new, old)))
    rng, gains = np.random.default_rng(5), []
    for _ in range(3000):
        of_domains = []
        for (ours, _), (theirs, _) in zip(new, old, strict=True):
            drawn = rng.integers(0, len(ours), len(ours))
            of_domains.append(scores(ours[drawn].sum(0))["mean_iou"] - scores(theirs[drawn].sum(0))["mean_iou"])
        gains.append(100 * np.mean(of_domains))
    assert [low, high] == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=0.5)


def test_other_commands_read_every_domain_or_say_that_they_read_one(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["check", "--config", config, *LISTS, "--output", "checked", "--processes", "1", "--pictures", "1"]) == 0
    )
    page = Path("checked/index.html").read_text(encoding="utf-8")
    assert all(f"<h2>{title}: " in page for title in ("source 1", "source 2", "target 2", "test 1", "test 2"))
    assert {path.name for path in Path("checked").glob("*.png")} >= {"source_2.png", "test_1.png"}
    assert "a run: source images in the batches: 33% of streets-source" in capsys.readouterr().out
    assert main(["estimate", config, *LISTS]) == 0
    capsys.readouterr()
    lists = "\n".join(word[2:].replace("=", ": ", 1) for word in LISTS)
    Path("lists.yaml").write_text(f"base: {config}\n{lists}\n", encoding="utf-8")
    assert main(["translator", "preview", "--config", "lists.yaml", "--output", "a.png"]) == 2
    assert "t2sda translator takes one source and one target, and the config lists 2" in capsys.readouterr().err
    assert main(["prepare", "source", "--config", "lists.yaml", "--output", "made"]) == 2
    assert "t2sda prepare takes one source, and the config lists 2" in capsys.readouterr().err
    assert main(["tables", "fair", "--config", config, *LISTS, "--output", "fair"]) == 2
    assert (
        "the table fair halves one test domain, and the config lists 2: streets-target, streets-night"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source=[{path: streets-source, num_images: 2}, {path: nowhere}]"], "source 2 of 2 (nowhere): "),
        (
            [SOURCES.replace("share: 2", "class_names: [cow, hut]")],
            "source 2 of 2 (streets-simulator): streets-simulator (train): no class is shared: the data set has cow, h",
        ),
        ([TARGETS, "--target_labels=2"], "target_labels takes one target, and the config lists 2: streets-target,"),
        ([SOURCES, "--push_to_hub.repo_id=me/model"], "a model card takes one domain of each role, and the config"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_is_written(config, tmp_path, capsys, words, said):
    assert main(["train", "--config", config, "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
