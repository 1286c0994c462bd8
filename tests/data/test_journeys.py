"""From files as they are downloaded, or as somebody's own, to a scored model: prepare, check, two steps, evaluation."""

import importlib.util
import json
import shlex
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
    evaluate = load(ROOT / "scripts" / "evaluate.py")
    test = roles.get("test", {"path": "streets-target"})["path"]
    asked = [str(tmp_path / "out" / "t2sda" / "student"), "--domain", test, "--output", str(tmp_path / "scores.json")]
    assert evaluate.main([*asked, *([] if "test" in roles else ["--limit", "2"])]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["miou"] == pytest.approx(summary["t2sda"]["miou"], abs=1e-9)


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


def test_a_stream_as_target(tmp_path):
    images = [OWN.png(draw_scene("target", np.random.default_rng(seed), 40, 80)[0]) for seed in range(5)]
    (tmp_path / "data").mkdir()
    OWN.rows(tmp_path / "data", images, name="train-00000-of-00001.parquet")
    run(tmp_path, {"target": {"path": str(tmp_path / "data"), "streaming": True}})


def commands(title):
    """The shell commands of a section of README.md, one list of words each."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for block in section.split("```bash\n")[1:] for line in block.split("```")[0].splitlines()]
    return section, [words for line in lines if (words := shlex.split(line, comments=True))]


def walk(title, tmp_path, monkeypatch, swapped):
    """Run the commands of a section in an empty folder, with a small network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = {"model": "{size: mit_b0, pretrained: null, head: all_mlp, depths: [1, 1, 1, 1], "
             "hidden_sizes: [8, 8, 16, 16], num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 8}",
             "projector": "{hidden: 8, dim: 8}", "data": "{crop_size: [32, 64], outer_crop_size: [32, 64]}",
             "rcs.min_pixels": "5", "uda": "{ignore_top: 0, ignore_bottom: 0}", "loss_weights.feature_distance": "0",
             "train": "{max_steps: 2, batch_size: 1, num_threads: 1, log_with: []}",
             "source.resize": "null", "target.resize": "null", "test.resize": "null"}  # fmt: skip
    for words in commands(title)[1]:
        words = [swapped.get(word, word) for word in words if word not in ("accelerate", "launch", "python")]
        script = Path(words[0]).stem
        extra = {
            "train_uda": [text for key, value in small.items() for text in (f"--{key}", value)],
            "prepare_domain": ["--incomplete", "--processes", "1"],
            "check_domain": ["--processes", "1", "--pictures", "1"],
        }.get(script, [])
        assert load(ROOT / "scripts" / f"{script}.py").main([*words[1:], *extra]) == 0, words


def test_the_recipe_of_the_paper_in_the_readme(tmp_path, monkeypatch):
    for name in ("gta5", "cityscapes"):
        RAW.MAKERS[name](tmp_path / "downloads" / name)
    swapped = {f"/downloads/{name}": str(tmp_path / "downloads" / name) for name in ("gta5", "cityscapes")}
    walk("GTA5 to Cityscapes, from download to result", tmp_path, monkeypatch, swapped | {"720": "40", "1280": "80"})
    assert (tmp_path / "outputs" / "gta_cityscapes_t2sda_daformer" / "summary.json").is_file()
    assert (tmp_path / "outputs" / "check" / "index.html").is_file()


def test_the_recipe_for_own_images_in_the_readme(tmp_path, monkeypatch):
    scenes = [draw_scene("target", np.random.default_rng(seed), 40, 80) for seed in range(12)]
    for number, (image, labels) in enumerate(scenes):
        role = ("game", "photos", "checked")[number // 4]
        ids = np.minimum(labels % 8, 5).astype(np.uint8) if role == "game" else np.minimum(labels % 8, 4)
        OWN.write(tmp_path / "data" / role / "images" / f"{number}.png", OWN.png(image))
        if role != "photos":
            OWN.write(tmp_path / "data" / role / "labels" / f"{number}.png", OWN.png(ids.astype(np.uint8)))
    lines = [f"images/{number}.png,labels/{number}.png\n" for number in range(8, 12)]
    (tmp_path / "data" / "checked" / "pairs.csv").write_text("".join(lines))
    OWN.write(tmp_path / "holiday.jpg", OWN.png(scenes[0][0], format="JPEG"))
    section, _ = commands("Your own images")
    (tmp_path / "mine.yaml").write_text(section.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    walk("Your own images", tmp_path, monkeypatch, {})
    summary = json.loads((tmp_path / "outputs" / "mine" / "summary.json").read_text(encoding="utf-8"))
    assert {"source_only", "t2sda", "gain"} <= set(summary)
