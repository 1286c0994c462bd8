"""Every form a domain can take gives the same arrays, and every fault of one is a ValueError with what, where, cure."""

import csv
import errno
import http.server
import io
import json
import os
import shutil
import struct
import threading
import unicodedata
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from t2sda_hf.config import DomainConfig
from t2sda_hf.data import domains, sources
from t2sda_hf.data.checking import inspect_domain
from t2sda_hf.data.domains import check_domain, domain_contents, load_domain, read_domain
from t2sda_hf.errors import RunFailed
from t2sda_hf.labels import CITYSCAPES_CLASSES, CITYSCAPES_COLORS

CLASSES = ("road", "sky", "car")
NAMES = ("a one", "b", "c-ü'")
NUM_IMAGES = len(NAMES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def arrays(seed=0, size=(12, 20)):
    """An image, and ids 0..2 and 255."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, size, dtype=np.uint8)
    ids[ids == 3] = 255
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), ids


def png(pixels, **options):
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, format=options.pop("format", "PNG"), **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def grey_png(ids, bits):
    """A PNG of grey values of so few bits as they are stored."""
    width = ids.shape[1]
    fields = np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(len(ids), width * bits)
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in fields)
    header = struct.pack(">IIBBBBB", width, len(ids), bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def raw_folders(root):
    for seed, name in enumerate(NAMES):
        image, ids = arrays(seed)
        write(root / "images" / "sub" / f"{name}.png", png(image))
        write(root / "masks" / "sub" / f"{name}.png", png(ids))
    return root


def rows(tmp_path, images, labels=None, name="rows.parquet"):
    """A parquet file of these files, None for a missing cell."""
    columns = {"image": [None if data is None else {"bytes": data, "path": None} for data in images]}
    if labels is not None:
        columns["label"] = [None if data is None else {"bytes": data, "path": None} for data in labels]
    path = tmp_path / name
    Dataset.from_dict(columns, Features(dict.fromkeys(columns, ImageFeature()))).to_parquet(str(path))
    return str(path)


def as_folders(root):
    raw_folders(root)
    return {"path": str(root / "images"), "label_path": str(root / "masks")}


def as_list(root):
    raw_folders(root)
    with (root / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label"])
        writer.writerows([f"images/sub/{name}.png", f"masks/sub/{name}.png"] for name in NAMES)
    return {"path": str(root / "pairs.csv")}


def as_tabbed_text(root):
    raw_folders(root)
    text = "".join(f"images/sub/{name}.png\tmasks/sub/{name}.png\n" for name in NAMES)
    (root / "pairs.txt").write_text(text, encoding="utf-8")
    return {"path": str(root / "pairs.txt")}


def as_imagefolder(root):
    raw_folders(root)
    lines = [{"image_file_name": f"images/sub/{n}.png", "label_file_name": f"masks/sub/{n}.png"} for n in NAMES]
    text = "\n".join(json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    return {"path": str(root)}


def as_parquet(root):
    root.mkdir()
    pairs = [arrays(seed) for seed in range(NUM_IMAGES)]
    return {"path": rows(root, [png(image) for image, _ in pairs], [png(ids) for _, ids in pairs])}


def as_parquet_folder(root):
    as_parquet(root)
    (root / "rows.parquet").rename(root / "train-00000-of-00001.parquet")
    return {"path": str(root)}


def as_stream(root):
    return as_parquet_folder(root) | {"streaming": True, "num_images": NUM_IMAGES}


FORMS = [as_folders, as_list, as_tabbed_text, as_imagefolder, as_parquet, as_parquet_folder, as_stream]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_arrays(form, tmp_path):
    config = DomainConfig(**form(tmp_path / "data"), class_names=CLASSES)
    domain = load_domain(config, CLASSES)
    assert len(domain) == NUM_IMAGES
    counts = check_domain(domain, CLASSES)
    for index in range(NUM_IMAGES):
        image, ids = arrays(index)
        assert np.array_equal(domain.image(index), image)
        assert np.array_equal(domain.labels(index), ids)
        assert counts[index].tolist() == np.bincount(ids.ravel(), minlength=3)[:3].tolist()
    unlabelled = load_domain(config, CLASSES, labelled=False)
    assert unlabelled.rows.column_names == ["image"]
    assert np.array_equal(unlabelled.image(1), arrays(1)[0])


def test_images_alone_are_a_target(tmp_path, monkeypatch):
    root = raw_folders(tmp_path / "data")
    domain = load_domain(DomainConfig(path=str(root / "images")), CLASSES, labelled=False)
    assert [np.array_equal(domain.image(i), arrays(i)[0]) for i in range(3)] == [True] * 3
    assert not check_domain(domain, CLASSES).any()
    (root / "list.txt").write_text("images/sub/b.png\n")
    listed = load_domain(DomainConfig(path=str(root / "list.txt")), CLASSES, labelled=False)
    monkeypatch.chdir(root)  # a list by its relative path may hold absolute names
    (root / "absolute.txt").write_text(f"{root}/images/sub/b.png\n")
    absolute = load_domain(DomainConfig(path="absolute.txt"), CLASSES, labelled=False)
    assert absolute.table[0]["file_name"] == "images/sub/b.png"
    assert np.array_equal(absolute.image(0), listed.image(0))
    assert np.array_equal(listed.image(0), arrays(1)[0])
    with pytest.raises(ValueError, match="Set label_path"):
        load_domain(DomainConfig(path=str(root / "images")), CITYSCAPES_CLASSES)


def test_a_lossless_video_is_a_target_with_the_same_pixels(tmp_path):
    path = str(tmp_path / "drive.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"FFV1"), 5, (20, 12))
    for seed in range(5):
        writer.write(np.ascontiguousarray(arrays(seed)[0][..., ::-1]))
    writer.release()
    domain = load_domain(DomainConfig(path=path, frame_step=2), CLASSES, labelled=False)
    assert len(domain) == 3
    for index, frame in enumerate((0, 2, 4)):
        assert np.array_equal(domain.image(index), arrays(frame)[0])
    with pytest.raises(ValueError, match="has no column 'label'"):
        load_domain(DomainConfig(path=path), CITYSCAPES_CLASSES)
    (tmp_path / "cut.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"cut\.mp4 is not a video"):
        load_domain(DomainConfig(path=str(tmp_path / "cut.mp4")), CLASSES, labelled=False)


def test_a_changed_file_is_noticed(tmp_path):
    config = DomainConfig(**as_folders(tmp_path / "data"), class_names=CLASSES)
    before = check_domain(load_domain(config, CLASSES), CLASSES)
    write(tmp_path / "data" / "masks" / "sub" / "b.png", png(np.full((12, 20), 1, np.uint8)))
    after = check_domain(load_domain(config, CLASSES), CLASSES)
    assert after[1].tolist() == [0, 240, 0]
    assert np.array_equal(before[[0, 2]], after[[0, 2]])


def cached(tmp_path, kind):
    """The one file of that kind in the cache."""
    (file,) = (tmp_path / "cache").rglob(kind)
    return file


def test_one_damaged_number_in_the_counted_pixels_is_noticed(tmp_path, caplog):
    config = DomainConfig(**as_folders(tmp_path / "data"), class_names=CLASSES)
    before = check_domain(load_domain(config, CLASSES), CLASSES)
    file = cached(tmp_path, "*.json")
    text = file.read_text()
    number = str(before[0, 0])
    for damaged in (text.replace(number, f"9{number}", 1), text[: len(text) // 2], ""):
        assert damaged != text
        file.write_text(damaged)
        caplog.clear()
        assert np.array_equal(check_domain(load_domain(config, CLASSES), CLASSES), before)
        assert "the cached statistics of" in caplog.text
        assert f"{file} are damaged: set aside" in caplog.text
        assert file.read_text() == text
    assert len(list(file.parent.glob("*.damaged*"))) == 3


@pytest.mark.parametrize("kind", ["*.arrow", "dataset_info.json"])
@pytest.mark.parametrize("kept", [0, 0.5, -1])
def test_a_cut_cache_of_datasets_is_set_aside_and_made_again(tmp_path, kind, kept, caplog):
    config = DomainConfig(**as_parquet(tmp_path / "data"), class_names=CLASSES)
    before = check_domain(load_domain(config, CLASSES), CLASSES)
    file = cached(tmp_path, kind)
    whole = file.read_bytes()
    file.unlink()  # it may be in use, and then its old content stays
    if kept >= 0:
        file.write_bytes(whole[: int(kept * len(whole))])
    for _ in range(2):
        assert np.array_equal(check_domain(load_domain(config, CLASSES), CLASSES), before)
    assert caplog.text.count("the rows that `datasets` has cached") == (kind == "*.arrow" or kept >= 0)


def test_a_cache_that_was_cut_between_two_batches_does_not_lose_rows(tmp_path, monkeypatch, caplog):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "link"))  # as TMPDIR of some clusters and of macOS
    config = DomainConfig(**as_parquet(tmp_path / "data"), class_names=CLASSES)
    load_domain(config, CLASSES)
    file = cached(tmp_path, "*.arrow")
    with pa.memory_map(str(file)) as mapped:
        rows = pa.ipc.open_stream(mapped).read_all()
        file.unlink()
        with pa.OSFile(str(file), "wb") as cut, pa.ipc.new_stream(cut, rows.schema) as stream:
            stream.write_table(rows.slice(0, 2))
    assert len(load_domain(config, CLASSES)) == NUM_IMAGES
    assert "set aside" in caplog.text


def test_a_cut_cache_of_frames_is_made_again(tmp_path, caplog):
    path = str(tmp_path / "drive.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"FFV1"), 10, (20, 12))
    for seed in range(2):
        writer.write(np.ascontiguousarray(arrays(seed)[0][..., ::-1]))
    writer.release()
    config = DomainConfig(path=path)
    assert len(load_domain(config, CLASSES, labelled=False)) == 2
    file = cached(tmp_path, "*.arrow")
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:200])
    assert len(load_domain(config, CLASSES, labelled=False)) == 2
    assert "set aside" in caplog.text


def test_contents_are_bytes_and_not_places_or_times(tmp_path):
    def contents(path, **options):
        config = DomainConfig(path=str(path / "images"), label_path=str(path / "masks"), class_names=CLASSES, **options)
        reading = read_domain(load_domain(config, CLASSES), CLASSES).contents
        assert domain_contents(load_domain(config, CLASSES)) == reading
        return reading

    here = raw_folders(tmp_path / "here")
    before = contents(here)
    record = json.loads(json.dumps(before.record()))
    shutil.copytree(here, tmp_path / "there")
    assert contents(tmp_path / "there").difference(record) == ""
    write(here / "masks" / "sub" / "b.png", png(np.full((12, 20), 1, np.uint8)))
    said = contents(here).difference(record)
    assert said == "1 of 4 images and label maps differ from those before, first: sub/b.png"
    for folder in ("images", "masks"):
        (here / folder / "sub" / "b.png").unlink()
    assert contents(here).difference(record) == "3 images and label maps now, 4 before"
    write(tmp_path / "mask.png", png(np.array([[0, 255]], np.uint8)))
    masked = contents(tmp_path / "there", valid_mask=str(tmp_path / "mask.png"))
    assert masked.difference(record).endswith("first new one: valid_mask")


# --- what labels mean ---------------------------------------------------------------------------------------------


def labelled(tmp_path, label, classes=CLASSES, **config):
    image = arrays(0)[0]
    path = rows(tmp_path, [png(image)], [label])
    if not {"label_space", "class_names", "label_ids", "label_colors"} & config.keys():
        config["label_space"] = "cityscapes"
    return load_domain(DomainConfig(path=path, **config), classes)


def test_names_join_label_spaces(tmp_path):
    ids = np.arange(12, dtype=np.uint8).repeat(20).reshape(12, 20)
    domain = labelled(tmp_path, png(ids), label_space="camvid", label_map={"pavement": "road"})
    expected = np.full(256, 255)
    expected[[0, 3, 4, 8]] = [1, 0, 0, 2]
    assert np.array_equal(domain.labels(0), expected[ids])


def test_ids_with_gaps_are_named(tmp_path):
    _, ids = arrays()
    on_disk = np.choose(np.minimum(ids, 3), [7, 23, 26, 200]).astype(np.uint8)
    names = {7: "road", 23: "sky", 26: "car"}
    domain = labelled(tmp_path, png(on_disk), label_ids=names, ignore_id=200)
    assert np.array_equal(domain.labels(0), ids)
    with pytest.raises(ValueError, match=r"contains the ids 200 \(\d+ pixels\).*has the ids 7, 23, 26, and 255"):
        labelled(tmp_path, png(on_disk), label_ids=names).labels(0)


def coloured(ids):
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = [(128, 64, 128), (1, 2, 3), (0, 0, 142)], (9, 9, 9)
    return table, table[ids]


COLORS = {"128,64,128": "road", "#010203": "sky", "rgb(0,0,142)": "car", "9,9,9": "void"}


def test_masks_by_colour_as_rgb_palette_or_opaque_rgba(tmp_path):
    _, ids = arrays()
    table, rgb = coloured(ids)
    shuffled = Image.fromarray((255 - ids).astype(np.uint8))  # the indices mean nothing, the palette does
    shuffled.putpalette(table[::-1].tobytes())
    rgba = np.dstack([rgb, np.full(ids.shape, 255, np.uint8)])
    for mask in (rgb, shuffled, rgba):
        assert np.array_equal(labelled(tmp_path, png(mask), label_colors=COLORS).labels(0), ids)


def test_binary_grey_masks_by_colour(tmp_path):
    grey = np.where(arrays()[1] == 1, 255, 0).astype(np.uint8)
    domain = labelled(tmp_path, png(grey), label_colors={"0,0,0": "road", "255,255,255": "sky"})
    assert np.array_equal(domain.labels(0), (grey == 255).astype(np.uint8))


def test_unknown_colours_are_listed_with_counts(tmp_path):
    _, rgb = coloured(arrays()[1])
    rgb[0, :7] = (5, 6, 7)
    domain = labelled(tmp_path, png(rgb), label_colors=COLORS)
    with pytest.raises(ValueError, match=r"row 0 .*shows 1 colours without a class: 5,6,7 \(7 pixels\)"):
        domain.labels(0)


def test_cityscapes_colours_need_no_table(tmp_path):
    rgb = np.array([*CITYSCAPES_COLORS.values(), (0, 0, 0), (111, 74, 0)], np.uint8).reshape(3, 7, 3)
    domain = labelled(tmp_path, png(rgb), CITYSCAPES_CLASSES, label_space="gta5")
    assert domain.labels(0).ravel().tolist() == [*range(19), 255, 255]


def test_ids_as_a_grey_picture_of_three_channels_are_ids_where_colours_are_known(tmp_path):
    """Cityscapes' colours need no table, but 7, 7, 7 is none of them, and 7 is an id."""
    ids = np.array([[7, 8, 11], [26, 0, 33]], np.uint8).repeat(8, 0).repeat(8, 1)
    read = [
        labelled(tmp_path / name, png(pixels), CITYSCAPES_CLASSES, label_space="gta5").labels(0)
        for name, pixels in (("grey", ids), ("rgb", np.dstack([ids] * 3)))
    ]
    assert np.array_equal(*read)
    assert set(np.unique(read[0])) == {0, 1, 2, 13, 18, 255}
    buildings = np.full((8, 8, 3), 70, np.uint8)
    assert labelled(tmp_path / "c", png(buildings), CITYSCAPES_CLASSES, label_space="gta5").labels(0).max() == 2


def test_a_palette_without_colour_table_gives_its_indices(tmp_path):
    _, ids = arrays()
    picture = Image.fromarray(ids)
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert np.array_equal(labelled(tmp_path, png(picture), class_names=CLASSES).labels(0), ids)


def test_sixteen_bit_grey_ids(tmp_path):
    _, ids = arrays()
    domain = labelled(tmp_path, png(ids.astype(np.uint16)), class_names=CLASSES)
    assert np.array_equal(domain.labels(0), ids)
    domain = labelled(tmp_path, png(ids.astype(np.uint16) + 1000), class_names=CLASSES)
    with pytest.raises(ValueError, match=r"contains the ids 1000 \(\d+ pixels\), 1001"):
        domain.labels(0)


def maps_of(ids):
    """Ways to store ids 0..2, with or without 255 for none, whose reading gives the ids again."""
    whole = ids.clip(0, 3)  # for those that have no 255
    signed = np.where(ids == 255, -1, ids.astype(np.int32))
    tagged = Image.fromarray(255 - ids)
    return {
        "-1 in a TIFF of 32 bits": (png(Image.fromarray(signed), format="TIFF"), ids),
        "65535 in a PNG of 16 bits": (png(np.where(ids == 255, 65535, ids).astype(np.uint16)), ids),
        "-1 in an array": (npy(signed.astype(np.int64)), ids),
        "array": (npy(np.asfortranarray(ids)), ids),
        "array with a third axis": (npy(ids[..., None]), ids),
        "array of truth": (npy(ids == 1), (ids == 1).astype(np.uint8)),
        "GIF": (png(Image.fromarray(ids), format="GIF"), ids),
        "grey of 1 bit": (grey_png(ids & 1, 1), ids & 1),
        "grey of 2 bits": (grey_png(whole & 1, 2), whole & 1),
        "all of 2 bits": (grey_png(np.minimum(ids, 2), 2), np.minimum(ids, 2)),
        "grey of 4 bits": (grey_png(np.minimum(ids, 2), 4), np.minimum(ids, 2)),
        "palette of 2 bits": (png(Image.fromarray(np.minimum(ids, 2)).convert("P"), bits=2), np.minimum(ids, 2)),
        "TIFF with 0 for white": (png(tagged, format="TIFF", tiffinfo={262: 0}), ids),
        "three equal channels": (png(np.dstack([ids] * 3)), ids),
        "three equal channels, opaque": (png(np.dstack([ids] * 3 + [np.full_like(ids, 255)])), ids),
        "grey, opaque": (png(np.dstack([ids, np.full_like(ids, 255)])), ids),
        "lossless WebP": (png(np.dstack([ids] * 3), format="WEBP", lossless=True), ids),
        "compressed TIFF": (png(ids, format="TIFF", compression="tiff_lzw"), ids),
    }


@pytest.mark.parametrize("form", maps_of(arrays()[1]))
def test_every_form_of_a_map_gives_its_ids(form, tmp_path):
    data, expected = maps_of(arrays()[1])[form]
    assert np.array_equal(labelled(tmp_path, data, class_names=CLASSES).labels(0), expected)


def test_a_name_that_is_nearly_a_class_is_said(tmp_path, caplog):
    labelled(tmp_path, png(IDS), class_names=("Road", "sky", "bus"))
    assert "'Road' is no class of the run and is ignored. If it is 'road', set label_map: {Road: road}." in caplog.text
    assert "'bus' is no class of the run and ignored, and nothing is called 'car'." in caplog.text
    caplog.clear()
    labelled(tmp_path, png(IDS), class_names=("Road", "sky", "bus"), label_map={"Road": "road", "bus": "car"})
    labelled(tmp_path, png(IDS), class_names=CLASSES)
    assert caplog.text == ""


def test_names_of_a_data_set_that_are_no_class_are_said_where_a_class_has_no_name(tmp_path, caplog):
    labelled(tmp_path, png(IDS), class_names=("street", "sky", "human"))
    assert (
        "'human', 'street' are no class of the run and ignored, and nothing is called 'road' or 'car'. If two of these "
        "are the same, say so in label_map, for example {human: road}."
    ) in caplog.text
    caplog.clear()
    labelled(tmp_path, png(IDS), ("sky", "street"), class_names=("street", "sky", "human"))  # human is left out
    assert caplog.text == ""


def test_no_hint_at_255_where_something_else_explains_ignored_pixels(tmp_path, caplog):
    check_domain(labelled(tmp_path, png(IDS), class_names=("street", "sky", "car")), CLASSES)
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 0, 200]], np.uint8)[IDS.clip(0, 2)]
    named = {"black": "nothing", "200,0,0": "sky", "0,0,200": "car"}
    check_domain(labelled(tmp_path, png(colours), label_colors=named), CLASSES)
    assert "shows no pixel of road" in caplog.text
    assert "Pixels of 255" not in caplog.text


