"""A few labelled target images in a whole run: what is read and learned, a stop in between, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from faults.arena import RUN, outcome
from running import stopped_before, undrawn
from tiny import tiny_step

from t2sda_hf.cli import main
from t2sda_hf.config import load_config
from t2sda_hf.methods.t2sda import pseudo_target
from t2sda_hf.training.build import open_domains, read_batches, settle
from t2sda_hf.training.derive import joint_frequencies
from t2sda_hf.translate import build_engine

FEW = ("--target_labels", "2")
OF_TARGET = "--target_labelled.path=streets-target"


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    return str(tmp_path / "run.yaml")


def batches(config: str, *words: str) -> list:
    cfg = load_config(config, ["--train.max_steps", "4", "--train.batch_size", "2", *words])
    accelerator = Accelerator(cpu=True)
    domains = open_domains(cfg, accelerator)
    return list(read_batches(settle(cfg, domains.facts, accelerator).cfg, domains, accelerator, 0))


def test_nothing_asked_for_is_bit_equal_to_a_run_without_the_key(config):
    plain, none = batches(config), batches(config, "--target_labels", "0")
    for one, other in zip(plain, none, strict=True):
        assert one.from_target is other.from_target is None
        assert torch.equal(one.source_images, other.source_images)
        assert torch.equal(one.target_images, other.target_images)


def test_batches_have_their_share_of_target_labels(config):
    found = batches(config, *FEW)
    assert [batch.from_target.tolist() for batch in found] == [[False, True]] * 4
    quarter = batches(config, *FEW, "--data.target_labelled_share", "0.25")
    assert sum(int(batch.from_target.sum()) for batch in quarter) == 2


@pytest.mark.parametrize("engine", ["fda", "color_jitter", "gaussian_blur"])
def test_a_labelled_target_image_stands_in_its_own_style(config, engine):
    """Whatever the engine does to the source beside it; the order is that of the test above."""
    batch = batches(config, *FEW, f"--translate.engine={engine}")[0].on(torch.device("cpu"))
    cfg = load_config(config, [f"--translate.engine={engine}"])
    step = tiny_step(cfg, SimpleNamespace(translate=build_engine(cfg.translate)), batch)
    made = pseudo_target(step)
    assert torch.equal(made[1], batch.source_images[1])
    assert not torch.allclose(made[0], batch.source_images[0], atol=0.01)


def test_a_domain_of_its_own_is_read_like_any_other(config):
    words = ["--target_labelled={path: streets-target, num_images: 5}", "--target_labels=1/2"]
    cfg = load_config(config, words)
    domains = open_domains(cfg, Accelerator(cpu=True))
    assert len(domains.labelled_target) == 3  # half of 5, rounded up
    assert domains.contents["target_labelled_data"].unit == "images and label maps"
    counts = domains.facts.labelled_target[0]
    assert counts.shape == (3, 10)
    mixed = joint_frequencies(cfg, domains.facts)
    own = [part.sum(axis=0) / part.sum() for part in (domains.source_counts, counts)]
    assert mixed == pytest.approx(0.5 * own[0] + 0.5 * own[1])
    bound = open_domains(replace(cfg, method="target_only"), Accelerator(cpu=True))
    assert bound.labelled_target is None  # it learns them all


def test_a_run_that_was_stopped_ends_where_another_ends(config, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    words = ["train", "--config", config, *FEW, "--pull.prototypes", "both", "--baseline", "source_only"]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    stopped_before(monkeypatch, 6, 24)
    cut = [*words, "--output_dir", str(tmp_path / "cut"), "--resume", "auto"]
    assert [main(cut), main(cut), main(cut)] == [143, 143, 0]
    for method in ("source_only", "t2sda"):
        assert outcome(tmp_path / "cut", method) == outcome(tmp_path / "whole", method)
    record = json.loads((tmp_path / "cut" / "data.json").read_text(encoding="utf-8"))
    assert record["on_hub"] == dict.fromkeys(("source", "target", "target_labelled", "test"), False)
    assert {role: domain["num_images"] for role, domain in record["domains"].items()} == {
        "source": 6,
        "target": 6,
        "target_labelled": 2,
        "test": 1,
    }
    changed = [*cut, "--target_labels", "3"]
    assert main(changed) == 2  # the weights would be others


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target_labels=7"], "target_labels asks for 7 labelled target images, and there are 6. Give at most that"),
        (["--target_labels=2/3"], "target_labels must be a number of images, a share like 1/16, or null for all, got"),
        (["--target_labels=-1"], "target_labels must be a number of images, a share like 1/16, or null for all, got"),
        (
            ["--target_labelled={path: streets-target, split: validation}"],
            "of the labelled target images of streets-target (validation) are test images, so scores would say nothing",
        ),
        (["--target_labelled={path: nowhere}"], "nowhere"),
        (
            ["--target_labelled={path: streets-target, class_names: [cow, hut]}"],
            "streets-target (train): no class is shared: the data set has cow, hut",
        ),
        (['--target.path=""', "--target_labels=4"], "target_labels must be null or 0 without target_labelled.path and"),
        (
            [
                "--method=generalization",
                '--target.path=""',
                "--drw.apply_to=none",
                "--translate.engine=style",
                OF_TARGET,
            ],
            "target_labelled.path and target_labels must be empty with method generalization",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(config, tmp_path, capsys, words, said):
    assert main(["train", "--config", config, "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
