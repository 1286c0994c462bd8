"""Whether an update waits for its device, counted on one that the CPU plays."""

import json
import os
import subprocess
import sys

import pytest
from running import ROOT

TINY = ["--model.depths=[1,1,1,1]", "--model.hidden_sizes=[8,8,16,16]", "--model.num_attention_heads=[1,1,2,2]"]
TINY += ["--model.size=mit_b0", "--projector={hidden: 8, dim: 8}", "--train.batch_size=2", "--train.log_with=[]"]
TINY += ["--data={crop_size: [32, 64], outer_crop_size: [32, 96]}", "--uda={ignore_top: 0, ignore_bottom: 0}"]
TINY += ["--augment={jitter_probability: 1.0, blur_probability: 1.0}", "--pull={num_queries: 16, num_negatives: 64}"]
CITY = "gta_cityscapes/t2sda_daformer"
HRDA = [
    "--hrda.crop_size=[32,32]",
    "--patch_mask.block_size=16",
    "--data={crop_size: [64, 64], outer_crop_size: [64, 96]}",
]
CNN = ["--model.size=resnet50c", "--model.depths=[1,1,1,1]", "--model.hidden_sizes=[16,16,24,32]"]
RUNS = {
    "daformer": [CITY, *TINY],
    "hrda": ["gta_cityscapes/t2sda_hrda", *TINY, *HRDA],
    "deeplabv2": ["gta_cityscapes/t2sda_deeplabv2", *TINY, *CNN],
    "generalization": ["generalization/gta_cityscapes", *TINY, "--translate.engine=gaussian_blur"],
    "mic": ["gta_cityscapes/t2sda_mic", *TINY, *HRDA],
    "target to source, uniform": [CITY, *TINY, "--pull.query_domain=target", "--pull.query_sampling=uniform"],
    "memory": [CITY, *TINY, "--pull.proto_momentum=0.9", "--drw.absent_conf=ema", "--drw.normalise_over=queried"],
    "66 classes": [CITY, *TINY, f"--classes={json.dumps([f'class {number}' for number in range(66)])}"],
    "150 classes": [CITY, *TINY, f"--classes={json.dumps([f'class {number}' for number in range(150)])}"],
    "as deep as B0": [CITY, *TINY, "--model.depths=[2,2,2,2]"],
    "as deep as B0, bf16": [CITY, *TINY, "--model.depths=[2,2,2,2]", "--train.precision=bf16"],
    "source only": ["gta_cityscapes/source_only", *TINY],
}


@pytest.fixture(scope="module")
def launches() -> dict[str, dict]:
    """Of the last of two updates of each run: kernels, waits and copied bytes."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "t2sda_hf.training.launches", "-"]
    words = json.dumps(list(RUNS.values()))
    done = subprocess.run(command, input=words, env=os.environ | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(RUNS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once_in_an_update(launches, name):
    """For the check that everything is finite. Nothing but that number comes back."""
    assert launches[name]["waits"] == {next(iter(launches[name]["waits"])): 1}
    assert "distributed.py" in next(iter(launches[name]["waits"]))
    assert "to host" not in launches[name]["copied"]


def test_bf16_casts_the_weights_once_in_an_update(launches):
    """With autocast alone there would be 1.7 times as many kernels. What is left casts activations around norms."""
    plain, half = (sum(launches[f"as deep as B0{more}"]["parts"].values()) for more in ("", ", bf16"))
    assert half <= 1.101 * plain


def test_the_pull_launches_as_many_kernels_for_any_number_of_classes(launches):
    found = {launches[name]["parts"]["pull"] for name in ("daformer", "66 classes", "150 classes")}
    assert found == {80}


@pytest.mark.parametrize("name", ["daformer", "hrda", "mic", "deeplabv2", "generalization", "source only"])
def test_a_recipe_launches_no_more_than_its_goal(launches, name):
    """Colour jitter and blur always happen here."""
    most = {"images": 60, "pull": 80, "update": 40}
    parts = launches[name]["parts"]
    assert {part: parts.get(part, 0) for part in most if parts.get(part, 0) > most[part]} == {}
