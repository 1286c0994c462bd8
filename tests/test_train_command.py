"""t2sda train as a user meets it: one run end to end, and every mistake before the first step."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from running import ROOT, TINY_RUN, launch, undrawn
from transformers import AutoModelForSemanticSegmentation

from t2sda_hf.cli import main
from t2sda_hf.commands.train import explained
from t2sda_hf.config import load_config
from t2sda_hf.errors import CheckpointError, DamagedCheckpoint, NotFinite, RunFailed
from t2sda_hf.training.build import workers_that_fit

CLASSES = ["road", "sky", "car"]


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_domain(path: Path, images: list, labels: list | None, columns: tuple[str, str] = ("image", "label")) -> str:
    table = {columns[0]: images} | ({columns[1]: labels} if labels is not None else {})
    Dataset.from_dict(table).to_parquet(path)
    return str(path)


def noise(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(height: int = 64, width: int = 96, values: tuple[int, ...] = (0, 10, 13)) -> np.ndarray:
    return np.random.default_rng(1).choice(np.array(values, np.uint8), (height, width))


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    """Arguments of a run on three healthy parquet files."""
    config = tmp_path / "run.yaml"
    replaced = ("classes:", "source:", "target:", "test:")
    kept = [line for line in TINY_RUN.splitlines() if not line.startswith(replaced)]
    config.write_text("\n".join([*kept, f"classes: {json.dumps(CLASSES)}\n"]), encoding="utf-8")
    images, labels = [png(noise(seed=i)) for i in range(2)], [png(ids()) for _ in range(2)]
    source = write_domain(tmp_path / "source.parquet", images, labels)
    target = write_domain(tmp_path / "target.parquet", images, None)
    test = write_domain(tmp_path / "test.parquet", images, labels)
    where = ["--source.path", source, "--target.path", target, "--test.path", test, "--test.split", "train"]
    where += ["--source.label_space", "cityscapes", "--test.label_space", "cityscapes"]
    return ["--config", str(config), "--output_dir", str(tmp_path / "out"), *where]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run that must stop before its first step, leaving no output folder."""
    out = Path(arguments[arguments.index("--output_dir") + 1])
    before = sorted(out.rglob("*")) if out.exists() else None
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("ValueError: ")
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return message


