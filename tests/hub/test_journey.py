"""Train, push to a Hub on this machine, load as strangers do, predict: everywhere the same masks."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import TINY_RUN, t2sda
from server import TOKEN, Hub, content, serve
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from t2sda_hf.cli import main
from t2sda_hf.evaluation.inference import load_model

ROOT = Path(__file__).parents[2]
REPOSITORY = "me/streets"
pytestmark = pytest.mark.two_processes

# Run by an interpreter without site: it finds the libraries, but no package that was installed as editable.
STRANGER = """
import importlib.util, sys, numpy, torch
found = importlib.util.find_spec("t2sda_hf")
assert found is None or found.origin is None  # no code: an editable install leaves the folder of the card's template
torch.set_num_threads(THREADS)
exec(CARD)
numpy.save("pipeline.npy", sum(numpy.asarray(one["mask"]) // 255 * segment.model.config.label2id[one["label"]]
                               for one in masks))
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained(REPOSITORY, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(REPOSITORY, trust_remote_code=True)
inputs = processor(Image.open("street.png"), return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
numpy.save("logits.npy", outputs.logits.numpy())
size = Image.open("street.png").size[::-1]
numpy.save("auto.npy", processor.post_process_semantic_segmentation(outputs, [size])[0].numpy())
assert not [name for name in sys.modules if name == "t2sda_hf"]
"""
# With our package: what the card says, with no trust in anybody's code.
FRIEND = """
import numpy, torch
torch.set_num_threads(THREADS)
exec(CARD)
from PIL import Image
inputs = processor(Image.open("street.png"), return_tensors="pt")
with torch.no_grad():
    numpy.save("logits.npy", model(**inputs).logits.numpy())
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of training in two processes, published by what its config says."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY_RUN + f"push_to_hub: {{repo_id: {REPOSITORY}}}\n", encoding="utf-8")
    arguments = ["--config", str(folder / "tiny.yaml"), "--output_dir", str(folder / "run"), "--train.max_steps", "5"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, folder).items():
            patch.setenv(name, value)
        printed = t2sda("train", *arguments, "--baseline", "source_only", "--num_processes", "2")
    assert f"Published: {hub.url}/{REPOSITORY}/commit/" in printed
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What `t2sda predict` says of one picture with the folder of the run, and the model's logits."""
    folder = tmp_path_factory.mktemp("expected")
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((137, 90)).save(folder / "street.png")
    student = str(run / "t2sda" / "student")
    assert main(["predict", student, str(folder / "street.png"), "--output", str(folder / "out")]) == 0
    model = AutoModelForSemanticSegmentation.from_pretrained(student)
    with Image.open(folder / "street.png") as picture, torch.no_grad():
        logits = model(**AutoImageProcessor.from_pretrained(student)(picture, return_tensors="pt")).logits
    with Image.open(folder / "out" / "street_ids.png") as ids:
        return {"folder": folder, "ids": np.array(ids), "logits": logits.numpy()}


def environment(hub: Hub, home: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    return own | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def start(code: str, hub: Hub, folder: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    values = f"REPOSITORY = {REPOSITORY!r}\nTHREADS = {torch.get_num_threads()}\n"
    command = [sys.executable, *flags, "-c", values + code]
    done = subprocess.run(
        command, cwd=folder, env=environment(hub, folder) | more, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def card_blocks(hub: Hub) -> list[str]:
    return re.findall(r"```python\n(.*?)```", hub.files(REPOSITORY)["README.md"].decode(), re.S)


def test_strangers_without_the_package_get_the_same_masks(
    hub: Hub, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "street.png").write_bytes((expected["folder"] / "street.png").read_bytes())
    libraries = sysconfig.get_path("purelib")
    code = STRANGER.replace("exec(CARD)", card_blocks(hub)[2])
    said = start(code, hub, tmp_path, "-S", PYTHONPATH=libraries)
    assert "not supported" not in said.stderr
    assert len(np.unique(expected["ids"])) > 1
    for way in ("pipeline", "auto"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{way}.npy"), expected["ids"])
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected["logits"])


def test_the_card_s_first_two_ways_give_the_saved_model(
    hub: Hub, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "street.png").write_bytes((expected["folder"] / "street.png").read_bytes())
    first, second, _ = card_blocks(hub)
    code = FRIEND.replace("exec(CARD)", f"{first}\nmine = model\n{second}")
    code += "assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), model.state_dict().values()))\n"
    code += "assert type(mine) is type(model)\n"
    start(code, hub, tmp_path, PYTHONPATH=str(ROOT))
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected["logits"])


def test_the_hf_command_downloads_what_was_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    hf = Path(sys.executable).with_name("hf")
    command = [str(hf), "download", REPOSITORY, "--local-dir", str(tmp_path / "here")]
    subprocess.run(command, env=environment(hub, tmp_path), check=True, capture_output=True, timeout=60)
    downloaded = {name: text for name, text in content(tmp_path / "here").items() if not name.startswith(".cache")}
    assert downloaded == hub.files(REPOSITORY)
    model, classes = load_model(str(tmp_path / "here"))
    saved, _ = load_model(str(run / "t2sda" / "student"))
    assert classes[:2] == ("road", "sidewalk")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_published_scores_are_those_of_the_summary(hub: Hub, run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    facts = json.loads(hub.files(REPOSITORY)["facts.json"])
    assert facts["student"]["miou"] == summary["t2sda"]["miou"]
    assert facts["source_only"]["miou"] == summary["source_only"]["miou"]
    assert (facts["steps"], facts["num_processes"], facts["license"]) == (5, 2, "apache-2.0")
    assert facts["command"].startswith("OMP_NUM_THREADS=1 t2sda train --config")
    assert facts["command"].endswith("--baseline=source_only --num_processes 2 --cpu")
    assert len(hub.repositories[REPOSITORY].commits) == 2  # the empty one, and all files in the other


def test_the_guide_shows_the_ways_of_the_card(hub: Hub) -> None:
    """There the remark above each is a sentence, and the model a folder, so that the guide can be walked."""
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(encoding="utf-8"), re.S)
    shown = [block.replace("outputs/to_push", REPOSITORY).replace("photos/", "") for block in shown]
    assert shown == [re.sub(r"\A#.*\n", "", block) for block in card_blocks(hub)]


def test_the_hf_command_publishes_the_metric_as_a_space(hub: Hub, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("hf")), "upload", "me/metric", "model_cards/streaming_mean_iou"]
    own = environment(hub, tmp_path)
    subprocess.run([*command, "--repo-type", "space"], cwd=ROOT, env=own, check=True, capture_output=True, timeout=60)
    assert {"README.md", "app.py", "requirements.txt", "streaming_mean_iou.py"} <= set(hub.files("me/metric"))
