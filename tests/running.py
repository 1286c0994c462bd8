"""A tiny run, and commands in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY_NETWORK = """
model: {size: mit_b0, pretrained: null, head: all_mlp, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16],
        num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 8}
projector: {hidden: 8, dim: 8}
"""
# A few steps on generated streets with an encoder of a few thousand parameters.
TINY_RUN = (
    TINY_NETWORK
    + """method: t2sda
classes: [road, sidewalk, building, pole, traffic sign, vegetation, sky, person, car, bus]
source: {path: streets-source, num_images: 6}
target: {path: streets-target, num_images: 6}
test: {path: streets-target, split: validation, num_images: 3}
data: {crop_size: [32, 64], outer_crop_size: [64, 96], cat_max_ratio: 0.9}
rcs: {min_pixels: 5}
uda: {ignore_top: 0, ignore_bottom: 0, pseudo_threshold: 0.1}
pull: {num_queries: 8, num_negatives: 16}
optim: {lr: 1e-3, warmup_steps: 0}
train: {max_steps: 3, batch_size: 1, log_every: 1, num_threads: 1, log_with: []}
loss_weights: {feature_distance: 0}
"""
)


def t2sda(*words: str) -> str:
    """What a command prints that runs on the CPU in a process of its own, or in those that its flags ask for."""
    return _printed([sys.executable, "-m", "t2sda_hf", *words, "--cpu"])


def launch(processes: int, script: str, *arguments: str) -> str:
    """The same of a script under `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # On a CPU accelerate starts several processes only this way: --cpu would silently start one.
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    return _printed([*command, script, *arguments], ACCELERATE_USE_CPU="true")


def _printed(command: list[str], **environment: str) -> str:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | own | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
