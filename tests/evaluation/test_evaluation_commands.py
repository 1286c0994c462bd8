"""Evaluate, predict and analyze on a tiny model and images on disk, in this process, and as a user starts them."""

import csv
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from running import fork
from safetensors.torch import load_file, save_file

from t2sda_hf.cli import main
from t2sda_hf.commands.evaluate import models_of
from t2sda_hf.commands.predict import find_images
from t2sda_hf.config import DomainConfig, dump_config, load_config
from t2sda_hf.data.domains import domain_contents, load_domain
from t2sda_hf.data.transforms import KeepRatio
from t2sda_hf.evaluation.evaluator import evaluate_model
from t2sda_hf.evaluation.inference import (
    load_model,
    predict_labels,
    saved_image_size,
    smaller_windows,
    to_pixel_values,
)
from t2sda_hf.evaluation.models import called, model_of
from t2sda_hf.evaluation.pictures import draw_legend
from t2sda_hf.labels import palette
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor

CLASSES = ("road", "building", "sky", "car")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny network with random weights and the processor of a training at 32 x 64 pixels."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = T2SDAConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 8, 16, 16),
        num_attention_heads=(1, 1, 2, 2),
        decoder_hidden_size=8,
        projector_dim=4,
        projector_hidden=4,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: class_id for class_id, name in enumerate(CLASSES)},
    )
    T2SDAForSemanticSegmentation(config).save_pretrained(folder)
    T2SDAImageProcessor(size=(32, 64)).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Images of different formats, modes and sizes, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, mode, (width, height) in [
        ("wide.png", "RGB", (70, 41)),
        ("grey.bmp", "L", (40, 50)),
        ("clear.webp", "RGBA", (33, 65)),
        ("dot.tif", "RGB", (1, 1)),
        ("space and ümlaut.JPG", "RGB", (20, 90)),
    ]:
        noise = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        Image.fromarray(noise[..., 0] if mode == "L" else noise).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def open_image(path):
    """The picture, decoded, with its file closed again."""
    with Image.open(path) as picture:
        picture.load()
        return picture


def predict(model_folder, images, output, *options):
    return main(["predict", str(model_folder), str(images), "--output", str(output), *options])


def last_error_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_evaluate_prints_and_saves_what_the_evaluator_returns(model_folder, tmp_path, capsys):
    output = tmp_path / "new folder" / "scores.json"

    code = main(["evaluate", str(model_folder), "--domain", "streets-target", "--limit", "2", "--output", str(output)])

    assert code == 0
    model, classes = load_model(str(model_folder))
    domain = load_domain(DomainConfig(path="streets-target", split="validation"), classes)
    expected = evaluate_model(model, domain, image_size=(32, 64), classes=CLASSES, limit=2, progress=False)
    saved = json.loads(output.read_text())
    assert {key: saved[key] for key in expected} == expected
    assert (saved["model"], saved["image_size"], saved["mode"]) == (str(model_folder), [32, 64], "whole")
    assert saved["inputs"] == {"data": domain_contents(domain).fingerprint}
    printed = capsys.readouterr().out
    assert "streets-target (validation), 2 images" in printed
    assert all(f"| {name} " in printed for name in (*CLASSES, "mIoU", "pixel accuracy"))


def test_evaluate_takes_windows_sizes_and_names_of_ids(model_folder, tmp_path):
    output = tmp_path / "scores.json"
    windows = ["--mode", "slide", "--window", "32", "48", "--stride", "16", "24", "--image_size", "48", "96"]
    names = ["--class_names", "car", "road", *(f"other {n}" for n in range(17))]

    code = main(
        [
            "evaluate",
            str(model_folder),
            "--domain",
            "streets-source",
            "--limit",
            "1",
            *windows,
            *names,
            "--output",
            str(output),
        ]
    )

    saved = json.loads(output.read_text())
    assert code == 0
    assert (saved["window"], saved["stride"], saved["image_size"]) == ([32, 48], [16, 24], [48, 96])
    pixels_of_label = dict(zip(CLASSES, np.sum(saved["confusion"], axis=1), strict=True))
    assert pixels_of_label["road"] > 0  # ids 1, in truth the pavement
    assert pixels_of_label["building"] == pixels_of_label["sky"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--domain", "streets-targt"], "Did you mean 'streets-target'?"),
        (
            ["--domain", "streets-target", "streets-target"],
            "--domain names the same path twice: streets-target streets",
        ),
        (["--domain", "streets-target", "streets-nigth"], "Did you mean 'streets-night'?"),
        (["--domain", "streets-target", "--class_names", "cat", "dog"], "no class is shared"),
        (["--domain", "streets-target", "--label_space", "marscapes"], "label_space must be one of"),
        (["--domain", "streets-target", "--mode", "slide"], "needs evaluation.window and evaluation.stride"),
        (["--domain", "streets-target", "--limit", "0"], "evaluation.limit must be at least 1, got 0"),
    ],
)
def test_evaluate_says_in_one_line_what_is_wrong(model_folder, options, message, capsys):
    assert main(["evaluate", str(model_folder), *options]) == 2

    printed, said = capsys.readouterr()
    assert "IoU" not in printed  # nothing was scored before
    line = said.strip().splitlines()[-1]
    assert line.startswith("ValueError: ")
    assert message in line


