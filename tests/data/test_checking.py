"""Planted faults are found by name, clean sets raise none, and the page shows what was found."""

import io
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from t2sda_hf.cli import main
from t2sda_hf.config import DomainConfig
from t2sda_hf.data.checking import compare, inspect_domain, rarity
from t2sda_hf.data.domains import load_domain
from t2sda_hf.data.sheet import draw_sheet
from t2sda_hf.data.streets import draw_scene
from t2sda_hf.labels import CITYSCAPES_CLASSES

SIZE = (48, 80)
COUNT = 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def scene(seed):
    return draw_scene("target", np.random.default_rng(seed), *SIZE)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)


def street_folders(root, first=0):
    for index in range(COUNT):
        image, labels = scene(first + index)
        save(root / "images" / f"{index}.png", image)
        save(root / "labels" / f"{index}.png", labels)
    return root


def config(root, **options):
    return DomainConfig(path=str(root / "images"), label_path=str(root / "labels"), **options)


def turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "images" / "2.png", scene(2)[0], exif=exif)


def coloured(root, noise=0):
    labels = scene(2)[1]
    rgb = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)[labels]
    if noise:
        rgb = cv2.GaussianBlur(rgb, (5, 5), 2)
    save(root / "labels" / "2.png", rgb)


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def palette_as_grey(root):
    picture = Image.fromarray(scene(2)[1])
    picture.putpalette(np.random.default_rng(0).integers(40, 250, 768, dtype=np.uint8).tobytes())
    save(root / "labels" / "2.png", picture.convert("L"))


def swapped(root):
    (root / "images").rename(root / "x")
    (root / "labels").rename(root / "images")
    (root / "x").rename(root / "labels")


def changed(column, name, change):
    """Replace the label map or image number 2 by `change` of its pixels."""

    def plant(root):
        position = ("images", "labels").index(column)
        save(root / column / name, change(scene(2)[position]))

    return plant


def write(name, data):
    def plant(root):
        (root / name).write_bytes(data)

    return plant


def animation(root):
    frames = [Image.fromarray(scene(seed)[0]) for seed in range(2)]
    frames[0].save(root / "images" / "2.png", save_all=True, append_images=frames[1:])


def jpeg_labels(root):
    file = io.BytesIO()
    Image.fromarray(scene(2)[1]).save(file, format="JPEG")
    (root / "labels" / "2.png").write_bytes(file.getvalue())


def every_label(change):
    def plant(root):
        for index in range(COUNT):
            save(root / "labels" / f"{index}.png", change(scene(index)[1]).astype(np.uint8))

    return plant


