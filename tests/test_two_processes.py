"""Two gloo processes on this machine against one."""

import json
import re
from pathlib import Path

import pytest
import torch
from encoders import write_encoder
from running import TINY_RUN, fork, t2sda
from safetensors.torch import load_file
from transformers import SegformerConfig, SegformerModel
from two_process_case import case, statistics

pytestmark = pytest.mark.two_processes


def train(folder: Path, processes: int, *arguments: str) -> dict:
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "tiny.yaml"
    config.write_text(TINY_RUN, encoding="utf-8")
    encoder = folder.parent / "encoder"  # a pretrained one, so that the feature distance takes part
    if not encoder.exists():
        sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
        torch.manual_seed(0)
        SegformerModel(SegformerConfig(**sizes)).save_pretrained(encoder)
    arguments += ("--model.pretrained", str(encoder), "--loss_weights.feature_distance", "0.005")
    words = ("train", "--config", str(config), "--output_dir", str(folder), *arguments)
    if "--accelerate_config" in words:
        t2sda(*words, f"--num_processes={processes}")
    else:
        fork(processes, "-m", "t2sda_hf", *words, *(["--cpu"] if processes == 1 else []))
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def scalars(folder: Path) -> list[dict]:
    lines = (folder / "t2sda" / "scalars.jsonl").read_text(encoding="utf-8").splitlines()
    timing = ("data_share", "seconds_per_step")
    return [{key: value for key, value in json.loads(line).items() if key not in timing} for line in lines]


def test_statistics_equal_those_of_the_joined_batch(tmp_path: Path) -> None:
    fork(2, "tests/two_process_worker.py", str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    # Before that: who has other settings or data is named by both, and where it all lies does not matter.
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0][0] == ""
    assert re.match(
        r"process 1 on .* differs from process 0 on .*: optim.lr is 0.002, and 0.001 there; seed is 1, and 0 there\.",
        said[0][1],
    )
    assert "target_data: 1 of 2 images differ from those there, first: b.png. Start all" in said[0][2]
    assert [int(rank["num_processes"]) for rank in ranks] == [2, 2]
    assert said[0][3] == ["done", True, False, False, True]

    cfg, arrays = case()
    joined = statistics(arrays, cfg, lambda tensor: tensor)
    for rank in ranks:
        for name in ("prototypes", "importance", "shares"):
            torch.testing.assert_close(rank[name], joined[name], rtol=1e-6, atol=1e-6)
    assert (joined["shares"] > 0).all()
    # Query numbers follow the joined shares too; a class that a process does not show sends none there.
    assert ranks[0]["queries"][3] == 0
    torch.testing.assert_close(ranks[0]["queries"][:3], joined["queries"][:3])
    torch.testing.assert_close(ranks[1]["queries"], joined["queries"])
    assert not torch.equal(ranks[0]["importance_mean"], ranks[0]["importance"])


LOCAL = ("--pull.sync_stats", "false", "--optim.max_grad_norm", "1")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes, each with its own statistics."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    assert train(folder, 2, *LOCAL)["num_processes"] == 2
    return folder


def assert_losses_close(one: Path, other: Path) -> None:
    """Terms averaged over processes, at every step."""
    for left, right in zip(scalars(one), scalars(other), strict=True):
        # Scores are counts of pixels: where two classes are nearly even, rounding decides.
        pair = [{k: v for k, v in line.items() if "/" not in k or k.startswith("proxy/")} for line in (left, right)]
        counted = [{k: line.pop(k) for k in list(line) if k == "proxy/source"} for line in pair]  # of pixels, too
        assert pair[0] == pytest.approx(pair[1], rel=1e-4, abs=1e-5)
        assert counted[0] == pytest.approx(counted[1], abs=2e-4)


def test_two_processes_equal_two_micro_batches_in_one_process(two: Path, tmp_path: Path) -> None:
    one = train(tmp_path / "one", 1, *LOCAL, "--train.micro_batches", "2")
    assert one["num_processes"] == 1
    assert_losses_close(two, tmp_path / "one")
    assert_weights_close(*(folder / "t2sda/student/model.safetensors" for folder in (two, tmp_path / "one")))