def test_missing_model_is_named(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nothing"), "--domain", "streets-target"]) == 2
    assert f"cannot load a model from '{tmp_path / 'nothing'}'" in last_error_line(capsys)


def test_encoder_without_a_trained_head_is_refused(model_folder, tmp_path):
    encoder = tmp_path / "encoder"
    T2SDAForSemanticSegmentation.from_pretrained(model_folder).segformer.save_pretrained(encoder)

    with pytest.raises(ValueError, match="has no segmentation head"):
        load_model(str(encoder))


def with_weights(model_folder, folder, change):
    """A copy of the model whose weights were changed."""
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


COMMANDS = {
    "evaluate": (["evaluate", "{model}", "--domain", "streets-target", "--limit", "2"], r"row 0 .*streets-target"),
    "predict": (["predict", "{model}", "{photos}", "--output", "{out}"], r"photos/clear\.webp"),
    "predict --compare": (
        ["predict", "{model}", "--compare", "--domain", "streets-target", "--limit", "1", "--output", "{out}"],
        "000000",
    ),
    "analyze": (["analyze", "{model}", "--domain", "streets-target", "--limit", "1", "--output", "{out}"], "row 0"),
    "analyze --no_labels": (
        ["analyze", "{model}", "--domain", "{photos}", "--no_labels", "--limit", "1", "--output", "{out}"],
        "image 0",
    ),
}


@pytest.mark.parametrize(("words", "image"), COMMANDS.values(), ids=COMMANDS)
def test_logits_that_are_not_finite_end_a_command_with_the_image(model_folder, photos, tmp_path, capsys, words, image):
    def explode(weights):
        for name, tensor in weights.items():
            if name.endswith("weight"):
                tensor.fill_(1e30)

    model = with_weights(model_folder, tmp_path / "exploded", explode)
    named = {"model": model, "photos": photos, "out": tmp_path / "out"}
    assert main([word.format_map(named) for word in words]) == 1
    line = last_error_line(capsys)
    assert re.match(rf"NotFinite: .*{image}.* NaN or infinite", line), line


def test_weights_that_are_not_finite_are_named_when_a_model_is_loaded(model_folder, tmp_path):
    model = with_weights(
        model_folder, tmp_path / "damaged", lambda weights: weights["decode_head.classifier.bias"].fill_(np.nan)
    )
    with pytest.raises(ValueError, match=r"damaged' holds weights that are NaN .*: decode_head\.classifier\.bias"):
        load_model(str(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1, 1, 1, 10**6]}, "depths must be 4 numbers from 1 to 256"),
        ({"depths": [9, 1, 1, 1]}, "asks for an encoder of .* numbers, and its weights have"),
        ({"id2label": {str(i): f"c{i}" for i in range(20_000)}}, "at most 10000 classes"),
        ({"id2label": {"0": "road", "1": "building", "2": "sky", "4": "car"}}, "without a gap; got 0, 1, 2, 4"),
        ({"strides": []}, "holds a value that means nothing"),
        ({"hidden_act": "x"}, "holds a value that means nothing"),
        ({"depths": [1, 1, 1, 1.5]}, "holds a value that means nothing"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_refused_before_they_are_built(
    model_folder, tmp_path, change, message
):
    model = shutil.copytree(model_folder, tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        load_model(str(model))


def test_input_size_is_read_from_the_processor_beside_the_model(model_folder, tmp_path):
    assert saved_image_size(str(model_folder)) == (32, 64)

    T2SDAImageProcessor(size=None).save_pretrained(tmp_path)
    assert saved_image_size(str(tmp_path)) is None

    T2SDAImageProcessor(size=(32, 64), resize="keep_ratio").save_pretrained(tmp_path)
    assert saved_image_size(str(tmp_path)) == KeepRatio((32, 64))

    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 64}}')
    with pytest.raises(ValueError, match=r"does not state one height and width.*--image_size"):
        saved_image_size(str(tmp_path))