def wrong_bit(name):
    """In the last quarter of the file, where decoding goes on without a complaint, or not."""

    def plant(root):
        data = bytearray((root / name).read_bytes())
        data[len(data) * 3 // 4] ^= 1
        (root / name).write_bytes(bytes(data))

    return plant


# What was done: (how, kind that must be found, part of its example)
PLANTED = {
    "text instead of an image": (write("images/2.png", b"hello"), "image unreadable", "2.png"),
    "empty image file": (write("images/2.png", b""), "image empty", "0 bytes"),
    "cut image": (lambda root: cut(root / "images" / "2.png"), "image cut or damaged", "2.png"),
    "one wrong bit in an image": (wrong_bit("images/2.png"), "image cut or damaged", "2.png"),
    "one wrong bit in a label map": (wrong_bit("labels/2.png"), "label map cut or damaged", "2.png"),
    "cut label map": (
        lambda root: (root / "labels" / "2.png").write_bytes((root / "labels" / "2.png").read_bytes()[:120]),
        "label map cut or damaged",
        "2.png",
    ),
    "empty label map": (write("labels/2.png", b""), "label map empty", "0 bytes"),
    "label map is text": (write("labels/2.png", b"0 1 2"), "label map unreadable", "2.png"),
    "label map of half size": (changed("labels", "2.png", lambda a: a[::2, ::2]), "size mismatch", "label map 40x24"),
    "label map lies on its side": (
        changed("labels", "2.png", lambda a: np.rot90(a).copy()), "label map turned", "label map 48x80",
    ),
    "photo turned by EXIF": (turned, "EXIF rotation against the label map", "orientation 6"),
    "ids beyond the classes": (
        changed("labels", "2.png", lambda a: np.where(a == 0, 34, a).astype(np.uint8)),
        "ids outside the label space", "34 (",
    ),
    "palette turned to grey": (palette_as_grey, "ids outside the label space", "contains the ids"),
    "coloured label map": (coloured, "colours without a class", "label_colors"),
    "smoothed colours": (lambda root: coloured(root, 1), "colours without a class", "smoothed"),
    "JPEG label map": (jpeg_labels, "lossy compression of a label map", "JPEG"),
    "16-bit grey ids": (
        changed("labels", "2.png", lambda a: a.astype(np.uint16) * 256), "ids outside the label space", "256 (",
    ),
    "16-bit colour label map": (
        lambda root: cv2.imwrite(str(root / "labels" / "2.png"), np.dstack([scene(2)[1]] * 3).astype(np.uint16)),
        "16-bit colours as label map", "synthia",
    ),
    "16-bit grey photo": (
        changed("images", "2.png", lambda a: a[..., 0].astype(np.uint16) * 257), "more than 8 bits per channel", "I;16",
    ),
    "animation": (animation, "animated image", "2 frames"),
    "huge image": (
        changed("images", "2.png", lambda a: np.zeros((200, 200, 3), np.uint8)), "image too large", "max_pixels",
    ),
    "nothing but ignored": (changed("labels", "2.png", lambda a: a * 0 + 255), "all pixels ignored", "2.png"),
    "a photo as label map": (
        changed("labels", "2.png", lambda a: np.random.default_rng(0).integers(0, 19, a.shape, dtype=np.uint8)),
        "label map looks like noise", "2.png",
    ),
    "folders swapped": (swapped, "image looks like a label map", "are the folders swapped?"),
    "one class in all": (every_label(lambda a: a * 0), "fewer than two classes", "only road"),
    "ids of another label space": (every_label(lambda a: a + 20), "ids outside the label space", "20 ("),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault, tmp_path):
    plant, kind, example = PLANTED[fault]
    plant(street_folders(tmp_path / "data"))
    facts = inspect_domain(load_domain(config(tmp_path / "data", max_pixels=39_999)), CITYSCAPES_CLASSES)
    faults = {finding.kind: finding for finding in facts.findings if finding.severity == "fault"}
    assert kind in faults, facts.findings
    assert example in faults[kind].example
    assert len(facts.readable) <= COUNT - 1 or kind == "fewer than two classes"


def test_as_many_kinds_of_faults_as_promised():
    """With the three between domains, see below."""
    assert len(PLANTED) >= 25


def facts_of(root, labels=None):
    if labels is not None:
        every_label(labels)(root)
    return inspect_domain(load_domain(config(root)), CITYSCAPES_CLASSES)


def test_faults_between_domains(tmp_path):
    source = facts_of(street_folders(tmp_path / "a"), lambda a: np.where(a == 10, 2, a))  # no sky
    clean = facts_of(street_folders(tmp_path / "b", first=100))
    street_folders(tmp_path / "c", first=200)
    save(tmp_path / "c" / "images" / "4.png", scene(101)[0])
    save(tmp_path / "c" / "images" / "5.png", scene(200)[0])
    test = facts_of(tmp_path / "c")
    found = {
        (finding.domain, finding.kind): finding
        for finding in compare({"source": source, "test": clean}, CITYSCAPES_CLASSES)
    }
    assert found["source and test", "class missing in source"].severity == "fault"
    assert "sky" in found["source and test", "class missing in source"].example
    assert len([finding for finding in found.values() if finding.severity == "fault"]) == 1
    [shared] = compare({"target": clean, "test": test}, CITYSCAPES_CLASSES)
    assert (shared.kind, shared.severity, shared.count) == ("same picture in two domains", "fault", 1)
    assert "image 1 of" in shared.example
    assert "image 4 of" in shared.example
    [again] = [finding for finding in test.findings if finding.kind == "same picture twice"]
    assert again.example == "image 5 is image 0 again"


def clean_sets(root):
    street_folders(root / "own")
    yield load_domain(config(root / "own")), CITYSCAPES_CLASSES
    for name in ("streets-source", "streets-target"):
        yield load_domain(DomainConfig(path=name, num_images=24)), CITYSCAPES_CLASSES
    yield load_domain(DomainConfig(path="streets-target", num_images=8), labelled=False), CITYSCAPES_CLASSES


def test_clean_sets_raise_no_alarm(tmp_path):
    for domain, classes in clean_sets(tmp_path):
        facts = inspect_domain(domain, classes)
        assert {finding.kind for finding in facts.findings} <= {"class never shown"}  # a note, and true
        assert len(facts.readable) == facts.num_images == len(domain)


def test_counts_sizes_and_the_curve_of_rare_classes(tmp_path):
    facts = facts_of(street_folders(tmp_path))
    expected = np.stack([np.bincount(scene(i)[1].ravel(), minlength=19)[:19] for i in range(COUNT)])
    assert np.array_equal(facts.counts, expected)
    assert facts.ignored == 0
    assert facts.sizes == {SIZE: COUNT}
    shares, drawn = rarity(facts, 0.01)
    assert shares == pytest.approx(expected.sum(0) / expected.sum())
    present = shares > 0
    weights = np.exp((1 - shares[present]) / 0.01 - 100)
    assert drawn[present] == pytest.approx(weights / weights.sum())
    assert not drawn[~present].any()


def test_a_broken_image_leaves_the_others_with_their_sizes(tmp_path, capsys):
    """Sizes and pixels per class belong to the same images, whatever is broken between them."""
    street_folders(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    for name in ("images", "labels"):
        with Image.open(tmp_path / name / "3.png") as picture:
            picture.resize((160, 96), Image.Resampling.NEAREST).save(tmp_path / name / "3.png")
    facts = facts_of(tmp_path)
    assert facts.shapes == [SIZE, None, SIZE, (96, 160), SIZE, SIZE]
    assert facts.sizes == {SIZE: 4, (96, 160): 1}
    words = [f"--source.path={tmp_path / 'images'}", f"--source.label_path={tmp_path / 'labels'}", "--processes=1"]
    assert main(["check", *words, "--only", "source", "--output", str(tmp_path / "out")]) == 1
    assert "a run: crops of " in capsys.readouterr().out


def test_several_processes_find_what_one_finds(tmp_path):
    domain = load_domain(DomainConfig(path="streets-target", num_images=20))
    one, two = (inspect_domain(domain, CITYSCAPES_CLASSES, num_processes=n) for n in (1, 2))
    assert np.array_equal(one.counts, two.counts)
    assert (one.hashes, one.findings, one.sizes) == (two.hashes, two.findings, two.sizes)


def test_the_sheet_shows_image_labels_overlay_and_legend(tmp_path):
    street_folders(tmp_path)
    domain = load_domain(config(tmp_path))
    sheet = np.asarray(draw_sheet(domain, [1, 3], CITYSCAPES_CLASSES))
    colors = {tuple(color) for color in sheet.reshape(-1, 3)}
    assert {(128, 64, 128), (70, 130, 180)} <= colors  # road and sky
    assert sheet.shape[1] == 3 * 294 + 6
    unlabelled = load_domain(config(tmp_path), labelled=False)
    assert draw_sheet(unlabelled, range(6), CITYSCAPES_CLASSES).height < sheet.shape[0]


def test_the_command_checks_a_run_and_writes_one_page(tmp_path, capsys):
    street_folders(tmp_path / "s")
    street_folders(tmp_path / "t", first=50)
    write("labels/2.png", b"<script>alert(1)</script>")(tmp_path / "s")
    (tmp_path / "s" / "images" / "2.png").rename(tmp_path / "s" / "images" / "<b>2&.png")
    (tmp_path / "s" / "labels" / "2.png").rename(tmp_path / "s" / "labels" / "<b>2&.png")
    arguments = ["--output", str(tmp_path / "out"), "--processes", "1", "--pictures", "2"]
    for role, name in (("source", "s"), ("target", "t")):
        arguments += [f"--{role}.path", str(tmp_path / name / "images")]
        arguments += [f"--{role}.label_path", str(tmp_path / name / "labels")]
    assert main(["check", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "fault: label map unreadable, 1x in" in printed
    assert "1 kinds of faults" in printed
    assert "a run: crops of 32x64 in windows of 48x80, from source images of 48x80" in printed
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "label map unreadable" in page
    assert "&lt;b&gt;2&amp;.png" in page
    assert "<b>2" not in page
    assert not re.search(r'src="(?!data:)', page)  # it needs no network, and no other file but for a closer look
    assert re.findall(r'href="([^"]*)"', page) == ["source.png", "target.png"]
    assert page.index("<img") < page.index("<h1>")  # it opens with the pictures
    assert page.count('<div class="scroll"><table>') == page.count("<table") == 2
    assert page.count("<h2>") == 3  # the run, and each domain
    for role in ("source", "target"):
        with Image.open(tmp_path / "out" / f"{role}.png") as sheet:
            assert sheet.width == 888
    for index in range(COUNT):
        (tmp_path / "s" / "images" / f"{index}.png").write_bytes(b"no picture") if index != 2 else None
    (tmp_path / "s" / "images" / "<b>2&.png").write_bytes(b"no picture")
    assert main(["check", *arguments]) == 1  # nothing is left of the source, and nothing is said of a run
    assert "a run:" not in capsys.readouterr().out
    clean = ["--source.path", "streets-source", "--source.num_images", "8", "--output", str(tmp_path / "clean")]
    assert main(["check", *clean, "--processes", "1"]) == 0
    assert main(["check", "--output", str(tmp_path / "none")]) == 2
    assert "nothing to check" in capsys.readouterr().err


def test_of_an_upper_bound_the_labels_of_the_target_are_checked_and_no_source(tmp_path, capsys):
    street_folders(tmp_path / "t")
    street_folders(tmp_path / "test", first=50)
    arguments = ["--method=target_only", "--source.path=nowhere", "--output", str(tmp_path / "out"), "--processes", "1"]
    for role, name in (("target", "t"), ("test", "test")):
        arguments += [f"--{role}.path", str(tmp_path / name / "images")]
        arguments += [f"--{role}.label_path", str(tmp_path / name / "labels")]
    assert main(["check", *arguments]) == 0
    assert "a run: crops of 32x64, from target images of 48x80" in capsys.readouterr().out
    write("labels/2.png", b"no picture")(tmp_path / "t")
    assert main(["check", *arguments]) == 1
    assert "fault: label map unreadable, 1x in" in capsys.readouterr().out
    assert main(["check", *arguments, "--method=t2sda", "--only", "target"]) == 0  # nobody else looks at them