def test_one_colour_has_one_name_and_colours_are_no_ids(tmp_path):
    with pytest.raises(ValueError, match=r"label_colors calls one colour \(#000000\) both road and sky"):
        labelled(tmp_path, png(IDS), label_colors={"0,0,0": "road", "#000000": "sky"})
    with pytest.raises(ValueError, match="ignore_id is for ids, and label_colors says what colours mean"):
        labelled(tmp_path, png(IDS), label_colors={"black": "road", "white": "sky"}, ignore_id=0)


def test_images_that_a_metadata_file_does_not_list_are_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(5):
        Image.fromarray(arrays(number)[0]).save(tmp_path / f"{number}.png")
    listed = ["1.png", "3.png"]
    lines = "\n".join(json.dumps({"file_name": name}) for name in listed)
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    domain = load_domain(DomainConfig(path=str(tmp_path)), CLASSES, labelled=False)
    assert len(domain) == 2
    ((reason, files),) = domain.ignored.items()
    assert (reason, [file.name for file in files]) == ("in no row of the split train", ["0.png", "2.png", "4.png"])
    assert "2 of 5 files used; ignored: 3 in no row of the split train" in caplog.text


def test_255_is_a_class_where_it_is_named(tmp_path, caplog):
    mask = np.where(arrays()[1] == 1, 255, 0).astype(np.uint8)
    mask[0] = 9
    named = labelled(tmp_path, png(mask), label_ids={0: "road", 255: "sky"}, ignore_id=9)
    expected = np.where(mask == 255, 1, mask)
    expected[0] = 255
    assert np.array_equal(named.labels(0), expected)
    assert check_domain(named, CLASSES)[0].tolist() == [(expected == 0).sum(), (expected == 1).sum(), 0]
    assert "shows no pixel of car: nothing is learned or scored of it there." in caplog.text
    assert "if 255 stands for a class" not in caplog.text
    with pytest.raises(ValueError, match=r"contains the ids 9 \(20 pixels\), but its label space has the ids 0, 255\."):
        labelled(tmp_path, png(mask), label_ids={0: "road", 255: "sky"}).labels(0)
    three = np.where(arrays()[1] == 2, 255, arrays()[1]).clip(0, 255).astype(np.uint8)
    check_domain(labelled(tmp_path, png(three), class_names=CLASSES), CLASSES)  # the third of three classes is 255
    assert "of car: nothing is learned or scored of it there. Pixels of 255 are ignored: if 255 stands" in caplog.text