def test_parameters_without_a_gradient_neither_hang_nor_differ(tmp_path: Path) -> None:
    """A DINOv2 has a token of its pretraining that no forward reads."""
    write_encoder("dinov2", tmp_path / "encoder")
    sizes = (f"--model.{name}=null" for name in ("depths", "hidden_sizes", "num_attention_heads"))
    words = (*LOCAL, "--model.size=auto", *sizes)
    train(tmp_path / "two", 2, *words)
    train(tmp_path / "one", 1, *words, "--train.micro_batches=2")
    assert_losses_close(tmp_path / "two", tmp_path / "one")
    students = [tmp_path / name / "t2sda/student/model.safetensors" for name in ("two", "one")]
    assert_weights_close(*students)
    tokens = [load_file(path)["backbone.model.embeddings.mask_token"] for path in students]
    start = load_file(tmp_path / "encoder" / "model.safetensors")["embeddings.mask_token"]
    assert torch.equal(*tokens)
    assert (tokens[0] - start).abs().max() < 1e-4  # the weight decay alone


def assert_weights_close(one: Path, other: Path) -> None:
    weights = [load_file(path) for path in (one, other)]
    compared = 0
    for name, weight in weights[0].items():
        if "running" in name or "num_batches" in name:  # batch norm's memory: it hangs on the biases below
            continue
        # These only shift what a batch norm centres, so their gradient is 0 and Adam makes steps of its rounding error.
        if not re.search(r"linear_c\.\d\.proj\.bias|encoder\.layer_norm\.3\.bias|pyramid\.to(4\.4|8\.1)\.bias", name):
            torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared > 50


def test_a_sharded_run_equals_the_whole_one_and_goes_on_as_one(two: Path, tmp_path: Path) -> None:
    """FSDP2 by its launch file; on a CPU accelerate itself would drop it."""
    out = tmp_path / "sharded"
    launch_file = ("--accelerate_config", "fsdp2", "--mixed_precision", "no")
    train(out, 2, *LOCAL, "--train.save_every", "2", *launch_file)
    assert_losses_close(out, two)
    older, newest = (out / "t2sda" / f"checkpoint-00000{step}" for step in (2, 3))
    assert json.loads((newest / "state.json").read_text())["sharded"] is True
    for part in ("student", "teacher"):
        assert_weights_close(*(f / "t2sda" / newest.name / part / "model.safetensors" for f in (out, two)))
    mine, theirs = (load_file(f / "t2sda" / newest.name / "optimizer.safetensors") for f in (out, two))
    assert mine.keys() == theirs.keys()
    for name, moment in mine.items():
        torch.testing.assert_close(moment, theirs[name], rtol=0, atol=1e-6)

    # Its checkpoint holds whole tensors: the rest may run without shards.
    train(tmp_path / "branch", 2, *LOCAL, "--resume", str(older), "--allow_changes", "[sharded]")
    assert_weights_close(*(f / "t2sda/student/model.safetensors" for f in (tmp_path / "branch", two)))


def test_synchronised_runs_leave_equal_students_and_one_table(two: Path, tmp_path: Path) -> None:
    """With the statistics shared the run is another one, and it works; the first process writes, once."""
    synced = train(tmp_path / "synced", 2)
    assert synced["num_processes"] == 2
    assert scalars(tmp_path / "synced")[0]["source"] == scalars(two)[0]["source"]
    assert scalars(tmp_path / "synced")[0]["pull"] != scalars(two)[0]["pull"]
    assert [line["step"] for line in scalars(tmp_path / "synced")] == [1, 2, 3, 3]
    local = json.loads((two / "summary.json").read_text(encoding="utf-8"))
    assert set(synced["t2sda"]) == set(local["t2sda"]) == {"miou", "iou", "teacher_miou", "teacher_iou"}
