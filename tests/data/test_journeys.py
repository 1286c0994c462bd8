"""From files as they are downloaded, or as somebody's own, to a scored model: prepare, check, two steps, evaluation."""

import json
import shlex
from pathlib import Path

import cv2
import data.test_domains as OWN
import data.test_preparing as RAW
import numpy as np
import pytest
from running import TINY_NETWORK, unpainted

from t2sda_hf.cli import main
from t2sda_hf.data.streets import draw_scene
from t2sda_hf.labels import CITYSCAPES_CLASSES

ROOT = Path(__file__).parents[2]


TINY = (
    TINY_NETWORK
    + """
source: {path: streets-source, num_images: 4}
target: {path: streets-target, num_images: 4}
test: {path: streets-target, split: validation, num_images: 2}
data: {crop_size: [32, 64], outer_crop_size: [32, 64]}
rcs: {min_pixels: 5}
uda: {ignore_top: 0, ignore_bottom: 0, pseudo_threshold: 0.1}
pull: {num_queries: 8, num_negatives: 16}
loss_weights: {feature_distance: 0}
train: {max_steps: 2, batch_size: 1, log_every: 1, num_threads: 1, log_with: []}
"""
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of a stream, 5 s
    unpainted(monkeypatch)


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
    output = ["--output", str(tmp_path / "check"), "--processes", "1", "--pictures", "1", "--only", *roles]
    assert main(["check", *shared, *output]) == faults
    assert main(["train", *shared, "--output_dir", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert 0 <= summary["t2sda"]["miou"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "out" / "t2sda" / "scalars.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "source" in line]  # the others have the proxies
    assert [line["step"] for line in steps] == [1, 2]
    assert all(np.isfinite(line["source"]) for line in steps)
    test = roles.get("test", {"path": "streets-target"})["path"]
    asked = [str(tmp_path / "out" / "t2sda" / "student"), "--domain", test, "--output", str(tmp_path / "scores.json")]
    assert main(["evaluate", *asked, *([] if "test" in roles else ["--limit", "2"])]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["miou"] == pytest.approx(summary["t2sda"]["miou"], abs=1e-9)


def prepare(tmp_path, name, splits):
    RAW.MAKERS[name](tmp_path / "raw" / name)
    out = str(tmp_path / name)
    arguments = [name, "--root", str(tmp_path / "raw" / name), "--output", out, "--incomplete", "--processes", "1"]
    assert main(["prepare", *arguments, "--splits", *splits]) == 0
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


def test_a_stream_as_target(tmp_path):
    images = [OWN.png(draw_scene("target", np.random.default_rng(seed), 40, 80)[0]) for seed in range(5)]
    (tmp_path / "data").mkdir()
    OWN.rows(tmp_path / "data", images, name="train-00000-of-00001.parquet")
    run(tmp_path, {"target": {"path": str(tmp_path / "data"), "streaming": True}})


def test_the_recipe_of_the_paper_as_its_guide_types_it(tmp_path, monkeypatch):
    """From downloads to a score with a small network. Other pages are walked in test_docs.py."""
    for name in ("gta5", "cityscapes"):
        RAW.MAKERS[name](tmp_path / "downloads" / name)
    swapped = {f"/downloads/{name}": str(tmp_path / "downloads" / name) for name in ("gta5", "cityscapes")}
    swapped |= {"720": "40", "1280": "80"}
    small = {"model": "{size: mit_b0, pretrained: null, head: all_mlp, depths: [1, 1, 1, 1], "
             "hidden_sizes: [8, 8, 16, 16], num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 8}",
             "projector": "{hidden: 8, dim: 8}", "data": "{crop_size: [32, 64], outer_crop_size: [32, 64]}",
             "rcs.min_pixels": "5", "uda": "{ignore_top: 0, ignore_bottom: 0}", "loss_weights.feature_distance": "0",
             "train": "{max_steps: 2, batch_size: 1, num_threads: 1, log_with: []}",
             "source.resize": "null", "target.resize": "null", "test.resize": "null"}  # fmt: skip
    more = {
        "train": [text for key, value in small.items() for text in (f"--{key}", value)],
        "prepare": ["--incomplete", "--processes", "1"],
        "check": ["--processes", "1", "--pictures", "1"],
    }
    guide = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    section = guide.split("## GTA5 to Cityscapes, from download to result\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for line in section.split("```bash\n")[1].split("```")[0].splitlines():
        name, *words = [swapped.get(word, word) for word in shlex.split(line, comments=True)][1:]
        assert main([name, *words, *more.get(name, [])]) == 0, line
    assert (tmp_path / "outputs" / "gta_cityscapes_t2sda_daformer" / "summary.json").is_file()
    assert (tmp_path / "outputs" / "check" / "index.html").is_file()