def test_minus_one_may_be_named_but_as_void_only(tmp_path):
    signed = png(Image.fromarray(np.where(IDS == 255, -1, IDS.astype(np.int32))), format="TIFF")
    names = {-1: "void", 0: "road", 1: "sky", 2: "car"}
    assert np.array_equal(labelled(tmp_path, signed, label_ids=names, ignore_id=-1).labels(0), IDS)
    with pytest.raises(ValueError, match=r"label_ids must be 'void' for -1, .*got 'car'"):
        DomainConfig(path="x", label_ids={-1: "car", 0: "road"})


def test_transparent_pixels_have_a_name_of_their_own(tmp_path):
    """Masks of drawing tools: RGBA with colours under 0, one colour and its opacity, and a palette."""
    ids = IDS.clip(0, 2)
    rgba = np.array([[0, 0, 0, 0], [200, 0, 0, 255], [0, 0, 200, 255]], np.uint8)[ids]
    colors = {"200,0,0": "sky", "0,0,200": "car"}
    for first in ("0,0,0", "transparent"):
        domain = labelled(tmp_path, png(rgba), label_colors={first: "road"} | colors)
        assert np.array_equal(domain.labels(0), ids)
    one_color = np.array([[255, 255, 255, 0], [255, 255, 255, 255]], np.uint8)[ids & 1]
    domain = labelled(tmp_path, png(one_color), label_colors={"transparent": "road", "255,255,255": "sky"})
    assert np.array_equal(domain.labels(0), ids & 1)
    palette = Image.fromarray(ids)
    palette.putpalette(bytes([9, 9, 9, 200, 0, 0, 0, 0, 200]))
    domain = labelled(tmp_path, png(palette, transparency=0), label_colors={"transparent": "road"} | colors)
    assert np.array_equal(domain.labels(0), ids)
    rgba[0, 0, 3] = 128
    with pytest.raises(ValueError, match="has half-transparent pixels: it was smoothed"):
        labelled(tmp_path, png(rgba), label_colors={"transparent": "road"} | colors).labels(0)


# --- geometry --------------------------------------------------------------------------------------------------------


def test_crop_box_and_validity_mask(tmp_path):
    image, ids = arrays()
    mask = np.full((6, 10), 255, np.uint8)
    mask[:, :5] = 0
    write(tmp_path / "mask.png", png(mask))
    options = {"class_names": CLASSES, "crop_box": (2, 4, 8, 10), "valid_mask": str(tmp_path / "mask.png")}
    domain = labelled(tmp_path, png(ids), **options)
    expected = ids[2:10, 4:14].copy()
    expected[:, :5] = 255
    assert np.array_equal(domain.image(0), image[2:10, 4:14])
    assert np.array_equal(domain.labels(0), expected)
    assert domain.validity((4, 4)).tolist() == [[False, False, True, True]] * 4
    assert check_domain(domain, CLASSES)[0].sum() == (expected != 255).sum()
    with pytest.raises(ValueError, match="reaches beyond an image of 20x12 pixels"):
        labelled(tmp_path, png(ids), class_names=CLASSES, crop_box=(2, 4, 11, 10)).image(0)


def test_a_photo_is_turned_upright_but_not_under_its_labels(tmp_path):
    image, ids = arrays()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    path = rows(tmp_path, [png(image, exif=exif)], [png(ids)])
    config = DomainConfig(path=path, class_names=CLASSES)
    unlabelled = load_domain(config, CLASSES, labelled=False)
    assert np.array_equal(unlabelled.image(0), np.rot90(image, -1))
    check_domain(unlabelled, CLASSES)
    with pytest.raises(ValueError, match="EXIF orientation 6"):
        check_domain(load_domain(config, CLASSES), CLASSES)


