"""Small files as the public data sets have them, byte for byte in format, through `t2sda prepare`."""

import io
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from t2sda_hf.cli import main
from t2sda_hf.config import DomainConfig
from t2sda_hf.data import preparing
from t2sda_hf.data.domains import check_domain, load_domain
from t2sda_hf.data.layouts import LAYOUTS, find_files
from t2sda_hf.data.transforms import resize_image, resize_labels
from t2sda_hf.labels import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, LABEL_SPACES

# The table of the specification: class, id in Cityscapes and GTA5, id in SYNTHIA.
TABLE = [
    ("road", 7, 3), ("sidewalk", 8, 4), ("building", 11, 2), ("wall", 12, 21), ("fence", 13, 5), ("pole", 17, 7),
    ("traffic light", 19, 15), ("traffic sign", 20, 9), ("vegetation", 21, 6), ("terrain", 22, 16), ("sky", 23, 1),
    ("person", 24, 10), ("rider", 25, 17), ("car", 26, 8), ("truck", 27, 18), ("bus", 28, 19), ("train", 31, 20),
    ("motorcycle", 32, 12), ("bicycle", 33, 11),
]  # fmt: skip
SIZE = (40, 80)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def ids_on_disk(highest, seed, size=SIZE):
    """Blocks of 5 pixels; every id from 0 to `highest`, in another order for every seed."""
    cells = np.random.default_rng(seed).permutation(np.arange(size[0] // 5 * size[1] // 5) % (highest + 1))
    blocks = cells.reshape(size[0] // 5, size[1] // 5)
    return blocks.repeat(5, 0).repeat(5, 1).astype(np.uint8)


def save(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def train_ids(ids, column):
    table = np.full(256, 255, np.uint8)
    for train_id, row in enumerate(TABLE):
        table[row[column]] = train_id
    return table[ids]


def gta5(root, count=5):
    """Palette PNG with the indices 0..34 and the colours of Cityscapes."""
    palette = np.zeros((256, 3), np.uint8)
    for name, label_id, _ in TABLE:
        palette[label_id] = CITYSCAPES_COLORS[name]
    expected = []
    for number in range(1, count + 1):
        size = (40, 75) if number == 2 else SIZE  # some of GTA5's images are smaller
        ids = ids_on_disk(34, number, size)
        save(root / "images" / f"{number:05d}.png", picture(number, size))
        save(root / "labels" / f"{number:05d}.png", ids, palette.tobytes())
        expected.append((f"images/{number:05d}.png", picture(number, size), train_ids(ids, 1)))
    return {"train": expected}


def synthia(root, count=3):
    """16-bit PNG with three channels: class, instance, nothing."""
    expected = []
    for number in range(count):
        ids = ids_on_disk(22, number)
        instances = np.random.default_rng(number).integers(0, 60_000, SIZE, dtype=np.uint16)
        name = f"{number:07d}.png"
        save(root / "RGB" / name, picture(number))
        (root / "GT" / "LABELS").mkdir(parents=True, exist_ok=True)
        blue_green_red = np.dstack([np.zeros_like(instances), instances, ids.astype(np.uint16)])
        cv2.imwrite(str(root / "GT" / "LABELS" / name), blue_green_red)
        expected.append((f"RGB/{name}", picture(number), train_ids(ids, 2)))
    return {"train": expected}


def cityscapes(root, count=2, kind="labelIds"):
    """leftImg8bit and gtFine with folders of cities."""
    expected = {"train": [], "validation": []}
    for split, word in (("train", "train"), ("validation", "val")):
        for city in ("aachen", "zürich"):
            for number in range(count):
                seed = 100 * len(split) + 10 * len(city) + number
                ids = ids_on_disk(33, seed)
                stem = f"{city}_{number:06d}_000019"
                save(root / "leftImg8bit" / word / city / f"{stem}_leftImg8bit.png", picture(seed))
                labels = ids if kind == "labelIds" else train_ids(ids, 1)
                save(root / "gtFine" / word / city / f"{stem}_gtFine_{kind}.png", labels)
                save(root / "gtFine" / word / city / f"{stem}_gtFine_color.png", picture(0))
                name = f"leftImg8bit/{word}/{city}/{stem}_leftImg8bit.png"
                expected[split].append((name, picture(seed), train_ids(ids, 1)))
    return expected


def acdc(root):
    expected = {"train": [], "validation": []}
    for split, word in (("train", "train"), ("validation", "val")):
        for number, condition in enumerate(("fog", "night", "rain", "snow")):
            seed = 10 * len(split) + number
            folder = Path(condition) / word / "GOPR0475"
            labels = train_ids(ids_on_disk(33, seed), 1)
            save(root / "rgb_anon" / folder / "GOPR0475_frame_000041_rgb_anon.png", picture(seed))
            save(root / "gt" / folder / "GOPR0475_frame_000041_gt_labelTrainIds.png", labels)
            name = f"rgb_anon/{folder}/GOPR0475_frame_000041_rgb_anon.png"
            expected[split].append((name, picture(seed), labels))
    return expected


def dark_zurich(root):
    labels = train_ids(ids_on_disk(33, 1), 1)
    folder = Path("val") / "night" / "GOPR0356"
    save(root / "rgb_anon" / folder / "GOPR0356_frame_000321_rgb_anon.png", picture(1))
    save(root / "gt" / folder / "GOPR0356_frame_000321_gt_labelTrainIds.png", labels)
    return {"validation": [(f"rgb_anon/{folder}/GOPR0356_frame_000321_rgb_anon.png", picture(1), labels)]}


def jpeg_of(path, seed):
    save(path, picture(seed))
    return np.array(Image.open(path))


def bdd100k(root):
    expected = {}
    for seed, (split, word) in enumerate((("train", "train"), ("validation", "val"))):
        labels = train_ids(ids_on_disk(33, seed), 1)
        image = jpeg_of(root / "images" / "10k" / word / "0000f77c.jpg", seed)
        save(root / "labels" / "sem_seg" / "masks" / word / "0000f77c.png", labels)
        expected[split] = [(f"images/10k/{word}/0000f77c.jpg", image, labels)]
    return expected


def mapillary(root):
    """Palette PNG of Vistas 1.2, 66 ids."""
    expected = {}
    for seed, (split, word) in enumerate((("train", "training"), ("validation", "validation"))):
        ids = ids_on_disk(65, seed)
        image = jpeg_of(root / word / "images" / "abc.jpg", seed)
        save(root / word / "labels" / "abc.png", ids, bytes(range(256)) * 3)
        table = np.full(256, 255, np.uint8)
        table[[13, 24, 41]], table[[2, 15]], table[[45, 47]], table[[20, 21, 22]] = 0, 1, 5, 12
        table[[17, 6, 3, 48, 50, 30, 29, 27, 19]] = [2, 3, 4, 6, 7, 8, 9, 10, 11]
        table[[55, 61, 54, 58, 57, 52]] = [13, 14, 15, 16, 17, 18]
        expected[split] = [(f"{word}/images/abc.jpg", image, table[ids])]
    return expected


def camvid(root):
    expected = {}
    for seed, (split, word) in enumerate((("train", "train"), ("validation", "val"), ("test", "test"))):
        ids = ids_on_disk(11, seed)
        save(root / word / "0001TP_006690.png", picture(seed))
        save(root / f"{word}annot" / "0001TP_006690.png", ids)
        expected[split] = [(f"{word}/0001TP_006690.png", picture(seed), np.where(ids == 11, 255, ids))]
    return expected


def idd_lite(root):
    expected = {}
    for seed, (split, word) in enumerate((("train", "train"), ("validation", "val"))):
        ids = ids_on_disk(6, seed)
        ids[:5, :5] = 255
        image = jpeg_of(root / "leftImg8bit" / word / "12" / "024541_image.jpg", seed)
        save(root / "gtFine" / word / "12" / "024541_label.png", ids)
        expected[split] = [(f"leftImg8bit/{word}/12/024541_image.jpg", image, ids)]
    return expected


MAKERS = {
    "gta5": gta5, "synthia": synthia, "cityscapes": cityscapes, "acdc": acdc, "dark_zurich": dark_zurich,
    "bdd100k": bdd100k, "mapillary": mapillary, "camvid": camvid, "idd_lite": idd_lite,
}  # fmt: skip


def run(name, root, output, *options):
    arguments = [name, "--root", str(root), "--output", str(output), "--incomplete", "--processes", "1", *options]
    return main(["prepare", *arguments])


@pytest.mark.parametrize("name", LAYOUTS)
def test_prepared_and_raw_downloads_give_the_same_exact_arrays(name, tmp_path):
    expected = MAKERS[name](tmp_path / "raw")
    assert run(name, tmp_path / "raw", tmp_path / "out", "--splits", *expected) == 0
    space = LAYOUTS[name].space
    classes = tuple(label for label in LABEL_SPACES[space] if label != "void")
    for split, rows in expected.items():
        prepared = load_domain(DomainConfig(path=str(tmp_path / "out"), split=split, label_space=space), classes)
        raw = load_domain(DomainConfig(path=str(tmp_path / "raw"), split=split, layout=name), classes)
        assert len(prepared) == len(raw) == len(rows)
        assert list(prepared.table["file_name"]) == [file for file, _, _ in rows]
        for domain in (prepared, raw):
            counts = check_domain(domain, classes)
            for index, (_, image, labels) in enumerate(rows):
                assert np.array_equal(domain.image(index), image)
                assert np.array_equal(domain.labels(index), labels)
                assert counts[index].tolist() == np.bincount(labels.ravel(), minlength=256)[: len(classes)].tolist()


def test_every_class_of_the_table_is_in_the_label_spaces():
    for column, space in ((1, "gta5"), (1, "cityscapes_ids"), (2, "synthia")):
        names = LABEL_SPACES[space]
        assert {names[row[column]]: row[0] for row in TABLE} == {row[0]: row[0] for row in TABLE}
        assert sum(name != "void" for name in names) == 19
    assert tuple(row[0] for row in TABLE) == CITYSCAPES_CLASSES


def test_a_prepared_file_is_the_original_or_a_grey_png(tmp_path):
    gta5(tmp_path / "raw")
    run("gta5", tmp_path / "raw", tmp_path / "out")
    rows = load_dataset(str(tmp_path / "out"), "train", split="train")
    assert str(rows.features["label"]) == "Image(mode='L', decode=True)"
    raw = load_domain(DomainConfig(path=str(tmp_path / "out"))).rows[0]
    assert raw["image"]["bytes"] == (tmp_path / "raw" / "images" / "00001.png").read_bytes()
    assert Image.open(io.BytesIO(raw["label"]["bytes"])).mode == "L"


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_a_smaller_copy_gives_the_pixels_of_resizing_and_the_counts_of_the_original(encoding, tmp_path):
    expected = gta5(tmp_path / "raw")["train"]
    assert run("gta5", tmp_path / "raw", tmp_path / "out", "--size", "24", "40", "--encoding", encoding) == 0
    resize = {"resize": (24, 40)}
    small = load_domain(DomainConfig(path=str(tmp_path / "out"), **resize))
    counts = check_domain(small, CITYSCAPES_CLASSES)
    for index, (_, image, labels) in enumerate(expected):
        size = (21, 40) if index == 1 else (20, 40)  # 40x75 and 40x80 by the keep-ratio rule
        assert small.image(index).shape[:2] == size
        assert np.array_equal(small.resized_image(index), resize_image(image, size))
        assert np.array_equal(small.labels(index), resize_labels(labels, size))
        assert counts[index].tolist() == np.bincount(labels.ravel(), minlength=256)[:19].tolist()


def test_hidden_files_of_macos_are_no_images_of_a_layout(tmp_path):
    MAKERS["gta5"](tmp_path)
    before = find_files("gta5", str(tmp_path), "train", False)
    (tmp_path / "images" / "._00001.png").write_bytes(b"\0\5\26\7")
    assert find_files("gta5", str(tmp_path), "train", False) == before


def test_rgb_copies_of_gta5_are_read_by_colour_and_say_so_once(tmp_path, caplog):
    palette = np.zeros((256, 3), np.uint8)
    for name, label_id, _ in TABLE:
        palette[label_id] = CITYSCAPES_COLORS[name]
    palette[18], palette[34], palette[4] = (153, 153, 153), (0, 0, 142), (20, 20, 20)  # polegroup, plate, static
    ids = ids_on_disk(34, 0)
    ids[np.isin(ids, [5, 6, 9, 10, 14, 15, 16, 29, 30])] = 0
    save(tmp_path / "raw" / "images" / "1.png", picture(0))
    save(tmp_path / "raw" / "labels" / "1.png", palette[ids])
    assert run("gta5", tmp_path / "raw", tmp_path / "out") == 0
    expected = train_ids(ids, 1)
    expected[ids == 18], expected[ids == 34] = 5, 13
    assert np.array_equal(load_domain(str(tmp_path / "out")).labels(0), expected)


def test_cityscapes_train_needs_no_labels_and_train_ids_do(tmp_path):
    expected = cityscapes(tmp_path / "raw", kind="labelTrainIds")
    for file in (tmp_path / "raw" / "gtFine" / "train").rglob("*.png"):
        file.unlink()
    assert run("cityscapes", tmp_path / "raw", tmp_path / "out", "--unlabelled", "train") == 0
    target = load_domain(str(tmp_path / "out"), labelled=False)
    assert np.array_equal(target.image(3), expected["train"][3][1])
    test = load_domain(DomainConfig(path=str(tmp_path / "out"), split="validation"))
    assert np.array_equal(test.labels(3), expected["validation"][3][2])
    with pytest.raises(ValueError, match="has no column 'label'"):
        load_domain(str(tmp_path / "out"))


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    gta5(tmp_path / "raw", count=7)
    monkeypatch.setattr(preparing, "ROWS_PER_SHARD", 2)
    run("gta5", tmp_path / "raw", tmp_path / "whole")
    broken = (tmp_path / "raw" / "labels" / "00005.png").read_bytes()
    (tmp_path / "raw" / "labels" / "00005.png").write_bytes(broken[:100])
    assert run("gta5", tmp_path / "raw", tmp_path / "out") == 2  # dies in the third of four shards
    done = sorted((tmp_path / "out").glob("*.parquet"))
    assert [file.name for file in done] == ["train-00000-of-00004.parquet", "train-00001-of-00004.parquet"]
    times = [file.stat().st_mtime_ns for file in done]
    (tmp_path / "raw" / "labels" / "00005.png").write_bytes(broken)
    assert run("gta5", tmp_path / "raw", tmp_path / "out") == 0
    assert [file.stat().st_mtime_ns for file in done] == times
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes() or file.name == ".train.json"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}


def test_several_processes_write_what_one_writes(tmp_path, monkeypatch):
    synthia(tmp_path / "raw")
    run("synthia", tmp_path / "raw", tmp_path / "one")
    preparing.prepare_layout("synthia", str(tmp_path / "raw"), tmp_path / "two", incomplete=True, num_processes=2)
    for file in (tmp_path / "one").glob("*.parquet"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def spoil(root, fault):
    label = root / "labels" / "00003.png"
    if fault == "size":
        save(label, ids_on_disk(34, 0, (40, 70)))
    elif fault == "id":
        save(label, ids_on_disk(35, 0))
    elif fault == "image":
        (root / "images" / "00003.png").write_bytes(b"nothing")
    elif fault == "cut image":
        image = root / "images" / "00003.png"
        image.write_bytes(image.read_bytes()[:-200])
    elif fault == "label":
        label.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("size", r"row 2 \(images/00003.png\).*the image has 80x40 pixels, its label map 70x40"),
        ("id", r"row 2 \(images/00003.png\).*contains the ids 35"),
        ("image", r"row 2 \(images/00003.png\).*cannot be read as an image"),
        ("cut image", r"row 2 \(images/00003.png\).*cut or damaged"),
        ("label", r"lacks the labels of 1 of 5 images, first .*00003.png"),
    ],
)
def test_faults_of_a_download_are_named(fault, message, tmp_path):
    gta5(tmp_path / "raw")
    spoil(tmp_path / "raw", fault)
    with pytest.raises(ValueError, match=message):
        preparing.prepare_layout("gta5", str(tmp_path / "raw"), tmp_path / "out", incomplete=True, num_processes=1)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_what_cannot_be_prepared_ends_with_one_line(tmp_path, capsys):
    gta5(tmp_path / "raw")
    raw, out = str(tmp_path / "raw"), str(tmp_path / "out")
    assert main(["prepare", "gta5", "--root", raw, "--output", out]) == 2
    assert "has 5 images" in (line := capsys.readouterr().err)
    assert "the complete download has 24966" in line
    assert not (tmp_path / "out").exists()
    assert run("gta5", raw, out) == 0
    assert run("gta5", raw, out, "--size", "24", "40") == 2
    assert "of other files or settings" in capsys.readouterr().err
    memory = tmp_path / "out" / ".train.json"
    whole = memory.read_text(encoding="utf-8")
    memory.write_text(whole[: len(whole) // 2], encoding="utf-8")
    assert run("gta5", raw, out) == 2
    assert "see .train.json" in capsys.readouterr().err
    for shard in (tmp_path / "out").glob("*.parquet"):  # ended before there was one: it says nothing yet
        shard.unlink()
    assert run("gta5", raw, out) == 0
    assert memory.read_text(encoding="utf-8") == whole
    assert run("gta5", raw, out, "--splits", "val") == 2
    assert "gta5 has no split val" in capsys.readouterr().err
    assert run("cityscapes", raw, str(tmp_path / "x")) == 2
    assert "does not look like cityscapes" in capsys.readouterr().err


def test_another_subset_of_synthia_is_noticed(tmp_path, capsys):
    synthia(tmp_path / "raw")
    for file in (tmp_path / "raw" / "GT" / "LABELS").iterdir():
        cv2.imwrite(str(file), np.full((*SIZE, 3), 5, np.uint16))
    assert run("synthia", tmp_path / "raw", tmp_path / "out") == 2
    assert "show fence but never road, building, sky, car" in capsys.readouterr().err


def test_workers_end_with_their_parent_and_follow_no_signal_of_their_own():
    """However it ended: otherwise they would go on with the shards that were handed to them."""
    script = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from t2sda_hf.data.preparing import _begin_worker
pool = ProcessPoolExecutor(1, get_context("fork"), _begin_worker)
worker = pool.submit(os.getpid).result()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(worker, number)
assert pool.submit(os.getpid).result() == worker
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    worker = psutil.Process(int(done.stdout)) if psutil.pid_exists(int(done.stdout)) else None
    assert worker is None or not psutil.wait_procs([worker], timeout=60)[1]


def test_the_domains_of_a_config_are_prepared_as_a_run_sees_them(tmp_path, monkeypatch):
    """A box cut out of them, other names, no names of files: images and labels are those of the config."""
    expected = gta5(tmp_path / "raw", 3)["train"]
    pairs = "".join(f"images/{number:05d}.png,labels/{number:05d}.png\n" for number in (1, 3))
    (tmp_path / "raw" / "pairs.csv").write_text(f"image,label\n{pairs}", encoding="utf-8")
    own = {"path": str(tmp_path / "raw" / "pairs.csv"), "label_space": "gta5", "crop_box": [4, 8, 30, 60]}
    classes = ("road", "house", "sky")
    (tmp_path / "mine.yaml").write_text(
        f"classes: {list(classes)}\nsource: {own | {'label_map': {'building': 'house'}}}\n"
        f"target: {{path: {tmp_path / 'raw' / 'images'}}}\n"
    )
    for role in ("source", "target"):
        words = [role, "--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / role), "--processes", "1"]
        assert main(["prepare", *words]) == 0
    streamed = DomainConfig(path=str(tmp_path / "source"), class_names=classes, streaming=True)
    source = load_domain(streamed, classes)
    counts = check_domain(source, classes)
    for index, (file, image, labels) in enumerate((expected[0], expected[2])):
        assert source.table[index]["file_name"] == file
        assert np.array_equal(source.image(index), image[4:34, 8:68])
        few = np.full(256, 255, np.uint8)
        few[[0, 2, 10]] = 0, 1, 2  # road, building, sky
        assert np.array_equal(source.labels(index), few[labels[4:34, 8:68]])
        assert counts[index].tolist() == [(source.labels(index) == number).sum() for number in range(3)]
    target = load_domain(str(tmp_path / "target"), classes, labelled=False)
    assert np.array_equal(target.image(2), expected[2][1])
    assert not (tmp_path / "target" / "class_counts-train.parquet").exists()


def test_other_contents_of_the_same_names_are_noticed(tmp_path, capsys):
    photos = tmp_path / "photos"
    for number in range(3):
        save(photos / f"{number}.png", picture(number))
    words = ["prepare", "target", "--target.path", str(photos), "--output", str(tmp_path / "out"), "--processes", "1"]
    assert main(words) == 0
    made = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(words) == 0
    save(photos / "1.png", picture(7))
    assert main(words) == 2
    assert "holds the split train of files that are others now, 1 of its 1 parquet files" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == made
    save(photos / "1.png", picture(1))
    memory = tmp_path / "out" / ".train.json"
    kept = {key: value for key, value in json.loads(memory.read_text()).items() if key != "contents"}
    memory.write_text(json.dumps(kept, sort_keys=True))  # of an earlier release
    assert main(words) == 0


def test_rows_without_names_that_became_more_are_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "ROWS_PER_SHARD", 2)
    path, words = (
        tmp_path / "rows.parquet",
        ["prepare", "target", "--processes", "1", "--output", str(tmp_path / "out")],
    )
    for count, code in ((2, 0), (2, 0), (3, 2)):
        cells = []
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(picture(number)).save(file, format="PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        Dataset.from_dict({"image": cells}, Features({"image": ImageFeature()})).to_parquet(str(path))
        assert main([*words, "--target.path", str(path)]) == code
    assert "holds the split train of other files or settings" in capsys.readouterr().err


def test_nothing_is_prepared_into_the_folder_of_its_own_images(tmp_path, capsys):
    save(tmp_path / "photos" / "0.png", picture(0))
    words = ["prepare", "target", "--target.path", str(tmp_path / "photos"), "--output"]
    for output in (tmp_path / "photos", tmp_path / "photos" / "made"):
        assert main([*words, str(output)]) == 2
        assert "is read as data: pass another --output." in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["0.png"]


def test_what_is_of_a_download_and_what_of_a_config_are_not_mixed(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(["prepare", "source", "--root", "x", "--splits", "train", *output]) == 2
    assert "--root, --splits is for a download; of the source of a config the config says it" in capsys.readouterr().err
    assert main(["prepare", "gta5", *output]) == 2
    assert "--root is missing: give the folder of the unpacked download of gta5" in capsys.readouterr().err
    assert main(["prepare", "target", *output]) == 2
    assert "a domain has no path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
