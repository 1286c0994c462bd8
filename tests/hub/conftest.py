"""A finished run without a training, a Hub on this machine, and a client of it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from PIL import Image
from tiny import tiny_config, tiny_model

from t2sda_hf.config import dump_config
from t2sda_hf.hub.card import record_run
from t2sda_hf.models import T2SDAImageProcessor

sys.path.insert(0, str(Path(__file__).parent))  # for `server`

from server import TOKEN, Hub, serve

OWN = (
    "--source.path=streets-source",
    "--target.path=streets-target",
    "--test.path=streets-target",
    "--train.max_steps=40",
    "--model.pretrained=null",
    "--push_to_hub.license=cc-by-4.0",
)


def scored(seed: int, classes: tuple[str, ...]) -> dict:
    rng = np.random.default_rng(seed)
    iou = {name: float(value) for name, value in zip(classes, 100 * rng.random(len(classes)), strict=True)}
    iou[classes[-1]] = None
    return {
        "domain": "streets-target (validation)",
        "num_images": 3,
        "miou": float(np.mean([value for value in iou.values() if value is not None])),
        "pixel_accuracy": 50.0 + seed,
        "mean_accuracy": 40.0 + seed,
        "iou": iou,
        "confusion": [[1] * len(classes)] * len(classes),
    }


def write_run(folder: Path, *overrides: str) -> Path:
    """What a training leaves, of a tiny model with random weights."""
    cfg = tiny_config(f"--output_dir={folder}", *OWN, *overrides)
    for seed, method in enumerate(("source_only", cfg.method)):
        model = tiny_model(cfg, seed)
        model.config.id2label = dict(enumerate(cfg.classes))
        model.config.label2id = {name: index for index, name in enumerate(cfg.classes)}
        model.decode_head.classifier.weight.data *= 300  # a new one says nearly the same of every pixel
        model.save_pretrained(folder / method / "student")
        T2SDAImageProcessor(size=(48, 96)).save_pretrained(folder / method / "student")
        results = {"student": scored(seed, cfg.classes)}
        if method != "source_only":
            results["teacher"] = scored(5, cfg.classes)
        (folder / method / "metrics.json").write_text(json.dumps(results))
        own = tiny_config(f"--output_dir={folder}", *OWN, *overrides, *([] if seed else ["--method=source_only"]))
        (folder / method / "resolved_config.yaml").write_text(dump_config(own))
        lines = [{"step": step, "source": 2 / step, "pull": 5.0} for step in (10, 20, 30, 40)]
        lines.append({"step": 40, "student/miou": results["student"]["miou"]})
        (folder / method / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"seed": 0, "num_processes": 2, "classes": cfg.classes}))
    Image.new("RGB", (40, 20), "white").save(folder / "panel.png")
    record_run(folder, "t2sda train --config run.yaml --seed 0 --num_processes 2", num_processes=2)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with serve() as running:
        yield running


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time here, and is written down."""
    slept: list[float] = []
    monkeypatch.setattr("t2sda_hf.hub.push.time.sleep", slept.append)
    return slept