# --- faults ----------------------------------------------------------------------------------------------------------


def bomb(side, bits=24):
    """A black PNG of side x side pixels, RGB or of 1 bit, in some kilobytes."""

    packer = zlib.compressobj(9)
    row = bytes(1 + bits * side // 8)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, *((8, 2) if bits == 24 else (1, 0)), 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def exif_turned(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return png(arrays()[0], format="JPEG", exif=exif)


def deep(pixels, ending):
    """A file of 16-bit colours of (H,W,3) or (H,W,4) RGB values."""
    return cv2.imencode(ending, pixels.astype(np.uint16)[..., [2, 1, 0, 3][: pixels.shape[2]]])[1].tobytes()


IDS = arrays()[1]
IMAGE = png(arrays()[0])
JPEG = png(arrays()[0], format="JPEG")
GREY16 = png(np.full((12, 20), 40_000, np.uint16))
FRAMES = [Image.fromarray(arrays(seed)[0]) for seed in range(3)]
BAD_IMAGES = {
    "no file": (None, "is empty"),
    "0 bytes": (b"", "0 bytes"),
    "text": (b"not an image\n" * 20, "cannot be read as an image"),
    "html": (b"<html><body>404</body></html>", "cannot be read as an image"),
    "zip": (b"PK\x03\x04" + bytes(100), "cannot be read as an image"),
    "signature only": (IMAGE[:8], "cannot be read as an image"),
    "cut PNG": (IMAGE[: len(IMAGE) // 2], "cut or damaged"),
    "PNG without its end": (IMAGE[:-60], "cut or damaged"),
    "flipped bits in a PNG": (IMAGE[:100] + bytes(value ^ 255 for value in IMAGE[100:140]) + IMAGE[140:-30], "damaged"),
    "wrong bits in the middle of a PNG": (IMAGE[:300] + bytes([IMAGE[300] ^ 9]) + IMAGE[301:], "cut or damaged"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], ""),
    "JPEG header only": (JPEG[:200], ""),
    "cut WebP": (png(arrays()[0], format="WEBP", lossless=True)[:200], ""),
    "cut TIFF": (png(arrays()[0], format="TIFF")[:300], ""),
    "cut BMP": (png(arrays()[0], format="BMP")[:300], "cut or damaged"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n%%EndComments\n", "cannot be read as an image"),
    "12 of 16 bits": (
        deep(arrays()[0].astype(int) * 16, ".png"),
        "more than 8 bits per channel.*as it stands it is black",
    ),
    "14 of 16 bits in a TIFF": (
        deep(arrays()[0].astype(int) * 64, ".tif"),
        "more than 8 bits per channel.*as it stands it is black",
    ),
    "12 of 16 bits and opacity": (
        deep(np.dstack([arrays()[0], IDS]).astype(int) * 16, ".png"),
        "as it stands it is black",
    ),
    "16-bit grey": (GREY16, "more than 8 bits per pixel"),
    "32-bit": (png(Image.fromarray(np.ones((4, 4), np.int32)), format="TIFF"), "more than 8 bits per pixel"),
    "float": (png(Image.fromarray(np.ones((4, 4), np.float32)), format="TIFF"), "more than 8 bits per pixel"),
    "animated GIF": (png(FRAMES[0], format="GIF", save_all=True, append_images=FRAMES[1:]), "frames"),
    "animated PNG": (png(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "frames"),
    "pages of TIFF": (png(FRAMES[0], format="TIFF", save_all=True, append_images=FRAMES[1:]), "frames"),
    "bomb": (bomb(6000), r"6000x6000 pixels, more than max_pixels \(33554432\).*Raise max_pixels"),
}


@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_bad_images_are_refused_before_training(fault, tmp_path):
    data, message = BAD_IMAGES[fault]
    domain = load_domain(DomainConfig(path=rows(tmp_path, [IMAGE, data])), CLASSES, labelled=False)
    with pytest.raises(ValueError, match=f"row 1 .*{message}"):
        check_domain(domain, CLASSES)
    with pytest.raises(ValueError, match="row 1 "):
        domain.image(1)


def rgb_of(picture):
    return np.asarray(picture.convert("RGB"))


def good_images():
    image = Image.fromarray(arrays()[0])
    grey, palette = image.convert("L"), image.convert("P")
    alpha = image.convert("RGBA")
    alpha.putalpha(grey)
    turned = {turn: exif_turned(turn) for turn in range(1, 9)}
    cases = {
        "grey": (png(grey), rgb_of(grey)),
        "palette": (png(palette), rgb_of(palette)),
        "transparent palette": (png(palette, transparency=3), rgb_of(palette)),
        "1 bit": (png(grey.convert("1")), rgb_of(grey.convert("1"))),
        "grey and alpha": (png(alpha.convert("LA")), rgb_of(alpha.convert("LA").convert("L"))),
        "RGBA": (png(alpha), arrays()[0]),
        "BMP": (png(image, format="BMP"), arrays()[0]),
        "BMP with filled up lines": (png(image.crop((0, 0, 7, 5)), format="BMP"), arrays()[0][:5, :7]),
        "grey BMP": (png(grey, format="BMP"), rgb_of(grey)),
        "TIFF": (png(image, format="TIFF"), arrays()[0]),
        "WebP": (png(image, format="WEBP", lossless=True), arrays()[0]),
        "interlaced 1x1": (png(np.array([[[1, 2, 3]]], np.uint8)), np.array([[[1, 2, 3]]], np.uint8)),
        "1x5000": (png(np.full((1, 5000, 3), 7, np.uint8)), np.full((1, 5000, 3), 7, np.uint8)),
        "20000 wide": (png(np.full((2, 20_000, 3), 7, np.uint8)), np.full((2, 20_000, 3), 7, np.uint8)),
    }
    cmyk = png(image.convert("CMYK"), format="JPEG")
    cases["CMYK"] = (cmyk, rgb_of(Image.open(io.BytesIO(cmyk))))
    for ending in (".png", ".tif"):
        cases[f"16-bit colour{ending}"] = (deep(arrays()[0].astype(np.uint16) * 257, ending), arrays()[0])
    upright = np.asarray(Image.open(io.BytesIO(turned[1])))
    for turn, quarter, mirrored in ((3, 2, False), (6, 3, False), (8, 1, False), (2, 0, True)):
        expected = np.rot90(upright, quarter)
        cases[f"EXIF {turn}"] = (turned[turn], expected[:, ::-1] if mirrored else expected)
    return cases


@pytest.mark.parametrize("kind", good_images())
def test_unusual_images_are_read_as_what_they_show(kind, tmp_path):
    data, expected = good_images()[kind]
    domain = load_domain(DomainConfig(path=rows(tmp_path, [data])), CLASSES, labelled=False)
    check_domain(domain, CLASSES)
    assert np.array_equal(domain.image(0), expected)


def test_a_large_image_may_be_allowed(tmp_path):
    small = rows(tmp_path, [bomb(300)])
    with pytest.raises(ValueError, match="more than max_pixels"):
        load_domain(DomainConfig(path=small, max_pixels=80_000), CLASSES, labelled=False).image(0)
    assert load_domain(DomainConfig(path=small, max_pixels=90_000), CLASSES, labelled=False).image(0).shape[0] == 300
    with pytest.raises(ValueError, match="far too large"):
        load_domain(DomainConfig(path=rows(tmp_path, [bomb(13_400)], name="b.parquet")), CLASSES, False).image(0)


BAD_LABELS = {
    "no file": (None, "is empty"),
    "0 bytes": (b"", "0 bytes"),
    "text": (b"0 0 1 1 2", "cannot be read as an image"),
    "cut": (png(IDS)[:60], ""),
    "other size": (png(IDS[:6]), "the image has 20x12 pixels, its label map 20x6"),
    "turned": (png(IDS.T), "the image has 20x12 pixels, its label map 12x20"),
    "id outside": (png(np.where(IDS == 2, 7, IDS).astype(np.uint8)), r"contains the ids 7 \(\d+ pixels\)"),
    "negative": (png(Image.fromarray(IDS.astype(np.int32) - 2), format="TIFF"), r"contains the ids -2 \(\d+ pixels\)"),
    "16-bit instance ids": (
        png(IDS.astype(np.uint16) * 1000 + 26_000),
        r"contains the ids 18856 \(\d+ pixels\), 26000",
    ),
    "JPEG": (png(IDS, format="JPEG"), "Its compression mixes neighbouring ids"),
    "RGB": (png(coloured(IDS)[1]), "is a RGB picture, not a map of ids.*label_colors"),
    "RGBA": (png(np.dstack([coloured(IDS)[1], IDS])), "is a RGBA picture"),
    "grey and alpha": (png(np.dstack([IDS, IDS])), "is a LA picture"),
    "AVIF": (png(np.dstack([IDS] * 3), format="AVIF"), "is a AVIF file. Its compression"),
    "JPEG inside of a TIFF": (png(IDS, format="TIFF", compression="jpeg"), "is a TIFF with JPEG.*mixes neighbouring"),
    "lossy WebP": (png(np.dstack([IDS] * 3), format="WEBP"), "is a WEBP file. Its compression"),
    "scaled PGM": (b"P5 20 12 3\n" + IDS.clip(0, 3).tobytes(), "is a L picture"),
    "array of numbers": (npy(IDS / 2), r"an array of the shape \(12, 20\) and the type float64"),
    "array of colours": (npy(np.dstack([IDS] * 3)), r"an array of the shape \(12, 20, 3\)"),
    "array of objects": (npy(np.array([[{}]])), "the type object"),
    "cut array": (npy(IDS)[:200], "cut or damaged"),
    "array that says it is huge": (npy(IDS).replace(b"(12, 20)", b"(120000, 200000)"), "cut or damaged"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n", "cannot be read as an image"),
    "16-bit colour": (cv2.imencode(".png", np.dstack([IDS] * 3).astype(np.uint16))[1].tobytes(), "16-bit colour"),
    "one wrong bit": (png(IDS)[:120] + bytes([png(IDS)[120] ^ 1]) + png(IDS)[121:], "cut or damaged"),
    "float": (png(Image.fromarray(IDS.astype(np.float32)), format="TIFF"), "is a F picture"),
    "palette turned to grey": (png(Image.fromarray(np.array([21, 48, 255], np.uint8)[IDS % 3])), "contains the ids 21"),
    "scaled for viewing": (png((IDS.astype(int) * 100).clip(0, 255).astype(np.uint8)), "contains the ids 100"),
    "smoothed": (png(np.where(IDS == 255, 254, IDS).astype(np.uint8)), "contains the ids 254"),
    "animated": (png(FRAMES[0].convert("P"), format="GIF", save_all=True, append_images=FRAMES[1:]), "frames"),
    "bomb": (bomb(6000), "more than max_pixels"),
}


@pytest.mark.parametrize("fault", BAD_LABELS)
def test_bad_labels_are_refused_before_training(fault, tmp_path):
    data, message = BAD_LABELS[fault]
    path = rows(tmp_path, [IMAGE, IMAGE], [png(IDS), data])
    domain = load_domain(DomainConfig(path=path, class_names=CLASSES), CLASSES)
    with pytest.raises(ValueError, match=f"row 1 .*{message}"):
        check_domain(domain, CLASSES)


def test_as_many_faults_as_promised():
    assert len(BAD_IMAGES) + len(BAD_LABELS) + len(BAD_DOMAINS) >= 60


def test_a_small_file_with_a_huge_image_is_never_decoded(tmp_path, monkeypatch):
    """20 kB that would be 507 MB as RGB: refused by the header, with the key that allows it."""
    data = bomb(13_000, bits=1)
    assert len(data) < 22_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    image = load_domain(DomainConfig(path=rows(tmp_path, [data])), CLASSES, labelled=False)
    label = load_domain(DomainConfig(path=rows(tmp_path, [IMAGE], [data], "b.parquet"), class_names=CLASSES), CLASSES)
    for read in (lambda: image.image(0), lambda: label.labels(0), lambda: check_domain(image, CLASSES)):
        with pytest.raises(ValueError, match=r"13000x13000 pixels, more than max_pixels .*Raise max_pixels"):
            read()


def test_statistics_are_read_once_and_again_when_files_or_names_change(tmp_path, monkeypatch):
    config = DomainConfig(**as_folders(tmp_path / "data"), class_names=CLASSES)
    read, original = [], domains.read_labels
    monkeypatch.setattr(domains, "read_labels", lambda cell, *rest: read.append(cell) or original(cell, *rest))

    def reads(options=None, classes=CLASSES):
        read.clear()
        check_domain(load_domain(replace(config, **(options or {})), classes), classes)
        return len(read)

    assert reads() > 0
    assert reads() == 0
    assert reads({"label_map": {"car": "road"}}) > 0  # ids mean something else
    write(tmp_path / "data" / "masks" / "sub" / "b.png", png(np.full((12, 20), 1, np.uint8)))
    assert reads() > 0
    assert reads() == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [(np.zeros((12, 20), np.uint8), "shows only the class road"), (np.full((12, 20), 255, np.uint8), "shows none of")],
)
def test_one_class_or_none_is_no_domain(ids, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*at least two are needed. Check label_space and label_map"):
        check_domain(labelled(tmp_path, png(ids), class_names=CLASSES), CLASSES)


def bad_domains(root):
    """name: (config, message)"""
    raw_folders(root)
    empty, images, masks = root / "empty", str(root / "images"), str(root / "masks")
    empty.mkdir()
    parquet = rows(root, [IMAGE], [png(IDS)])
    none = rows(root, [], [], "none.parquet")
    Dataset.from_dict({"image": ["a", "b"], "label": [1, 2]}).to_parquet(str(root / "text.parquet"))
    (root / "cut.parquet").write_bytes((root / "rows.parquet").read_bytes()[:300])
    (root / "up.csv").write_text("../x.png,masks/sub/b.png\n")
    (root / "absolute.csv").write_text(f"{root.parent / 'x.png'},masks/sub/b.png\n")
    (root / "gone.csv").write_text("images/sub/b.png,masks/sub/gone.png\n")
    (root / "blank.txt").write_text("images/sub/a one.png masks/sub/a one.png\n")
    (root / "half.tsv").write_text("image\tlabel\nimages/sub/b.png\n")
    (root / "link").symlink_to("link")
    (root / "looped.csv").write_text("link/b.png,masks/sub/b.png\n")
    write(root.parent / "outside.png", IMAGE)
    (root / "inside.png").symlink_to(root.parent / "outside.png")
    (root / "linked.csv").write_text("inside.png,masks/sub/b.png\n")
    (root / "empty.csv").write_text("")
    (root / "file.pdf").write_bytes(b"%PDF")
    write(root / "few" / "sub" / "b.png", png(IDS))
    explained = {"path": parquet, "label_space": "cityscapes"}
    return {
        "typo": ({"path": "streets-sauce"}, "there is no domain 'streets-sauce'.*Did you mean 'streets-source'"),
        "missing": ({"path": str(root / "gone")}, "no such file, folder or name"),
        "no path": ({"path": ""}, "a domain has no path. Set source.path"),
        "split of the drawn": ({"path": "streets-source", "split": "test"}, "Unknown split 'test'"),
        "empty folder": ({"path": str(empty)}, "cannot load the data set"),
        "no rows": ({"path": none}, "cannot load the data set .* no data"),
        "empty list": ({"path": str(root / "empty.csv")}, "is empty: there is no image"),
        "image column": ({"path": parquet, "image_column": "photo"}, "no column 'photo': it has image, label"),
        "label column": ({"path": parquet, "label_column": "mask"}, "no column 'mask'.*Set label_column"),
        "columns of text": ({"path": str(root / "text.parquet")}, "column 'image' holds .*not images"),
        "cut parquet": ({"path": str(root / "cut.parquet")}, "cannot load the data set"),
        "other file": ({"path": str(root / "file.pdf")}, "none of the files a domain can be"),
        "masks missing": ({"path": images, "label_path": str(root / "few")}, "2 of 3 images .* have no label map"),
        "no masks at all": ({"path": images, "label_path": str(root / "nowhere")}, "is not a folder"),
        "other names": (
            {"path": images, "label_path": masks, "label_suffix": "_gt"},
            "3 of 3 images.*image_suffix and label_suffix",
        ),
        "list leaves its folder": ({"path": str(root / "up.csv")}, "line 1: '../x.png' lies outside the list's folder"),
        "absolute in list": ({"path": str(root / "absolute.csv")}, "lies outside the list's folder"),
        "link in list": ({"path": str(root / "linked.csv")}, "line 1: 'inside.png' is a link out of the list's folder"),
        "circle of links in list": ({"path": str(root / "looped.csv")}, "line 1: there is no file 'link/b.png'"),
        "list names a missing file": (
            {"path": str(root / "gone.csv")},
            "line 1: there is no file 'masks/sub/gone.png'",
        ),
        "blanks in a list": (
            {"path": str(root / "blank.txt")},
            "line 1: expected an image and a label map, got 4 field",
        ),
        "list without labels": ({"path": str(root / "half.tsv")}, "line 2: expected an image and a label map, got 1"),
        "layout": ({"path": str(root), "layout": "gta"}, "no layout 'gta'.*Did you mean 'gta5'"),
        "layout elsewhere": (
            {"path": str(root), "layout": "gta5"},
            r"does not look like gta5: no file matches images/\*",
        ),
        "layout's split": ({"path": str(root), "layout": "gta5", "split": "val"}, "gta5 has no split 'val'"),
        "label map": ({**explained, "label_map": {"rode": "road"}}, "label_map names 'rode'.*Did you mean 'road'"),
        "no meaning of ids": ({"path": parquet}, "nothing says what the ids in the label maps mean. List their names"),
        "no shared class": ({"path": parquet, "class_names": ("cat", "dog")}, "no class is shared"),
        "colour": ({"path": parquet, "label_colors": {"rod": "road"}}, "'rod', which is no colour"),
        "colour range": (
            {"path": parquet, "label_colors": {"1,2,300": "road"}},
            "each of R, G and B must be in 0..255",
        ),
        "mask file": ({**explained, "valid_mask": "gone.png"}, "valid_mask 'gone.png' does not exist"),
        "stream of nowhere": ({"path": str(empty), "streaming": True, "num_images": 1}, "cannot load the data set"),
    }


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return bad_domains(tmp_path_factory.mktemp("bad") / "data")


BAD_DOMAINS = [
    "typo",
    "missing",
    "no path",
    "split of the drawn",
    "empty folder",
    "no rows",
    "empty list",
    "image column",
    "label column",
    "columns of text",
    "cut parquet",
    "other file",
    "masks missing",
    "no masks at all",
    "other names",
    "list leaves its folder",
    "absolute in list",
    "link in list",
    "circle of links in list",
    "list names a missing file",
    "blanks in a list",
    "list without labels",
    "layout",
    "layout elsewhere",
    "layout's split",
    "label map",
    "no meaning of ids",
    "no shared class",
    "colour",
    "colour range",
    "mask file",
    "stream of nowhere",
]


@pytest.mark.parametrize("fault", BAD_DOMAINS)
def test_what_is_no_domain_is_said(fault, bad):
    assert list(bad) == BAD_DOMAINS
    config, message = bad[fault]
    with pytest.raises(ValueError, match=message):
        load_domain(DomainConfig(**config), CLASSES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"label_space": "city"}, "label_space must be one of"),
        ({"class_names": ("a",), "label_ids": {1: "a"}}, "class_names and label_ids contradict each other"),
        ({"label_ids": {256: "a"}}, r"label_ids and ignore_id must be ids in 0..255, or -1, got 256"),
        ({"ignore_id": -2}, "label_ids and ignore_id must be"),
        ({"class_names": tuple(map(str, range(257)))}, "class_names must be at most 256 names.*got 257"),
        ({"label_colors": {f"{c},0,{c // 256}": str(c) for c in range(257)}}, "label_colors must be colours of at"),
        ({"crop_box": (0, 0, 0, 5)}, "crop_box must be"),
        ({"frame_step": 0}, "frame_step must be at least 1"),
        ({"max_pixels": 10**9}, "max_pixels must be in"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
        ({"num_images": 0}, "num_images must be at least 1"),
    ],
)
def test_contradictions_in_the_config_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DomainConfig(path="x", **config)


GOOD_NAMES = [
    "a b",
    "ü",
    "quote'\"",
    "-dash",
    "x" * 240,
    "A",
    "a",
    "new\nline",
    "c#1",
    "50%",
    "[0]",
    "{x}",
    "~",
    "$HOME",
]


def test_unusual_names_are_files_like_others(tmp_path):
    root = tmp_path / "data"
    for seed, name in enumerate(GOOD_NAMES):
        image, ids = arrays(seed)
        write(root / "i" / f"{name}.png", png(image))
        write(root / "m" / f"{name}.png", png(ids))
    in_order = sorted(GOOD_NAMES, key="{}.png".format)
    with (root / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([f"i/{name}.png", f"m/{name}.png"] for name in in_order)
    for form in (
        {"path": str(root / "i"), "label_path": str(root / "m")},
        {"path": str(root / "pairs.csv")},
    ):
        domain = load_domain(DomainConfig(**form, class_names=CLASSES), CLASSES)
        assert len(domain) == len(GOOD_NAMES)
        for index, name in enumerate(in_order):
            image, ids = arrays(GOOD_NAMES.index(name))
            assert np.array_equal(domain.image(index), image)
            assert np.array_equal(domain.labels(index), ids)


def test_a_metadata_file_cannot_reach_outside(tmp_path):
    root = raw_folders(tmp_path / "data")
    write(tmp_path / "secret.png", IMAGE)
    (root / "metadata.jsonl").write_text(json.dumps({"image_file_name": "../secret.png"}))
    with pytest.raises(ValueError, match="cannot load the data set"):
        load_domain(DomainConfig(path=str(root)), CLASSES, labelled=False)


def test_drawn_domains_and_the_number_of_images():
    domain = load_domain(DomainConfig(path="streets-source", num_images=3))
    assert len(domain) == 3
    assert domain.rows.column_names == ["image", "label"]
    assert check_domain(domain, CITYSCAPES_CLASSES).sum(axis=1).tolist() == [96 * 192] * 3
    assert load_domain("streets-target").name == "streets-target (train)"


def test_ids_are_those_of_cityscapes_only_where_its_classes_are_learned_or_streets_are_drawn(tmp_path):
    path = rows(tmp_path, [png(arrays(0)[0])], [png(np.arange(19, dtype=np.uint8).reshape(1, 19))])
    assert np.array_equal(load_domain(path, CITYSCAPES_CLASSES).ids[:19], np.arange(19))
    with pytest.raises(ValueError, match="nothing says what the ids"):
        load_domain(path, CITYSCAPES_CLASSES[:5])
    assert load_domain(path, CITYSCAPES_CLASSES[:5], labelled=False).rule is None
    drawn = load_domain(DomainConfig(path="streets-source", num_images=1), CITYSCAPES_CLASSES[:5])
    assert np.array_equal(drawn.ids[:6], [0, 1, 2, 3, 4, 255])


def test_file_name_columns_of_other_kinds_do_no_harm(tmp_path):
    features = Features({"image": ImageFeature(), "label": ImageFeature(), "file_name": Value("string")})
    table = {"image": [{"bytes": b"nothing", "path": None}], "label": [None], "file_name": ["berlin/7.png"]}
    Dataset.from_dict(table, features).to_parquet(str(tmp_path / "x.parquet"))
    domain = load_domain(DomainConfig(path=str(tmp_path / "x.parquet"), label_space="cityscapes"), CLASSES)
    with pytest.raises(ValueError, match=r"row 0 \(berlin/7.png\) of "):
        domain.image(0)


# --- which files are found, and which are opened -------------------------------------------------------------------


def pointing(folder, *cells, name="train-00000-of-00001.parquet"):
    """A data set as somebody else may have made it: cells (bytes, path) that `datasets` did not write."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data, "path": path} for data, path in cells]
    pq.write_table(pa.table({"image": pa.array(cells, type=kind)}), folder / name)
    return str(folder)


@pytest.fixture
def beacon():
    """A server on this machine, and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(IMAGE)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/x.png", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cell_points_into_its_data_set_or_is_refused(streaming, tmp_path, beacon):
    url, asked = beacon
    write(tmp_path / "secret.png", png(arrays(9)[0]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    secret = str(tmp_path / "secret.png")
    places = [secret, "../secret.png", "link.png", url, f"file://{secret}", f"local://{secret}", "memory://x.png",
              "reference://x.png", f"zip://x.png::{url}", f"zip://x.png::{secret}", f"zip://../x.png::{tmp_path}/data/z",
              f"zip://x.png::zip://y.zip::{tmp_path}/data/z", f"zip://x::{tmp_path}/data/z::{url}",
              f"simplecache::{url}", "hf://datasets/somebody/else/x.png", "/dev/zero", "/etc/passwd",
              "x\0.png"]  # fmt: skip
    options = {"streaming": True, "num_images": 2} if streaming else {}
    for place in places:
        folder = pointing(tmp_path / "data", (IMAGE, "kept.png"), (None, place))
        linked = " but a link out of it" if place == "link.png" else ""
        message = f"row 1 of {folder} points to .*, which is no file of this data set{linked}: it is not opened"
        with pytest.raises(ValueError, match=message):
            load_domain(DomainConfig(path=folder, **options), CLASSES, labelled=False)
    assert not asked


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cell_may_name_a_file_beside_the_parquet(streaming, tmp_path, monkeypatch):
    """From wherever the command is started; bytes are not exchanged for a file that happens to have the cell's name."""
    options = {"streaming": True, "num_images": 2} if streaming else {}
    write(tmp_path / "data" / "sub" / "a.png", png(arrays(1)[0]))
    write(tmp_path / "b.png", png(arrays(2)[0]))
    monkeypatch.chdir(tmp_path)
    folder = pointing(tmp_path / "data", (None, "sub/a.png"), (IMAGE, "b.png"))
    domain = load_domain(DomainConfig(path=folder, **options), CLASSES, labelled=False)
    assert np.array_equal(domain.image(0), arrays(1)[0])
    assert np.array_equal(domain.image(1), arrays(0)[0])
    (tmp_path / "data" / "sub" / "a.png").unlink()
    os.mkfifo(tmp_path / "data" / "sub" / "a.png")
    with pytest.raises(ValueError, match=r"row 0 .*is no file. Only regular files are read"):
        domain.image(0)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_a_zip_are_read(streaming, tmp_path):
    """`datasets` names them zip://NAME::ARCHIVE, on the disk and on the Hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for index in range(2):
            archive.writestr(f"sub/{index}.png", png(arrays(index)[0]))
        archive.writestr("sub/2.png", bytes(2**26 + 1), zipfile.ZIP_DEFLATED)
    options = {"streaming": True, "num_images": 3} if streaming else {}
    domain = load_domain(DomainConfig(path=str(folder), max_pixels=2**22, **options), CLASSES, labelled=False)
    assert all(np.array_equal(domain.image(index), arrays(index)[0]) for index in range(2))
    with pytest.raises(ValueError, match="far too large for an image"):
        domain.image(2)
    (folder / "images.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"images.zip cannot be read: .*zip file"):
        domain.image(0)


def test_files_that_datasets_found_itself_are_read(tmp_path, monkeypatch):
    """A snapshot in the cache of the Hub links to files above it; a stream of the Hub names them by their address."""
    repository = tmp_path / "datasets--me--city"
    snapshot = raw_folders(repository / "snapshots" / "1234")
    blob = repository / "blobs" / "77"
    blob.parent.mkdir()
    image = snapshot / "images" / "sub" / "b.png"
    image.rename(blob)
    image.symlink_to(blob)
    (snapshot / "metadata.jsonl").write_text(json.dumps({"file_name": "images/sub/b.png"}))
    assert np.array_equal(load_domain(str(snapshot), CLASSES, labelled=False).image(0), arrays(1)[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = DomainConfig(path="me/city")
    inside = "hf://datasets/me/city@main/images.zip"
    for path in (
        f"{image}",
        "hf://datasets/me/city@main/a.png",
        "hf://datasets/me/city/a.png",
        f"zip://a.png::{inside}",
    ):
        assert sources.at_home({"bytes": None, "path": path}, "row 0", config) == {"bytes": None, "path": path}
    for path in (
        "hf://datasets/me/city2/a.png",
        "hf://datasets/me/city/../other/a.png",
        "a.png::hf://datasets/me/city",
        "zip://a.png::hf://datasets/me/city2/images.zip",
    ):
        with pytest.raises(ValueError, match=r"row 0 points to .*, which is no file of this data set"):
            sources.at_home({"bytes": None, "path": path}, "row 0", config)


def test_a_stream_leaves_out_what_points_elsewhere(tmp_path, beacon, caplog):
    """After the first rows, which are checked before."""
    url, asked = beacon
    cells = [(IMAGE, None)] * 16 + [(None, url), (None, "/dev/zero")]
    config = DomainConfig(path=pointing(tmp_path / "data", *cells), streaming=True)
    stream = domains.ImageStream(load_domain(config, CLASSES, labelled=False), seed=0, slots=1, draws=18)
    assert all(np.array_equal(stream.image(0, draw), arrays()[0]) for draw in range(18))  # all of its row group
    assert caplog.text.count("which is no file of this data set") >= 2
    assert not asked


def test_a_file_that_is_far_too_large_is_not_read(tmp_path, monkeypatch):
    config = DomainConfig(**as_folders(tmp_path / "data"), class_names=CLASSES, max_pixels=1000)
    with (tmp_path / "data" / "images" / "sub" / "b.png").open("wb") as stream:
        stream.truncate(2**26 + 1)  # takes no room on the disk
    domain = load_domain(config, CLASSES)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"row 1 .*has 67108865 bytes, which is far too large for an image"):
        domain.image(1)


def images_in(config, labelled=False):
    """Names of the files of a domain, and reason -> names of those that are not used."""
    domain = load_domain(DomainConfig(**config, class_names=CLASSES), CLASSES, labelled)
    ignored = {reason: sorted(file.name for file in files) for reason, files in domain.ignored.items()}
    return [domain.table[index]["file_name"] for index in range(len(domain))], ignored


def test_every_file_of_a_folder_is_used_or_accounted_for(tmp_path, caplog):
    root, elsewhere = tmp_path / "data", tmp_path / "disk"
    pair = [("a.png", 0), ("b.PNG", 1)]
    for name, seed in pair:
        write(root / "i" / name, png(arrays(seed)[0]))
        write(root / "m" / name, png(arrays(seed)[1]))
        write(elsewhere / "i" / name, png(arrays(seed)[0]))
        write(elsewhere / "m" / name, png(arrays(seed)[1]))
    for kind in ("i", "m"):
        (root / kind / "night").symlink_to(elsewhere / kind)  # its images are used
        (root / kind / "circle").symlink_to(root / kind)
        write(root / kind / ".ipynb_checkpoints" / "a-checkpoint.png", IMAGE)
    write(root / "i" / "._a.png", b"\0\5\26\7\0\2\0\0Mac OS X        ")
    write(root / "i" / "__MACOSX" / "a.png", b"?")
    write(root / "i" / "IMG_1.HEIC", b"?")
    write(root / "i" / "Thumbs.db", b"?")
    write(root / "i" / "notes.txt", b"?")
    write(root / "m" / "c.png", png(arrays(2)[1]))
    (root / "i" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "i" / "pipe.png")
    os.rename(write_raw(root / "i" / "x.png"), os.fsencode(root / "i") + b"/T\xfcr.png")
    names, ignored = images_in({"path": str(root / "i"), "label_path": str(root / "m")}, labelled=True)
    assert names == ["a.png", "b.PNG", "night/a.png", "night/b.PNG"]
    assert ignored == {
        "hidden": ["._a.png", ".ipynb_checkpoints", ".ipynb_checkpoints", "Thumbs.db", "__MACOSX"],
        "links in a circle": ["circle", "circle"],
        ".heic (save them as JPEG or PNG)": ["IMG_1.HEIC"],
        ".txt": ["notes.txt"],
        "broken links or special files": ["gone.png", "pipe.png"],
        "whose names are not UTF-8 (rename them)": [os.fsdecode(b"T\xfcr.png")],
        "label maps without an image": ["c.png"],
    }
    assert f"{root / 'i'} (train): 8 of 21 files used; ignored: 5 hidden" in caplog.text
    facts = inspect_domain(load_domain(str(root / "i"), CLASSES, labelled=False), CLASSES)
    told = "\n".join(found.example for found in facts.findings if found.kind == "files not used").encode().decode()
    assert r"T\xfcr.png" in told
    assert "IMG_1.HEIC" in told
    (tmp_path / "phone").mkdir()
    (root / "i" / "IMG_1.HEIC").rename(tmp_path / "phone" / "IMG_1.HEIC")
    with pytest.raises(ValueError, match=r"Of other files than images it has 1 \.heic \(save them as JPEG or PNG\)"):
        images_in({"path": str(tmp_path / "phone")})
    caplog.clear()
    images_in({"path": str(elsewhere / "i")})
    assert not caplog.text  # nothing is left out, nothing is said


def write_raw(path):
    write(path, IMAGE)
    return path


def test_the_same_name_twice_is_refused(tmp_path):
    for name in ("p.png", "p.jpg", "q.png"):
        write(tmp_path / "i" / name, IMAGE)
        write(tmp_path / "m" / name.replace("jpg", "gif"), png(IDS))
    with pytest.raises(ValueError, match=r"p\.jpg and .*p\.png are images of the same name"):
        images_in({"path": str(tmp_path / "i")})
    (tmp_path / "i" / "p.jpg").unlink()
    with pytest.raises(ValueError, match=r"p\.gif and .*p\.png are label maps of the same name"):
        images_in({"path": str(tmp_path / "i"), "label_path": str(tmp_path / "m")}, labelled=True)


def test_a_flat_export_is_split_by_the_endings_of_its_names(tmp_path):
    """And without them, label maps never become photos."""
    for seed in range(3):
        write(tmp_path / "flat" / f"p{seed}.png", png(arrays(seed)[0]))
        write(tmp_path / "flat" / f"p{seed}_x.png", png(arrays(seed)[1]))
    flat = {"path": str(tmp_path / "flat")}
    with pytest.raises(ValueError, match=r"3 of 6 files in .* look like label maps, .*Set label_suffix: _x"):
        images_in(flat)
    photos = ["p0.png", "p1.png", "p2.png"]
    maps = ["p0_x.png", "p1_x.png", "p2_x.png"]
    assert images_in(flat | {"label_suffix": "_x"}) == (photos, {"label maps": maps})
    both = flat | {"label_path": flat["path"]}
    assert images_in(both | {"label_suffix": "_x"}, labelled=True) == (photos, {})
    with pytest.raises(ValueError, match=r"same folder .*in label_suffix, for example _mask"):
        images_in(both, labelled=True)
    for seed in range(3):
        os.rename(tmp_path / "flat" / f"p{seed}.png", tmp_path / "flat" / f"p{seed}_rgb.png")
        os.rename(tmp_path / "flat" / f"p{seed}_x.png", tmp_path / "flat" / f"p{seed}.png")
    photos = ["p0_rgb.png", "p1_rgb.png", "p2_rgb.png"]
    assert images_in(both | {"image_suffix": "_rgb"}, labelled=True) == (photos, {})


def test_a_folder_of_label_maps_among_the_images_is_no_folder_of_photos(tmp_path):
    root = raw_folders(tmp_path / "data")
    with pytest.raises(ValueError, match=r"3 of 6 files .* look like label maps, first masks/.*Set path: the folder"):
        images_in({"path": str(root)})
    names, ignored = images_in({"path": str(root), "label_path": str(root / "masks" / "sub")})
    assert (len(names), ignored) == (3, {"label maps": ["a one.png", "b.png", "c-ü'.png"]})
    assert len(images_in({"path": str(root / "images"), "label_path": str(root / "nowhere")})[0]) == 3
    config = {"path": str(root), "label_path": str(root / "masks"), "label_suffix": "_m", "image_suffix": "_i"}
    for kind, array in (("images", 0), ("masks", 1)):
        write(root / kind / "images" / f"x_{kind[0]}.png", png(arrays()[array]))
    (root / "masks" / "images" / "x_m.png").rename(root / "masks" / "images" / "x_m.npy")
    shutil.rmtree(root / "masks" / "sub")
    shutil.rmtree(root / "images" / "sub")
    (root / "images" / "images" / "x_i.png").rename(root / "images" / "x_i.png")
    assert images_in(config, labelled=True) == (["images/x_i.png"], {})  # the .npy is used, and so no ignored image
    for seed in range(3):  # both have an ending
        write(tmp_path / "ends" / f"p_{seed}_left8bit.png", png(arrays(seed)[0]))
        write(tmp_path / "ends" / f"p_{seed}_gtFine_labelIds.png", png(arrays(seed)[1]))
    with pytest.raises(ValueError, match=r"3 of 6 files .* look like label maps, .*label_suffix: _gtFine_labelIds"):
        images_in({"path": str(tmp_path / "ends")})
    for city in ("bern", "basel"):  # photos of the same names in two folders are photos
        for seed in range(2):
            write(tmp_path / "cities" / city / f"{seed}.png", png(arrays(seed)[0]))
            write(tmp_path / "cities" / city / f"{seed}_left.png", png(arrays(seed + 5)[0]))
    assert len(images_in({"path": str(tmp_path / "cities")})[0]) == 8


def test_names_are_the_same_however_their_letters_are_composed(tmp_path):
    image, ids = arrays(3)
    write(tmp_path / "i" / unicodedata.normalize("NFC", "Tür.png"), png(image))
    write(tmp_path / "m" / unicodedata.normalize("NFD", "Tür.png"), png(ids))
    text = unicodedata.normalize("NFD", "image,label\ni/Tür.png,m/Tür.png\n")
    (tmp_path / "list.csv").write_text(text, encoding="utf-16")
    for form in ({"path": str(tmp_path / "i"), "label_path": str(tmp_path / "m")}, {"path": f"{tmp_path}/list.csv"}):
        domain = load_domain(DomainConfig(**form, class_names=CLASSES), CLASSES)
        assert np.array_equal(domain.image(0), image)
        assert np.array_equal(domain.labels(0), ids)
    (tmp_path / "list.csv").write_text("i/Tür.png,m/Tür.png\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"list.csv is not a text in UTF-8"):
        load_domain(DomainConfig(path=f"{tmp_path}/list.csv"), CLASSES)


@pytest.mark.parametrize("streaming", [False, True])
def test_brackets_in_the_path_of_parquet(streaming, tmp_path):
    folder = as_parquet_folder(tmp_path / "set [v2]*")["path"]
    options = {"streaming": True, "num_images": 2} if streaming else {}
    for path in (folder, f"{folder}/train-00000-of-00001.parquet"):
        domain = load_domain(DomainConfig(path=path, class_names=CLASSES, **options), CLASSES)
        assert np.array_equal(domain.image(1), arrays(1)[0])
    os.rename(f"{folder}/train-00000-of-00001.parquet", f"{folder}/x.parquet")
    with pytest.raises(ValueError, match=r"has one of the characters \* \? \[ \] in its name.*Rename"):
        load_domain(DomainConfig(path=folder, **options), CLASSES)


def test_git_lfs_pointers_are_told_from_files(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 12345\n"
    config = DomainConfig(**as_folders(tmp_path / "data"), class_names=CLASSES)
    write(tmp_path / "data" / "masks" / "sub" / "b.png", pointer)
    with pytest.raises(ValueError, match=r"row 1 .* is a Git LFS pointer, not the file itself. Run `git lfs pull`"):
        check_domain(load_domain(config, CLASSES), CLASSES)
    for name in ("p/train-00000-of-00001.parquet", "p/x.parquet", "one.parquet", "drive.mp4", "pairs.csv"):
        write(tmp_path / name, pointer)
    for path in ("p", "one.parquet", "drive.mp4", "pairs.csv"):
        with pytest.raises(ValueError, match="is a Git LFS pointer"):
            load_domain(DomainConfig(path=str(tmp_path / path)), CLASSES, labelled=False)
    write(tmp_path / "other" / "test-00000-of-00001.parquet", pointer)  # of a split that is not read
    pointing(tmp_path / "other", (IMAGE, None))
    assert len(load_domain(DomainConfig(path=str(tmp_path / "other")), CLASSES, labelled=False)) == 1


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    raw_folders(tmp_path / "in" / "tgt")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(sources, "load_dataset", lambda name, **_: asked.append(name) or 1 / 0)
    monkeypatch.setattr(sources, "hf_hub_download", lambda *_, **__: Path("no card"))
    for path, near in {"in/tgtt": "in/tgt", "in/tgt/image": "in/tgt/images", "./inn/tgt": "in/tgt"}.items():
        with pytest.raises(ValueError, match=f"there is no domain '{path}'.*Did you mean '{near}'"):
            load_domain(path, CLASSES, labelled=False)
    for path in ("../data/x", "photos/list.csv", "photos/x.parquet", "photos/", "/photos"):
        with pytest.raises(ValueError, match="there is no domain"):
            load_domain(path, CLASSES, labelled=False)
    assert not asked
    with pytest.raises(ZeroDivisionError):
        load_domain("somebody/streets", CLASSES, labelled=False)
    assert asked == ["somebody/streets"]


def test_what_save_to_disk_left_is_a_domain(tmp_path):
    table = Dataset.from_parquet(as_parquet(tmp_path / "data")["path"], cache_dir=str(tmp_path / "cache"))
    table.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"val": table}).save_to_disk(str(tmp_path / "more"))
    for path, split in (("one", "train"), ("more", "val")):
        config = DomainConfig(path=str(tmp_path / path), split=split, class_names=CLASSES)
        assert np.array_equal(load_domain(config, CLASSES).labels(2), arrays(2)[1])
    with pytest.raises(ValueError, match="has no split 'train': it has val"):
        load_domain(DomainConfig(path=str(tmp_path / "more")), CLASSES)


def test_a_full_disk_of_the_cache_is_named(tmp_path, monkeypatch):
    finalize = ArrowWriter.finalize

    def full(*args, **how):
        finalize(*args, **how)
        raise OSError(errno.ENOSPC, "No space left on device")

    folders = DomainConfig(**as_folders(tmp_path / "data"), class_names=CLASSES)
    parquet = DomainConfig(**as_parquet(tmp_path / "parquet"), class_names=CLASSES)
    monkeypatch.setattr(ArrowWriter, "finalize", full)
    check_domain(load_domain(folders, CLASSES), CLASSES)  # needs no such cache
    message = rf"cannot write its cache {tmp_path / 'cache'}: .*No space left.*HF_HOME"
    with pytest.raises(RunFailed, match=message):
        load_domain(parquet, CLASSES)


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_the_card_of_a_data_set_sends_nobody_elsewhere(name, tmp_path, beacon):
    url, asked = beacon
    write(tmp_path / "data" / "x.parquet", b"")
    for place in (url.replace("png", "parquet"), "/etc/x.parquet", "../x.parquet", f"zip://x.csv::{url}"):
        text = f"configs:\n- config_name: a\n  data_files:\n  - split: train\n    path: [x.parquet, '{place}']\n"
        (tmp_path / "data" / name).write_text(f"---\n{text}---\n" if name == "README.md" else text)
        for options in ({}, {"streaming": True}):
            with pytest.raises(ValueError, match=f"{name} says that files of the data set lie at .*nothing is opened"):
                load_domain(DomainConfig(path=str(tmp_path / "data"), **options), CLASSES, labelled=False)
    assert not asked
