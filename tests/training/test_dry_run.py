"""A dry run finds what would fail late, says what the run costs, and leaves nothing behind."""

import errno
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from running import TINY_RUN, fork, undrawn, unpainted

from t2sda_hf.cli import main


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Of a healthy run in a folder of its own; the cache of `datasets` lies elsewhere."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    unpainted(monkeypatch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("t2sda_hf.hub.push.get_token", lambda: None)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "run.yaml").write_text(TINY_RUN, encoding="utf-8")
    return ["--config", "run.yaml", "--output_dir", "outputs/run", "--dry-run"]


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_it_prints_the_config_and_what_the_run_costs_and_leaves_nothing(arguments, tmp_path, capsys):
    before = tree(tmp_path / "work")
    extra = ["--baseline=source_only", "--train.max_steps=7000", "--train.evaluate_every=1000", "--pull.start_step=9"]
    assert main(["train", *arguments, *extra, "--train.log_with=[tensorboard]"]) == 0
    assert tree(tmp_path / "work") == before
    printed, _, said = capsys.readouterr().out.partition("dry run passed")
    resolved = yaml.safe_load(printed)
    assert (resolved["baseline"], resolved["train"]["max_steps"], resolved["pull"]["start_step"]) == (
        "source_only",
        7000,
        9,
    )
    times = [sum(60**power * int(part) for power, part in zip((2, 1, 0), clock.split(":"), strict=True))
             for clock in re.findall(r"about (\d+:\d+:\d+) h", said)]  # fmt: skip
    found = re.findall(r"= 7000 steps of ([\d.e-]+) s \+ 7 evaluations of (\d+) images, ([\d.e-]+) s each", said)
    for seconds, (step, images, image) in zip(times, found, strict=False):
        assert seconds == pytest.approx(7000 * float(step) + 7 * int(images) * float(image), rel=0.02, abs=1)
    assert [int(images) for _, images, _ in found] == [3 + 32, 2 * (3 + 32)]  # the student; student and teacher
    assert times[2] == pytest.approx(times[0] + times[1], abs=1)
    assert 0.1 < float(re.search(r"peak memory ([\d.]+) GiB", said)[1]) < 20


def cell(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def a_test_set(spoil=lambda images, labels: None, ids=(0, 2, 6)):
    rng = np.random.default_rng(0)
    images = [cell(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)) for _ in range(3)]
    labels = [cell(rng.choice(np.array(ids, np.uint8), (40, 64))) for _ in range(3)]
    spoil(images, labels)
    table = {"image": images, "label": labels}
    Dataset.from_dict(table, Features(dict.fromkeys(table, ImageFeature()))).to_parquet("test.parquet")
    return ["--test.path=test.parquet", "--test.split=train", "--test.num_images=null", "--test.label_space=cityscapes"]


def last_label(pixels):
    return a_test_set(lambda images, labels: labels.__setitem__(2, cell(pixels)))


def damaged_image():
    def spoil(images, labels):
        data = images[2]["bytes"]
        images[2]["bytes"] = data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]

    return a_test_set(spoil)


def not_a_folder():
    Path("outputs").write_text("a file")
    return []