def test_images_keep_their_shape_where_the_processor_says_so(model_folder, photos, tmp_path, capsys):
    """A portrait photo is not stretched to the landscape of the test images, in `predict` as in the processor."""
    folder = tmp_path / "fitted"
    shutil.copytree(model_folder, folder)
    processor = T2SDAImageProcessor(size=(64, 128), resize="keep_ratio")
    processor.save_pretrained(folder)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, (height, width) in (("wide", (50, 90)), ("upright", (90, 60))):
        noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(mixed / f"{name}.png")
    assert predict(folder, mixed, tmp_path / "out") == 0
    model, _ = load_model(str(folder))
    for name in ("wide", "upright"):
        image = np.array(open_image(mixed / f"{name}.png"))
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        expected = processor.post_process_semantic_segmentation(outputs, [image.shape[:2]])[0]
        np.testing.assert_array_equal(np.array(open_image(tmp_path / "out" / f"{name}_ids.png")), expected)
    upright = to_pixel_values(image, KeepRatio((64, 128)), torch.device("cpu"))
    assert upright.shape == (1, 3, 96, 64)  # of 90 x 60


def test_model_without_a_processor_needs_a_given_size(model_folder, photos, tmp_path, capsys):
    folder = tmp_path / "bare"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("preprocessor_config.json"))

    assert predict(folder, photos, tmp_path / "out") == 2
    assert "--image_size HEIGHT WIDTH" in last_error_line(capsys)
    assert predict(folder, photos / "wide.png", tmp_path / "out", "--image_size", "32", "64") == 0


def test_predict_writes_ids_colours_and_overlay_at_the_original_size(model_folder, photos, tmp_path):
    output = tmp_path / "new" / "folder"

    assert predict(model_folder, photos, output) == 0

    images = [file for file in photos.iterdir() if file.suffix != ".txt"]
    assert {file.name for file in output.iterdir()} == {
        "legend.png",
        *(f"{image.stem}_{kind}.png" for image in images for kind in ("ids", "color", "overlay")),
    }
    for path in images:
        original = open_image(path).convert("RGB")
        ids = open_image(output / f"{path.stem}_ids.png")
        color = open_image(output / f"{path.stem}_color.png")
        overlay = open_image(output / f"{path.stem}_overlay.png")
        assert ids.size == color.size == overlay.size == original.size
        assert (ids.mode, color.mode, overlay.mode) == ("L", "P", "RGB")
        np.testing.assert_array_equal(np.array(color), np.array(ids))
        colors = palette(CLASSES)[np.array(ids)]
        np.testing.assert_array_equal(np.array(color.convert("RGB")), colors)
        middle = (np.array(original, dtype=float) + colors) / 2
        assert np.abs(np.array(overlay) - middle).max() <= 0.5


def test_what_predict_does_not_read_is_said(photos, capsys):
    """Files that macOS puts beside every photo are hidden; a folder or a photo of a phone is not read either."""
    before = find_images(photos)
    capsys.readouterr()
    (photos / "._wide.png").write_bytes(b"\0\5\26\7")
    (photos / "IMG_1.HEIC").write_bytes(b"?")
    (photos / "sub").mkdir()
    assert find_images(photos) == before
    said = capsys.readouterr().err
    assert said.startswith(f"{photos}: {len(before)} of ")
    for reason in ("1 hidden", "1 .heic (save them as JPEG or PNG)", "1 folders"):
        assert reason in said
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        find_images(photos / "nowhere")


def test_predicted_ids_are_those_of_the_model(model_folder, photos, tmp_path):
    predict(model_folder, photos / "wide.png", tmp_path / "out", "--image_size", "64", "96")

    model, _ = load_model(str(model_folder))
    image = np.array(open_image(photos / "wide.png"))
    expected = predict_labels(model, to_pixel_values(image, (64, 96), torch.device("cpu")), (41, 70))
    np.testing.assert_array_equal(np.array(open_image(tmp_path / "out" / "wide_ids.png")), expected[0].numpy())


def test_predict_and_evaluate_compute_as_the_precision_says(model_folder, photos, tmp_path, monkeypatch):
    inside = []

    def load(name):
        model, classes = load_model(name)
        model.decode_head.classifier.register_forward_hook(lambda module, given, made: inside.append(made.dtype))
        return model, classes

    monkeypatch.setattr("t2sda_hf.commands.predict.load_model", load)
    monkeypatch.setattr("t2sda_hf.commands.evaluate.load_model", load)
    AcceleratorState._reset_state()
    predict(model_folder, photos / "wide.png", tmp_path / "out", "--train.precision=bf16")
    main(["evaluate", str(model_folder), "--domain", "streets-target", "--limit", "1", "--train.precision=bf16"])
    AcceleratorState._reset_state()
    assert inside == [torch.bfloat16] * 2


