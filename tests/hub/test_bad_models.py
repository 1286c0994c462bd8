"""A model that cannot be loaded is one sentence with the cure, in seconds, never a trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import TOKEN, Hub, Repository, content

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, time
from t2sda_hf.evaluation.inference import load_model
said = {}
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        load_model(name)
        said[name] = ["", 0]
    except ValueError as error:
        said[name] = [str(error), time.monotonic() - began]
print(json.dumps(said))
"""


def ask(endpoint: str, token: str, home: Path, *names: str, **more: str) -> dict[str, tuple[str, float]]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *names],
        env=own | {"PYTHONPATH": str(ROOT)} | more,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "UNEXPECTED" not in done.stderr  # transformers' table of weights
    return json.loads(done.stdout)


@pytest.fixture
def student(finished_run: Path) -> dict[str, bytes]:
    return content(finished_run / "t2sda" / "student")


def put(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    hub.repositories[name] = Repository()
    hub.repositories[name].commit("main", files)


def test_every_fault_of_a_model_is_one_sentence(hub: Hub, student: dict[str, bytes], tmp_path: Path) -> None:
    config = json.loads(student["config.json"])
    more = config | {"id2label": {**config["id2label"], "5": "bus"}, "label2id": {**config["label2id"], "bus": 5}}
    put(hub, "me/good", student)
    put(hub, "me/bert", student | {"config.json": json.dumps(config | {"model_type": "bert"}).encode()})
    put(hub, "me/classes", student | {"config.json": json.dumps(more).encode()})
    put(hub, "me/cut", student | {"model.safetensors": student["model.safetensors"][:5000]})
    put(hub, "me/damaged", student)
    hub.damaged = {"me/damaged"}
    cures = {
        "me/good": "",
        "me/nothing": "Check the spelling",
        "me/bert": "is a 'bert' model: give a T2S-DA model or a SegFormer",
        "me/classes": "another number of classes",
        "me/cut": "or are damaged",
        "me/damaged": "sha256 differs",
        str(tmp_path / "nowhere"): "there is no such folder",
    }
    said = ask(hub.url, TOKEN, tmp_path / "home", *cures)
    for name, cure in cures.items():
        message, seconds = said[name]
        assert cure in message, message
        assert bool(message) == bool(cure), message
        assert "\n" not in message
        assert seconds < 3


def test_a_wrong_token_and_no_connection_are_named_and_the_cache_still_works(
    hub: Hub, student: dict[str, bytes], tmp_path: Path
) -> None:
    put(hub, "me/good", student)
    put(hub, "me/other", student)
    message, _ = ask(hub.url, "hf_" + "w" * 30, tmp_path / "home", "me/other")["me/other"]
    assert "hf auth login" in message
    assert ask(hub.url, TOKEN, tmp_path / "home", "me/good")["me/good"][0] == ""
    said = ask("http://127.0.0.1:9", TOKEN, tmp_path / "home", "me/good", "me/other")
    assert said["me/good"][0] == ""
    assert "the Hub cannot be reached" in said["me/other"][0]
    assert said["me/other"][1] < 3


def test_a_fault_at_any_request_of_a_download_gives_the_model_or_a_sentence_and_spoils_nothing(
    finished_run: Path, tmp_path: Path
) -> None:
    """The worker itself checks that what it gets is the saved model, bit by bit, and that the next download works."""
    done = subprocess.run(
        [sys.executable, "tests/hub/download_worker.py", str(finished_run / "t2sda" / "student"), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["requests"] >= 6
    assert any(name.startswith("GET") and name.endswith("model.safetensors") for name in report["asked"])
    for fault, message in report["said"].items():
        assert message.startswith("cannot load a model from 'me/streets': "), fault
        assert "\n" not in message
    assert {fault.split()[0] for fault in report["said"]} >= {"401", "403", "404", "500", "503", "drop"}
    assert "slow" not in {fault.split()[0] for fault in report["said"]}
