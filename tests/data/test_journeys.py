"""From files as they are downloaded, or as somebody's own, to a scored model: prepare, check, two steps, evaluation."""

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from t2sda_hf.data.streets import draw_scene
from t2sda_hf.labels import CITYSCAPES_CLASSES

ROOT = Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RAW = load(Path(__file__).with_name("test_preparing.py"))
OWN = load(Path(__file__).with_name("test_domains.py"))
TINY = """
source: {path: streets-source, num_images: 4}
target: {path: streets-target, num_images: 4}
test: {path: streets-target, split: validation, num_images: 2}
model: {size: mit_b0, pretrained: null, head: all_mlp, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16],
        num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 8}
projector: {hidden: 8, dim: 8}
data: {crop_size: [32, 64], outer_crop_size: [32, 64]}
rcs: {min_pixels: 5}
uda: {ignore_top: 0, ignore_bottom: 0, pseudo_threshold: 0.1}
pull: {num_queries: 8, num_negatives: 16}
loss_weights: {feature_distance: 0}
train: {max_steps: 2, batch_size: 1, log_every: 1, num_threads: 1, log_with: []}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run(tmp_path, roles, classes=CITYSCAPES_CLASSES, faults=0):
    """Check and train with `roles`, as a user would write them into a config; other domains are drawn ones."""
    config = tmp_path / "run.yaml"
    lines = [f"classes: {json.dumps(list(classes))}\n", TINY]
    config.write_text("".join(lines), encoding="utf-8")
    overrides = []
    for role, keys in roles.items():
        overrides += [text for key, value in keys.items() for text in (f"--{role}.{key}", json.dumps(value))]
        if "num_images" not in keys:
            overrides += [f"--{role}.num_images", "null"]
    shared = ["--config", str(config), *overrides]
    check = load(ROOT / "scripts" / "check_domain.py")
    output = ["--output", str(tmp_path / "check"), "--processes", "1", "--pictures", "1", "--only", *roles]
    assert check.main([*shared, *output]) == faults
    train = load(ROOT / "scripts" / "train_uda.py")
    assert train.main([*shared, "--output_dir", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert 0 <= summary["t2sda"]["miou"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "out" / "t2sda" / "scalars.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "source" in line]  # the others have the proxies
    assert [line["step"] for line in steps] == [1, 2]
    assert all(np.isfinite(line["source"]) for line in steps)


def prepare(tmp_path, name, splits):
    RAW.MAKERS[name](tmp_path / "raw" / name)
    script = load(ROOT / "scripts" / "prepare_domain.py")
    out = str(tmp_path / name)
    arguments = [name, "--root", str(tmp_path / "raw" / name), "--output", out, "--incomplete", "--processes", "1"]
    assert script.main([*arguments, "--splits", *splits]) == 0
    return out


@pytest.mark.parametrize("name", ["gta5", "synthia"])
def test_a_source_of_the_paper_to_cityscapes(name, tmp_path):
    source = prepare(tmp_path, name, ["train"])
    cityscapes = prepare(tmp_path, "cityscapes", ["train", "validation"])
    test = {"path": cityscapes, "split": "validation"}
    run(tmp_path, {"source": {"path": source}, "target": {"path": cityscapes}, "test": test})


@pytest.mark.parametrize("name", ["cityscapes", "acdc", "bdd100k", "mapillary"])
def test_another_city_as_source_and_test(name, tmp_path):
    path = prepare(tmp_path, name, ["train", "validation"])
    run(tmp_path, {"source": {"path": path}, "test": {"path": path, "split": "validation"}})


@pytest.mark.parametrize("form", OWN.FORMS, ids=lambda form: form.__name__)
def test_own_data_in_every_form(form, tmp_path, monkeypatch):
    """The same run whatever the form; images are street scenes with the classes 0 to 2."""

    def scene(seed=0, size=(40, 80)):
        image, labels = draw_scene("source", np.random.default_rng(seed), *size)
        return image, np.minimum(labels % 4, 2)

    monkeypatch.setattr(OWN, "arrays", scene)
    keys = form(tmp_path / "data") | {"class_names": list(OWN.CLASSES)}
    target = {key: value for key, value in keys.items() if key not in ("label_path", "class_names")}
    run(tmp_path, {"source": keys, "target": target}, OWN.CLASSES, faults=1)  # target and source are the same pictures


def test_a_video_as_target(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "drive.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 5, (96, 64))
    for seed in range(4):
        writer.write(np.ascontiguousarray(draw_scene("target", np.random.default_rng(seed), 64, 96)[0][..., ::-1]))
    writer.release()
    run(tmp_path, {"target": {"path": str(tmp_path / "drive.avi"), "frame_step": 2}})
