"""Every family of backbones in training: two updates, what learns, the files, and predictions at odd sizes."""

import itertools
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from encoders import FAMILIES, ONE_SIZE, write_encoder
from tiny import tiny_config

from t2sda_hf.cli import main
from t2sda_hf.config import RunConfig
from t2sda_hf.evaluation.inference import load_model, predict_labels
from t2sda_hf.methods import METHODS
from t2sda_hf.models import T2SDAImageProcessor
from t2sda_hf.training.build import build_student
from t2sda_hf.training.checkpoint import Progress
from t2sda_hf.training.estimate import random_batch, stand_in_engine
from t2sda_hf.training.loop import Run, learn, next_step, update
from t2sda_hf.training.parts import make_parts
from t2sda_hf.training.tracking import Tracker

# What the maps do not pass: a token of masked pretraining, and norms after the last stage. Nothing else.
UNUSED = {
    "swin": {"swin.layernorm.weight", "swin.layernorm.bias"},
    "focalnet": {"focalnet.layernorm.weight", "focalnet.layernorm.bias"},
    "bit": {"bit.norm.weight", "bit.norm.bias"},
    "dinov2": {"embeddings.mask_token"},
    "dinov2_with_registers": {"embeddings.mask_token"},
    "dinov3_vit": {"embeddings.mask_token"},
}


def automatic(folder: Path, *overrides: str) -> RunConfig:
    """A tiny run on the encoder in a folder."""
    none = (f"--model.{name}=null" for name in ("depths", "hidden_sizes", "num_attention_heads"))
    return tiny_config("--model.size=auto", f"--model.pretrained={folder}", *none, *overrides)


def started(cfg: RunConfig) -> Run:
    accelerator = Accelerator(cpu=True)
    parts = make_parts(cfg, build_student(cfg).train(), stand_in_engine(cfg), accelerator)
    return Run(cfg, accelerator, parts, METHODS[cfg.method], itertools.repeat(random_batch(cfg)))


def make_updates(run: Run, folder: Path, first: int = 0, updates: int = 2) -> None:
    with Tracker(run.accelerator, folder, updates, Progress(), run.cfg.method, show=False) as tracker:
        for step in range(first, first + updates):
            update(run, step, tracker)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_updates_and_the_model_that_is_left(family, tmp_path):
    folder = write_encoder(family, tmp_path / "encoder")
    size = ["--data={crop_size: [64, 64], outer_crop_size: [64, 96]}"] if family in ONE_SIZE else []
    cfg = automatic(folder, *size, "--loss_weights={masked_consistency: 1, feature_distance: 0.1}")
    run = started(cfg)
    student: Any = run.parts.networks.student
    logged: list[dict[str, torch.Tensor]] = []
    learn(run, next_step(run, 0, 0, random_batch(cfg)), logged)
    assert {"source", "target", "pull", "masked_consistency", "feature_distance"} <= {n for t in logged for n in t}
    still = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {f"backbone.model.{name}" for name in UNUSED.get(family, ())}
    assert not any(p.requires_grad for p in run.parts.networks.teacher.parameters())
    run.parts.optimizer.zero_grad()
    make_updates(run, tmp_path)

    assert all(torch.isfinite(p).all() for p in student.parameters())
    student.save_pretrained(tmp_path / "student")
    T2SDAImageProcessor().save_pretrained(tmp_path / "student")
    loaded, _ = load_model(str(tmp_path / "student"))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in student.state_dict().items())
    for height, width in [(64, 64)] if family in ONE_SIZE else [(75, 131), (33, 40), (1, 1)]:
        labels = predict_labels(loaded, torch.randn(1, 3, height, width), (height, width))
        assert labels.shape == (1, height, width)


def test_a_run_by_its_command_with_nothing_but_the_name_of_an_encoder(tmp_path, capsys):
    """`model.pretrained` and `size: auto` are all that a run on DINOv2 needs, and its student loads without either."""
    write_encoder("dinov2", tmp_path / "encoder")
    run = {
        "classes": ["road", "sidewalk", "building", "vegetation", "sky", "car"],
        "source": {"path": "streets-source", "num_images": 2},
        "target": {"path": "streets-target", "num_images": 2},
        "test": {"path": "streets-target", "split": "validation", "num_images": 1},
        "model": {"size": "auto", "pretrained": str(tmp_path / "encoder"), "head": "linear"},
        "projector": {"hidden": 8, "dim": 8},
        "data": {"crop_size": [64, 96], "outer_crop_size": [64, 96]},
        "train": {"max_steps": 1, "batch_size": 1, "log_with": []},
        "evaluation": {"source_images": 0},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0

    rmtree(tmp_path / "encoder")
    model, classes = load_model(str(tmp_path / "run" / "t2sda" / "student"))
    assert model.config.backbone_config.model_type == "dinov2"
    assert classes == tuple(run["classes"])
    assert main(["train", "--config", str(tmp_path / "run.yaml"), f"--output_dir={tmp_path / 'other'}"]) != 0
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_random_start_takes_the_sizes_alone(tmp_path):
    folder = write_encoder("convnext", tmp_path)
    (folder / "model.safetensors").unlink()
    cfg = automatic(folder, "--model.random_start=true", "--model.drop_path_rate=0.3")
    student = build_student(cfg)
    assert student.config.backbone_config.drop_path_rate == 0.3
    again = build_student(cfg)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="no weights that can be read"):
        build_student(automatic(folder))


@pytest.mark.parametrize("family", ["convnext", "convnextv2", "resnet"])
def test_what_cannot_be_computed_twice_is_said_before_the_run(family, tmp_path):
    cfg = automatic(write_encoder(family, tmp_path), "--model.activation_checkpointing=true")
    with pytest.raises(
        ValueError, match=r"activation_checkpointing must be false for .*: \w+ cannot be computed twice"
    ):
        build_student(cfg)


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    folder = write_encoder("dinov2", tmp_path)
    gradients = []
    for checkpointing in ("false", "true"):
        cfg = automatic(folder, f"--model.activation_checkpointing={checkpointing}", "--model.drop_path_rate=0")
        run = started(cfg)
        learn(run, next_step(run, 0, 0, random_batch(cfg)), [])
        gradients.append([p.grad for p in run.parts.networks.student.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.pretrained=null", "model.pretrained must be a Hub id or a folder with model.size auto"),
        ("--model.depths=[1, 1, 1, 1]", "model.depths must be null with model.size auto"),
        ("--model.head=deeplabv2", "model.head must be daformer, all_mlp or linear with model.size auto"),
    ],
)
def test_what_means_nothing_with_an_encoder_of_its_own_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        automatic(Path("anywhere"), override)