def full_disk(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    return []


def failing_write(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("t2sda_hf.training.checkpoint.save_file", fail)
    return []


def with_token(monkeypatch, *keys):
    monkeypatch.setattr("t2sda_hf.hub.push.get_token", lambda: "a token")
    return ["--push_to_hub.repo_id=me/model", *keys]


SLIDE = ["--evaluation.mode=slide", "--evaluation.window=[32, 32]"]
FAULTS = {  # what is planted: (how, what is said)
    "no such test set": (lambda _: ["--test.path=gone"], "there is no domain 'gone'"),
    "no such split of the test set": (lambda _: ["--test.split=val"], "Unknown split 'val'"),
    "an id in the last label map": (
        lambda _: last_label(np.full((40, 64), 77, np.uint8)),
        r"row 2 .*contains the ids 77",
    ),
    "size of the last label map": (
        lambda _: last_label(np.zeros((40, 60), np.uint8)),
        "row 2 .*its label map 60x40",
    ),
    "one wrong bit in the last test image": (lambda _: damaged_image(), "row 2 .*cut or damaged"),
    "a test set of one class": (lambda _: a_test_set(ids=(6,)), "shows none of|shows only the class"),
    "names that the test set does not have": (
        lambda _: ["--test.label_map={rode: road}"],
        "label_map names 'rode'.*Did you mean 'road'",
    ),
    "classes that nobody has": (lambda _: ["--classes=[rood, skie]"], "no class is shared"),
    "an output folder below a file": (lambda _: not_a_folder(), "output_dir .* cannot be written"),
    "a disk too small for the checkpoints": (full_disk, "checkpoints of this run take up to .* MB are free"),
    "a checkpoint that cannot be written": (failing_write, "could not be written.*No space left"),
    "windows that leave gaps": (
        lambda _: [*SLIDE, "--evaluation.stride=[64, 64]"],
        "stride must be at most evaluation.window",
    ),
    "a learning rate that ends in NaN": (lambda _: ["--optim.lr=1e38"], "not finite|is nan|is inf"),
    "no token": (lambda _: ["--push_to_hub.repo_id=me/model"], "no token of the Hub was found"),
    "no licence": (
        lambda m: with_token(m, "--baseline=source_only", "--test.path=test.parquet", *a_test_set()),
        "terms|licen",
    ),
    "nothing to compare with on the card": (lambda m: with_token(m), "compares with a source-only run"),
    "no style images": (
        lambda _: ["--translate.engine=style", "--translate.style.styles=[fda]", "--translate.style.images=gone"],
        "gone",
    ),
    "no such encoder": (lambda _: ["--model.pretrained=./no/such/gone"], "gone"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_late_is_found(fault, arguments, tmp_path, capsys, monkeypatch):
    plant, message = FAULTS[fault]
    planted = plant(monkeypatch)
    before = tree(tmp_path / "work")
    assert main(["train", *arguments, *planted]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"ValueError: .*({message})", said), said
    assert tree(tmp_path / "work") == before


def test_a_folder_in_use_is_no_reason_not_to_rehearse(arguments, tmp_path, capsys):
    """Nothing is written there; what the run itself would say is said."""
    Path("outputs/run").mkdir(parents=True)
    Path("outputs/run/notes.txt").write_text("mine")
    before = tree(tmp_path / "work")
    assert main(["train", *arguments, "--method=source_only", "--evaluation.source_images=0"]) == 0
    assert tree(tmp_path / "work") == before
    assert "but the run itself would be refused now: output_dir 'outputs/run' exists" in capsys.readouterr().out


@pytest.mark.two_processes
def test_two_processes(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(TINY_RUN, encoding="utf-8")
    out = tmp_path / "out"
    words = ("train", "--config", str(config), "--output_dir", str(out), "--dry-run")
    printed = fork(2, "-m", "t2sda_hf", *words)
    assert printed.count("dry run passed") == 1
    assert tree(tmp_path) == ["run.yaml"]


def test_one_batch_is_learned_by_heart(arguments, monkeypatch):
    """The loss of the source falls to a small part, which it does not with a new batch every time."""
    undrawn(monkeypatch)

    def losses(*extra):
        out = Path("outputs") / str(len(extra))
        keys = ["--method=source_only", "--train.max_steps=60", "--train.evaluate_every=100", "--optim.lr=0.003"]
        keys += [*extra, f"--output_dir={out}", "--data.cat_max_ratio=1", "--evaluation.source_images=0"]
        assert main(["train", *arguments[:2], *keys]) == 0
        lines = (out / "source_only" / "scalars.jsonl").read_text().splitlines()
        return [json.loads(line)["source"] for line in lines if "source" in json.loads(line)]

    learned = losses("--overfit-batch")
    assert np.mean(learned[-5:]) < 0.25 * learned[0]
    assert np.mean(learned[-5:]) < 0.7 * np.mean(losses()[-5:])