def short_of_memory(monkeypatch, most):
    """No input of the network may have more pixels than that, as on a small GPU."""
    forward = T2SDAForSemanticSegmentation.forward

    def limited(self, pixel_values, *args, **kwargs):
        if pixel_values.shape[-2] * pixel_values.shape[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(T2SDAForSemanticSegmentation, "forward", limited)


def test_predict_takes_smaller_windows_where_memory_runs_out_and_says_so(
    model_folder, photos, tmp_path, monkeypatch, capsys
):
    size = ("--image_size", "256", "384")
    slide = ("--mode", "slide", "--window", "64", "96", "--stride", "48", "72")
    assert predict(model_folder, photos / "wide.png", tmp_path / "slide", *size, *slide) == 0
    short_of_memory(monkeypatch, 64 * 96)
    capsys.readouterr()
    assert predict(model_folder, photos / "wide.png", tmp_path / "out", *size) == 0

    said = re.findall("The memory does not suffice.*", capsys.readouterr().err)
    assert said == [
        f"The memory does not suffice for {before} pixels at once: from here on in windows of {now}, as with --mode "
        f"slide --window {now.replace('x', ' ')} --stride {stride}."
        for before, now, stride in (("256x384", "128x192", "96 144"), ("128x192", "64x96", "48 72"))
    ]
    ids = [np.array(open_image(tmp_path / name / "wide_ids.png")) for name in ("slide", "out")]
    np.testing.assert_array_equal(*ids)

    short_of_memory(monkeypatch, 0)
    assert predict(model_folder, photos / "wide.png", tmp_path / "none", *size) == 1
    advice = "OutOfMemory: CUDA out of memory. Tried to allocate 20.00 GiB. Lower evaluation.window [64, 96] and"
    assert advice in capsys.readouterr().err


def test_evaluate_says_what_to_lower_where_memory_runs_out(model_folder, monkeypatch, capsys):
    """It takes no smaller windows by itself: the score would be another one."""
    short_of_memory(monkeypatch, 0)
    assert main(["evaluate", str(model_folder), "--domain", "streets-target", "--limit", "1"]) == 1
    assert "Tried to allocate 20.00 GiB. Set evaluation.mode slide, with evaluation.window" in last_error_line(capsys)


@pytest.mark.parametrize(
    ("size", "mode", "window", "less"),
    [
        ((1024, 2048), "whole", None, ((512, 1024), (384, 768))),
        ((1080, 1914), "whole", None, ((544, 960), (408, 720))),
        ((1024, 2048), "slide", (1024, 1024), ((512, 512), (384, 384))),
        ((128, 2048), "slide", (1024, 1024), ((64, 512), (48, 384))),
        ((64, 2048), "whole", None, None),
    ],
)
def test_smaller_windows_are_half_as_large_and_overlap_by_a_quarter(size, mode, window, less):
    assert smaller_windows(size, mode, window) == less


def test_exif_orientation_is_applied(model_folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)

    assert predict(model_folder, tmp_path / "turned.jpg", tmp_path / "out") == 0

    assert open_image(tmp_path / "out" / "turned_ids.png").size == (40, 60)
    assert open_image(tmp_path / "out" / "turned_overlay.png").size == (40, 60)


def test_existing_predictions_are_replaced_only_on_request(model_folder, photos, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "wide_color.png").write_text("precious")

    assert predict(model_folder, photos, output) == 2

    assert "wide_color.png exists" in last_error_line(capsys)
    assert [file.name for file in output.iterdir()] == ["wide_color.png"]
    assert (output / "wide_color.png").read_text() == "precious"
    assert predict(model_folder, photos, output, "--overwrite") == 0
    assert open_image(output / "wide_color.png").mode == "P"


def test_predictions_never_replace_the_images_themselves(model_folder, photos, capsys):
    before = (photos / "wide.png").read_bytes()
    (photos / "wide.png").rename(photos / "a_ids.png")
    Image.new("RGB", (40, 40)).save(photos / "a.png")

    assert predict(model_folder, photos, photos, "--overwrite") == 2

    assert f"{photos} is read as data" in last_error_line(capsys)
    assert (photos / "a_ids.png").read_bytes() == before


def test_predictions_may_lie_in_a_folder_beside_the_images(model_folder, photos, monkeypatch):
    """As in `t2sda predict RUN . --output out`: folders of the folder are not read."""
    monkeypatch.chdir(photos)
    for _ in range(2):
        assert predict(model_folder, ".", "out", "--overwrite") == 0
    assert (photos / "out" / "wide_ids.png").is_file()
    assert not list((photos / "out").glob("*_ids_ids.png"))


def test_images_that_share_a_stem_are_refused(model_folder, photos, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(photos / "wide.bmp")

    assert predict(model_folder, photos, tmp_path / "out") == 2

    line = last_error_line(capsys)
    assert "wide.bmp" in line
    assert "wide.png" in line


@pytest.mark.parametrize("kind", ["text", "cut", "sixteen bits", "twelve of sixteen bits", "huge"])
def test_a_broken_image_is_named_and_the_others_are_predicted(model_folder, photos, tmp_path, capsys, kind):
    broken, output = photos / "a broken.png", tmp_path / "out"
    if kind == "text":
        broken.write_text("not an image")
    elif kind == "cut":
        broken.write_bytes((photos / "wide.png").read_bytes()[:2000])
    elif kind == "huge":
        Image.new("1", (6000, 6000)).save(broken)
    elif kind == "sixteen bits":
        Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(broken)
    else:
        cv2.imwrite(str(broken), np.full((40, 40, 3), 4000, np.uint16))
    (photos / "folder.png").mkdir()  # a name alone makes no picture

    assert predict(model_folder, photos, output) == 1

    printed = capsys.readouterr()
    assert f"5 of 6 files in {output}. The colours of the classes: {output / 'legend.png'}" in printed.out
    assert "1 could not be read and is left out:" in printed.err
    assert printed.err.strip().splitlines()[-1].startswith(f"{broken} ")
    assert (output / "wide_ids.png").is_file()
    assert not list(output.glob("*broken*"))
    assert predict(model_folder, broken, tmp_path / "none") == 2
    assert last_error_line(capsys).startswith(f"ValueError: {broken} ")
    assert not (tmp_path / "none").exists()
    if kind == "huge":
        assert predict(model_folder, broken, tmp_path / "large", "--max_pixels", "40000000") == 0


def test_a_legend_has_every_class_and_replaces_no_other_picture(model_folder, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert predict(model_folder, photos / "wide.png", output) == 0
    legend = open_image(output / "legend.png").convert("RGB")
    assert {tuple(color) for color in palette(CLASSES).tolist()} <= {color for _, color in legend.getcolors(1 << 16)}
    assert predict(model_folder, photos / "grey.bmp", output) == 0  # the same legend
    (output / "legend.png").write_text("precious")
    assert predict(model_folder, photos / "dot.tif", output) == 2
    assert "legend.png exists" in last_error_line(capsys)
    assert (output / "legend.png").read_text() == "precious"
    assert draw_legend(["$x_1$", "a$", "straße"] * 85).startswith(b"\x89PNG")


def test_of_a_run_the_adapted_student_is_taken(model_folder, photos, tmp_path, capsys):
    for method in ("source_only", "t2sda"):
        shutil.copytree(model_folder, tmp_path / "run" / method / "student")
    assert predict(tmp_path / "run", photos / "wide.png", tmp_path / "out") == 0
    student = tmp_path / "run" / "t2sda" / "student"
    assert f"its student {student} is taken" in capsys.readouterr().err
    assert model_of(str(tmp_path / "run" / "source_only")) == str(tmp_path / "run" / "source_only" / "student")
    assert model_of("me/streets") == called("me/streets").replace("streets", "me/streets")
    assert called(str(student)) == "run, t2sda"


def test_of_a_method_its_student_is_taken_and_before_its_end_that_of_the_newest_checkpoint(model_folder, tmp_path):
    method = tmp_path / "run" / "t2sda"
    for step in ("000020", "000100", "1000000"):
        shutil.copytree(model_folder, method / f"checkpoint-{step}" / "student")
    for debris in (".checkpoint-2000000.partial", ".checkpoint-000010.deleted"):
        shutil.copytree(model_folder, method / debris / "student")
    shutil.copytree(model_folder, method / "checkpoint-3000000" / "student")
    (method / "checkpoint-3000000" / "student" / "model.safetensors").unlink()  # as with a frozen encoder
    newest = method / "checkpoint-1000000" / "student"
    assert model_of(str(method)) == str(newest)
    assert [folder for folder, _ in models_of(str(method)).values()] == [str(newest)]
    shutil.copytree(model_folder, method / "student")
    assert model_of(str(method)) == str(method / "student")
    assert {folder for folder, _ in models_of(str(method)).values()} == {str(method / "student")}


@pytest.mark.parametrize("path", ["photos/notes.txt", "nowhere", "empty"])
def test_path_without_images_is_named(model_folder, photos, tmp_path, capsys, path):
    (tmp_path / "empty").mkdir()

    assert predict(model_folder, tmp_path / path, tmp_path / "out") == 2

    assert str(tmp_path / path) in last_error_line(capsys)


# ------------------------------------------------------------------------ labelled domains that need more than a path


@pytest.fixture
def mapped(tmp_path):
    """A config whose test domain has other names, other file names and a crop box, and truth (in class ids of CLASSES)
    by file name."""
    rng, truth = np.random.default_rng(0), {}
    for folder in ("images", "masks"):
        (tmp_path / "city" / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        ids = rng.integers(0, 5, (6, 9)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(rng.integers(0, 256, (48, 72, 3), dtype=np.uint8)).save(tmp_path / f"city/images/{name}.png")
        Image.fromarray(ids).save(tmp_path / f"city/masks/{name}.png")
        truth[name] = np.array([255, 0, 2, 3, 1], np.uint8)[ids][8:, :64]
    domain = {
        "path": str(tmp_path / "city" / "images"),
        "label_path": str(tmp_path / "city" / "masks"),
        "split": "train",
        "class_names": ["void", "street", "heaven", "vehicle", "house"],
        "label_map": {"street": "road", "heaven": "sky", "vehicle": "car", "house": "building"},
        "crop_box": [8, 0, 40, 64],
    }
    config = {
        "test": domain,
        "source": domain | {"crop_box": [0, 8, 40, 64]},
        "classes": list(CLASSES),
        "rcs.min_pixels": 5,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path / "mine.yaml", domain, truth


def test_evaluate_and_analyze_read_a_domain_as_training_does(model_folder, mapped, tmp_path, capsys):
    config, domain, truth = mapped
    flags = [text for key, value in domain.items() if key != "path" for text in (f"--{key}", json.dumps(value))]
    for name, words in (("file", ["--config", str(config)]), ("flags", ["--domain", domain["path"], *flags])):
        assert main(["evaluate", str(model_folder), *words, "--output", str(tmp_path / f"{name}.json")]) == 0
    scores = json.loads((tmp_path / "file.json").read_text())
    assert scores == json.loads((tmp_path / "flags.json").read_text())
    assert sum(scores["confusion"][1]) == sum(int((labels == 1).sum()) for labels in truth.values()) > 0

    words = ["--config", str(config), "--output", str(tmp_path / "figures"), "--num_pictures", "2"]
    assert main(["analyze", f"ours={model_folder}", *words, "--per_class", "16"]) == 0
    figures = {file.name for file in (tmp_path / "figures").glob("*.png")}
    assert figures == {f"{name}.png" for name in ("similarity", "relation", "distances", "tsne_ours", "pictures")}
    with (tmp_path / "figures" / "similarity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"]: float(row["IoU, %: ours"]) for row in rows} == pytest.approx(scores["iou"])
    assert all(-1 <= float(row["similarity to the source: ours"]) <= 1 for row in rows)
    capsys.readouterr()

    assert main(["analyze", str(model_folder), *words, "--label_map", "{}"]) == 2
    assert "no class is shared" in last_error_line(capsys)


def test_analyze_without_labels_needs_none(model_folder, photos, tmp_path, capsys):
    words = [str(model_folder), "--domain", str(photos), "--split", "train", "--output", str(tmp_path / "out")]
    assert main(["analyze", *words]) == 2
    assert "--no_labels" in last_error_line(capsys)
    assert main(["analyze", *words, "--no_labels"]) == 0
    assert {"proxies.csv", "classes.png", "pictures.png"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_predict_compares_with_the_truth_of_a_domain(model_folder, mapped, tmp_path, capsys):
    config, _, truth = mapped
    (tmp_path / "city" / "images" / "c.png").write_bytes(b"damaged")
    out = tmp_path / "out"
    assert main(["predict", str(model_folder), "--compare", "--config", str(config), "--output", str(out)]) == 1

    kinds = ("ids", "color", "overlay", "compare")
    stems = ("000000_a", "000001_b")
    assert {file.name for file in out.iterdir()} == {
        "legend.png",
        *(f"{stem}_{kind}.png" for stem in stems for kind in kinds),
    }
    printed = capsys.readouterr()
    assert "1 of 3 images of" in printed.err
    assert "2 images of" in printed.out
    model, _ = load_model(str(model_folder))
    image = np.array(open_image(tmp_path / "city" / "images" / "a.png"))[8:, :64]
    expected = predict_labels(model, to_pixel_values(image, (32, 64), torch.device("cpu")), truth["a"].shape)
    np.testing.assert_array_equal(np.array(open_image(out / "000000_a_ids.png")), expected[0].numpy())
    assert open_image(out / "000000_a_compare.png").width > 4 * 300

    again = ["predict", str(model_folder), "--compare", "--domain", "streets-target", "--output", str(out)]
    assert main([*again, "--limit", "1", "--confidence"]) == 0
    assert (out / "000000_target_validation_00000_confidence.png").is_file()
    assert len(list(out.glob("*_compare.png"))) == 3
    assert main([*again, "--limit", "1"]) == 2
    assert "000000_target_validation_00000_ids.png exists" in last_error_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to segment"),
        (["photos", "--compare", "--domain", "streets-target"], "instead of images: leave out photos"),
        (["photos", "--domain", "streets-target"], "which only --compare reads"),
        (["--compare"], "no labelled domain was named"),
        (["--compare", "--domain", "streets-target", "streets-source"], "one domain here"),
        (["--compare", "--domain", "PHOTOS", "--split", "train"], "give them instead of --compare"),
    ],
)
def test_what_predict_is_to_look_at_is_said_once(model_folder, photos, words, message, tmp_path, capsys):
    words = [str(photos) if word == "PHOTOS" else word for word in words]
    assert main(["predict", str(model_folder), *words, "--output", str(tmp_path / "out")]) == 2
    assert message in last_error_line(capsys)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- as processes


def test_both_run_as_processes(model_folder, photos, tmp_path):
    assert "mIoU" in fork(1, "-m", "t2sda_hf", "evaluate", str(model_folder), "--domain", "streets-target", "--limit=1")
    predict = ("predict", str(model_folder), str(photos / "notes.txt"), "--output", str(tmp_path / "out"))
    with pytest.raises(AssertionError, match=r"^\[2\]: ") as failed:
        fork(1, "-m", "t2sda_hf", *predict)
    assert "Traceback" not in str(failed.value)
    assert str(failed.value).strip().splitlines()[-1].startswith("ValueError: ")


@pytest.mark.two_processes
def test_two_processes_print_once_and_save_the_scores_of_one(model_folder, tmp_path):
    arguments = [str(model_folder), "--domain", "streets-target", "--limit", "3", "--output"]
    two = fork(2, "-m", "t2sda_hf", "evaluate", *arguments, str(tmp_path / "two.json"))

    assert two.count("| mIoU ") == 1
    assert main(["evaluate", *arguments, str(tmp_path / "one.json")]) == 0
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())


def test_a_command_replaces_what_it_wrote_until_somebody_changed_it(model_folder, tmp_path, capsys):
    output = tmp_path / "scores.json"
    words = ["evaluate", str(model_folder), "--domain", "streets-target", "--limit", "1", "--output", str(output)]
    assert main(words) == main(words) == 0
    with output.with_suffix(".csv").open("a") as file:
        file.write("a note of mine\n")
    assert main(words) == 2
    assert f"{output.with_suffix('.csv')} was changed since `t2sda evaluate` wrote it" in last_error_line(capsys)


def test_a_folder_is_no_file_for_scores(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("t2sda_hf.commands.evaluate.make_accelerator", None)  # before anything is begun
    (tmp_path / "b.csv").mkdir()
    for output, folder in ((tmp_path, tmp_path), (tmp_path / "b.json", tmp_path / "b.csv")):
        assert main(["evaluate", str(model_folder), "--domain", "streets-target", "--output", str(output)]) == 2
        assert f"{folder} is a folder: give another" in last_error_line(capsys)


@pytest.mark.parametrize("command", ["evaluate", "analyze", "predict"])
def test_nothing_is_written_into_a_folder_of_data(model_folder, mapped, tmp_path, capsys, command):
    images = tmp_path / "city" / "images"
    output = images / ("scores.json" if command == "evaluate" else "out")
    read = [*(["--compare"] if command == "predict" else []), "--domain", str(images)]
    assert main([command, str(model_folder), *read, "--output", str(output)]) == 2
    assert re.search(rf"{output} lies in {images}, which is read as data", last_error_line(capsys))
    assert not output.exists()


def test_what_ids_mean_is_asked_for_or_taken_from_the_run(model_folder, mapped, tmp_path, capsys):
    """Ids that nobody explains were scored as if they were Cityscapes'."""
    config, domain, _ = mapped
    data = ["--domain", domain["path"], "--label_path", domain["label_path"], "--crop_box", "[8, 0, 40, 64]"]
    alone, within, config_only = (tmp_path / f"{name}.json" for name in ("alone", "within", "config"))
    assert main(["evaluate", str(model_folder), *data, "--output", str(alone)]) == 2
    assert "nothing says what the ids in the label maps mean. List their names" in last_error_line(capsys)

    student = tmp_path / "run" / "t2sda" / "student"
    shutil.copytree(model_folder, student)
    resolved = dump_config(load_config(config, ["--source={}", "--rcs.min_pixels=5"]))
    (student.parent / "resolved_config.yaml").write_text(resolved, encoding="utf-8")
    scores = []
    for model in (student, tmp_path / "run"):
        for words in (data, data[:4], []):  # the same images are cut as in the run
            within.unlink(missing_ok=True)
            assert main(["evaluate", str(model), *words, "--output", str(within)]) == 0
            scores.append(json.loads(within.read_text())["confusion"])
    assert "are read as in the run" in capsys.readouterr().err
    assert main(["evaluate", str(student), "--config", str(config), "--output", str(config_only)]) == 0
    assert scores == [json.loads(config_only.read_text())["confusion"]] * 6
    elsewhere = shutil.copytree(domain["path"], tmp_path / "elsewhere")
    assert main(["evaluate", str(student), "--domain", str(elsewhere), *data[2:4]]) == 0
    assert f"The run cut its test images to --crop_box 8 0 40 64; {elsewhere} is read whole." in capsys.readouterr().err


def test_flags_are_stronger_than_the_run_that_explains_ids(model_folder, mapped, tmp_path, capsys):
    """A run may explain other data's ids, but not against a flag, nor those that a layout or drawn streets explain."""
    config, domain, _ = mapped
    student = tmp_path / "run" / "t2sda" / "student"
    shutil.copytree(model_folder, student)
    slide = ["--evaluation.mode=slide", "--evaluation.window=[32, 32]", "--evaluation.stride=[16, 16]"]
    resolved = dump_config(load_config(config, ["--source={}", "--rcs.min_pixels=5", *slide]))
    (student.parent / "resolved_config.yaml").write_text(resolved, encoding="utf-8")

    def scored(*words):
        (tmp_path / "scores.json").unlink(missing_ok=True)
        assert main(["evaluate", str(student), *words, "--output", str(tmp_path / "scores.json")]) == 0
        return json.loads((tmp_path / "scores.json").read_text())

    data = ["--domain", domain["path"], "--label_path", domain["label_path"]]
    pixels = np.sum(scored(*data)["confusion"], axis=1)
    assert pixels[0] > 0
    assert not np.sum(scored(*data, "--ignore_id", "1")["confusion"], axis=1)[0]  # street
    only = np.sum(scored(*data, "--label_map", "{vehicle: road}")["confusion"], axis=1)
    assert only.tolist() == [pixels[3], 0, 0, 0]

    capsys.readouterr()
    drawn = scored("--domain", "streets-target", "--limit", "1")
    assert "read as in the run" not in capsys.readouterr().err
    assert (drawn["mode"], drawn["window"], drawn["stride"]) == ("slide", [32, 32], [16, 16])  # as the run sees images
    alone = ["evaluate", str(model_folder), "--domain", "streets-target", "--limit", "1"]
    windows = ["--mode", "slide", "--window", "32", "32", "--stride", "16", "16"]
    assert main([*alone, *windows, "--output", str(tmp_path / "alone.json")]) == 0
    assert drawn["confusion"] == json.loads((tmp_path / "alone.json").read_text())["confusion"]

    of_run = scored()  # its images, its windows
    assert (of_run["mode"], of_run["window"], of_run["stride"]) == ("slide", [32, 32], [16, 16])
    assert scored("--mode", "whole")["mode"] == "whole"


def test_predict_sees_images_in_the_windows_of_the_run(model_folder, photos, tmp_path, capsys):
    student = tmp_path / "run" / "t2sda" / "student"
    shutil.copytree(model_folder, student)
    slide = ["--evaluation.mode=slide", "--evaluation.window=[64, 64]", "--evaluation.stride=[48, 48]"]
    resolved = dump_config(load_config("demo", [*slide, "--evaluation.limit=1"]))
    (student.parent / "resolved_config.yaml").write_text(resolved, encoding="utf-8")
    words = [photos, "--image_size", "128", "192"]
    of_words = [str(word) for word in words[1:]]
    windows = ["--mode", "slide", "--window", "64", "64", "--stride", "48", "48"]
    assert predict(student, photos, tmp_path / "as_run", *of_words) == 0
    said = capsys.readouterr().err
    assert f"Images are seen in windows of 64x64, as in the run, see {student.parent / 'resolved_config.yaml'}." in said
    assert predict(student, photos, tmp_path / "windows", *of_words, *windows) == 0
    assert predict(student, photos, tmp_path / "whole", *of_words, "--mode", "whole") == 0
    assert "as in the run" not in capsys.readouterr().err
    seen = [np.array(open_image(tmp_path / name / "wide_ids.png")) for name in ("as_run", "windows", "whole")]
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])


def test_models_of_one_title_are_seeds_of_one_method(model_folder, tmp_path, capsys):
    other = shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["id2label"]["0"] = "lane"
    config["label2id"] = {name: int(class_id) for class_id, name in config["id2label"].items()}
    (other / "config.json").write_text(json.dumps(config))
    words = ["evaluate", f"a={model_folder}", f"a={other}", "--domain", "streets-target", "--num_images", "1"]
    assert main(words) == 2
    assert "two models are called 'a' and have different classes" in capsys.readouterr().err