def test_a_run_end_to_end(tmp_path: Path) -> None:
    """By the script of a checkout under `accelerate launch`; all else in these tests is the command."""
    (tmp_path / "tiny.yaml").write_text(TINY_RUN, encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--output_dir", str(out), "--baseline", "source_only"]
    arguments += ["--seed", "3", "--train.log_with", "[tensorboard]", "--train.save_every", "2"]
    arguments += ["--push_to_hub.picture", "predictions"]
    printed = launch(1, "scripts/train_uda.py", *arguments)

    command = json.loads((out / "run.json").read_text(encoding="utf-8"))["command"]
    assert command.startswith("OMP_NUM_THREADS=1 accelerate launch scripts/train_uda.py --config ")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["seed"] == 3
    assert summary["gain"] == pytest.approx(summary["t2sda"]["miou"] - summary["source_only"]["miou"])
    assert set(summary["t2sda"]) == {"miou", "iou", "teacher_miou", "teacher_iou"}
    scored = [iou for iou in summary["t2sda"]["iou"] if iou is not None]
    assert summary["t2sda"]["miou"] == pytest.approx(np.mean(scored))
    assert f"{summary['t2sda']['miou']:.2f}" in printed
    assert "| mIoU" in printed

    with Image.open(out / "panel.png") as panel, Image.open(out / "panel_narrow.png") as narrow:
        assert narrow.width < panel.width / 2 < narrow.height  # two pictures beside each other, for a phone
    with Image.open(out / "panel.png") as panel, Image.open(out / "predictions.png") as predictions:
        assert min(panel.size) > 200
        assert predictions.width == pytest.approx(panel.width * 2 / 5, rel=0.1)  # no images, truth and errors
    for name in ("source_only", "t2sda"):
        assert list((out / name).glob("**/events.out.tfevents*")), "no TensorBoard events"
        assert load_config(str(out / name / "resolved_config.yaml")).seed == 3
        lines = [json.loads(line) for line in (out / name / "scalars.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 3]  # the last: evaluation
    assert {"source", "target", "pull", "trust", "lr", "data_share"} <= set(lines[0])
    assert (out / "t2sda" / "checkpoint-000002" / "student" / "model.safetensors").is_file()
    # What was saved is a model for anybody, and scores what the summary says.
    model = AutoModelForSemanticSegmentation.from_pretrained(out / "t2sda" / "student")
    assert model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 10, 16, 16)
    evaluate = ["evaluate", str(out / "t2sda" / "student"), "--domain", "streets-target", "--limit", "3"]
    assert main([*evaluate, "--output", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["miou"] == pytest.approx(summary["t2sda"]["miou"], abs=1e-9)


def test_odd_names_and_scores_of_nothing_end_no_run(tmp_path: Path) -> None:
    """Names are text everywhere, also where nothing but ASCII can be printed; nothing is labelled in the one test image
    that is looked at."""
    names = ["$\\frac$", "straße", "x" * 250]
    images = [png(noise(seed=index)) for index in range(2)]
    labels = [png(ids(values=(0, 1, 2))), png(np.full((64, 96), 255, np.uint8))]
    meaning = {"class_names": names, "split": "train"}
    config = {
        "classes": names,
        "source": {"path": write_domain(tmp_path / "source.parquet", images, [labels[0]] * 2)} | meaning,
        "target": {"path": write_domain(tmp_path / "target.parquet", images, None)},
        "test": {"path": write_domain(tmp_path / "test.parquet", images, labels[::-1])} | meaning,
        "evaluation": {"limit": 1},
    }
    kept = [line for line in TINY_RUN.splitlines() if not line.startswith(("classes:", "source:", "target:", "test:"))]
    text = "\n".join([*kept, *(f"{key}: {json.dumps(value)}" for key, value in config.items())])
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(out), "--baseline", "source_only"]
    old = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [
        sys.executable,
        "-m",
        "t2sda_hf",
        *words,
        "--train.log_with",
        "[tensorboard]",
        "--train.max_steps",
        "1",
        "--cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | old, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "stra\\xdfe" in done.stdout
    assert re.search(r"\| mIoU +\| +- \|", done.stdout)
    assert "differs by - mIoU from source_only" in done.stdout
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["gain"] is None
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "straße" in page
    assert "$\\frac$" in page


@pytest.mark.parametrize(("precision", "torchs"), [("float32", "highest"), ("tf32", "high")])
def test_the_precision_of_products_on_a_gpu_is_the_configs(good, capsys, precision: str, torchs: str):
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    try:
        refused([*good, f"--train.precision={precision}", "--source.path=nowhere"], capsys)
        assert torch.get_float32_matmul_precision() == torchs
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    finally:
        for owner, allowed in zip(owners, before, strict=True):
            owner.allow_tf32 = allowed


def test_equal_seeds_give_equal_runs_and_others_do_not(
    tmp_path: Path, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    written = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = [*good, "--seed", seed]
        arguments[arguments.index("--output_dir") + 1] = str(tmp_path / name)
        assert main(["train", *arguments]) == 0
        written.append((tmp_path / name / "t2sda" / "student" / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_the_upper_bound_learns_the_labels_of_the_target_and_reads_no_source(
    tmp_path: Path, good: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It is source_only with the target in the source's place, to the last bit."""
    target = write_domain(tmp_path / "labelled.parquet", [png(noise(seed=i)) for i in (7, 8)], [png(ids())] * 2)
    out, twin = tmp_path / "out", tmp_path / "twin"
    caplog.set_level("INFO")
    bound = ["--method=target_only", "--source.path=nowhere", f"--target.path={target}"]
    assert main(["train", *good, *bound, "--target.label_space=cityscapes"]) == 0
    assert "are test images, too" not in caplog.text
    assert "target does not say how its labels are read" not in caplog.text
    shown = json.loads((out / "data.json").read_text(encoding="utf-8"))
    assert shown["domains"].keys() == {"target", "test"}
    assert shown["source_pixels"] == [2 * int((ids() == value).sum()) for value in (0, 10, 13)]
    record = json.loads((out / "target_only" / "checkpoint-000003" / "state.json").read_text(encoding="utf-8"))
    assert record["inputs"].keys() == {"target_data"}
    assert (record["source_data"], bool(record["target_data"])) == (None, True)
    assert main(["train", *good, *bound, "--target.label_space=cityscapes", "--resume=auto"]) == 0

    swapped = ["--method=source_only", f"--source.path={target}", "--output_dir", str(twin)]
    assert main(["train", *good, *swapped]) == 0
    models = [folder / "student" / "model.safetensors" for folder in (out / "target_only", twin / "source_only")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_labels_of_a_target_are_read_as_it_says_or_else_as_the_test_of_the_same_place(
    tmp_path: Path, good: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    own = [*good, "--method=target_only", "--train.max_steps=1"]
    assert "upper" not in refused([*own, "--baseline=source_only"], capsys)
    assert "target.parquet (train) has no column 'label'" in refused(own, capsys)
    other = write_domain(tmp_path / "other.parquet", [png(noise(seed=7))], [png(ids())])
    assert "nothing says what the ids in the label maps mean" in refused([*own, f"--target.path={other}"], capsys)
    assert main(["train", *own, f"--target.path={tmp_path / 'test.parquet'}"]) == 0
    assert "target does not say how its labels are read, so they are read as those of test" in caplog.text
    assert "warning: 2 of the images that are learned with their labels are test images, too" in caplog.text


@pytest.mark.parametrize("method", ["t2sda", "source_only"])
def test_no_other_method_reads_labels_of_the_target(tmp_path: Path, good: list[str], method: str) -> None:
    """Label maps that are none, in a column that target describes, disturb nobody."""
    images, labels = [png(noise(seed=i)) for i in (7, 8)], [{"bytes": b"no picture", "path": None}] * 2
    target = write_domain(tmp_path / "labelled.parquet", images, labels)
    more = [f"--target.path={target}", "--target.label_space=cityscapes", "--train.max_steps=1"]
    assert main(["train", *good, *more, f"--method={method}"]) == 0
    assert main(["train", *good, *more, "--method=target_only", "--output_dir", str(tmp_path / "bound")]) == 2


def test_an_existing_folder_is_not_overwritten(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(good[good.index("--output_dir") + 1])
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "exists and is not empty" in refused(good, capsys)
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("name", ["data.json", "run.json", "t2sda/scalars.jsonl", "t2sda_hf/cli.py"])
def test_a_folder_of_somebody_else_is_no_run_to_go_on_with(
    good: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its files are called: a folder called t2sda, too."""
    file = Path(good[good.index("--output_dir") + 1]) / name
    file.parent.mkdir(parents=True)
    file.write_text('{"my": "work"}', encoding="utf-8")
    assert "is not empty and holds no run of this config" in refused([*good, "--resume", "auto"], capsys)
    assert file.read_text(encoding="utf-8") == '{"my": "work"}'


def test_a_run_that_ended_before_it_trained_is_begun_again(good: list[str]) -> None:
    out = Path(good[good.index("--output_dir") + 1])
    (out / "t2sda").mkdir(parents=True)
    (out / "run.json").write_text('{"command": "t2sda train', encoding="utf-8")
    assert main(["train", *good, "--resume", "auto", "--train.max_steps=1"]) == 0


def test_a_run_does_not_write_among_its_own_data(
    tmp_path: Path, good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.png").write_bytes(png(noise(seed=number))["bytes"])
    good[good.index("--target.path") + 1] = str(photos)
    good[good.index("--output_dir") + 1] = str(photos / "out")
    said = f"out lies in {photos}, which is read as data: pass another --output_dir."
    assert refused(good, capsys).endswith(said)
    (photos / "out").mkdir()  # of somebody else, or still empty
    assert refused(good, capsys).endswith(said)


def test_help_and_no_arguments_explain(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["train", "--help"]):
        assert main(words) == 0
        assert "t2sda train --config demo" in capsys.readouterr().out
    script = subprocess.run([sys.executable, "scripts/train_uda.py"], cwd=ROOT, capture_output=True, text=True)
    assert (script.returncode, script.stderr) == (0, "")
    assert "t2sda train --config demo" in script.stdout
    assert main(["train"]) == 2
    assert "there is nothing to train: give --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optim.warmup", "1"], ["optim.warmup", "optim.warmup_steps"]),
        (["--optim.lr", "fast"], ["lr", "fast"]),
        (["--method", "t2sd"], ["method", "t2sd"]),
        (["--loss_weights.feature_distance", "0.005"], ["loss_weights.feature_distance", "model.pretrained"]),
        (["--train.max_steps", "0"], ["train.max_steps", "in [1, "]),
        (["--source.path", "nowhere.parquet"], ["nowhere.parquet"]),
        (["--source.path", "streets-sorce"], ["streets-source"]),
        (["--target.image_column", "photo"], ["target.parquet", "photo", "image_column"]),
        (["--source.label_column", "mask"], ["source.parquet", "mask", "label_column"]),
        (["--test.label_map", "{car: tank}"], ["test.parquet", "tank"]),
        (["--model.pretrained", "no/such/folder"], ["no/such/folder"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_key_or_path_is_refused(
    good: list[str], arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "--config":
        good = good[2:]
    message = refused([*good, *arguments], capsys)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("domain", ["source", "test"])
@pytest.mark.parametrize(
    ("images", "labels", "parts"),
    [
        ([png(noise())], [png(ids(values=(0, 10, 77)))], ["row 0", "77", "label_space"]),
        ([png(noise())] * 2, [png(ids()), png(ids(32, 96))], ["row 1", "96x64", "96x32"]),
        ([png(noise())], [png(ids(values=(0,)))], ["only the class road"]),
        ([png(noise())], [png(ids(values=(5, 255)))], ["none of the classes"]),
        ([{"bytes": b"not a picture", "path": None}], [png(ids())], ["row 0", "cannot be read"]),
        ([png(noise())], [png(noise())], ["row 0", "label_colors"]),
        ([png(noise()), None], [png(ids())] * 2, ["row 1", "empty"]),
    ],
    ids=["unknown id", "sizes differ", "one class", "no class", "not an image", "colours as labels", "no file"],
)
def test_bad_data_is_refused(
    tmp_path: Path,
    good: list[str],
    domain: str,
    images: list,
    labels: list,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_domain(tmp_path / "bad.parquet", images, labels)
    message = refused([*good, f"--{domain}.path", path, f"--{domain}.split", "train"], capsys)
    for part in ["bad.parquet", *parts]:
        assert part in message


def test_an_empty_domain_is_refused(tmp_path: Path, good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    full = Dataset.from_dict({"image": [png(noise())], "label": [png(ids())]})
    full.select([]).to_parquet(tmp_path / "empty.parquet")
    message = refused([*good, "--source.path", str(tmp_path / "empty.parquet")], capsys)
    assert "empty.parquet" in message


def test_a_launch_of_two_that_makes_two_of_one_is_refused(good, capsys, monkeypatch) -> None:
    """As when torch sees none of the GPUs that it was launched for."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched, but accelerate makes a run of 1 of each" in refused(good, capsys)


def test_no_more_workers_than_shared_memory_holds(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """A full /dev/shm loses batches, and the run would wait for them for ever; a container has 64 MB of it."""
    cfg = load_config(None, ["--data.num_workers=8", "--data.crop_size=[512, 512]", "--train.batch_size=2"])
    cfg = replace(cfg, data=replace(cfg.data, outer_crop_size=(512, 1024)))
    free = [64_000_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    assert workers_that_fit(cfg, 1) == 1
    assert "/dev/shm has 64 MB free, and 8 data workers would hand over up to 223 MB there: 1 of them" in caplog.text
    assert workers_that_fit(cfg, 2) == 0
    free[0] = 1_000_000_000
    assert workers_that_fit(cfg, 2) == 8


def test_an_encoder_of_another_size_is_refused(
    tmp_path: Path, good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import SegformerConfig, SegformerModel

    SegformerModel(
        SegformerConfig(depths=[1] * 4, hidden_sizes=[4, 4, 4, 4], num_attention_heads=[1] * 4)
    ).save_pretrained(tmp_path / "encoder")
    assert "hidden_sizes" in refused([*good, "--model.pretrained", str(tmp_path / "encoder")], capsys)


def test_a_fault_that_shows_in_the_middle_of_a_run_is_not_of_the_input(tmp_path: Path) -> None:
    """A ValueError before the first step is the user's; later the run has failed, and what is left is said."""
    accelerator = Accelerator(cpu=True)
    with (
        pytest.raises(RunFailed, match=r"in the middle of the run: shapes differ No checkpoint was written") as caught,
        explained(accelerator, tmp_path),
    ):
        raise ValueError("shapes differ")
    assert isinstance(caught.value.__cause__, ValueError)
    for known in (DamagedCheckpoint("cut"), NotFinite("loss"), CheckpointError("disk")):
        with pytest.raises(type(known)), explained(accelerator, tmp_path):
            raise known


def test_the_line_at_the_end_says_what_is_there(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(RunFailed) as failed, explained(Accelerator(cpu=True), tmp_path):
            raise OSError("no space left")
        return str(failed.value)

    (tmp_path / "t2sda").mkdir()
    assert said() == (
        "OSError: no space left. No checkpoint was written; the same command with --resume auto starts from the "
        "beginning."
    )
    (tmp_path / "source_only" / "checkpoint-000012").mkdir(parents=True)
    assert said().endswith("The newest checkpoint is source_only/checkpoint-000012; go on with --resume auto.")
    (tmp_path / "t2sda" / "checkpoint-000003").mkdir()
    assert said().endswith("The newest checkpoint is t2sda/checkpoint-000003; go on with --resume auto.")
