"""Both scripts on a tiny model and images on disk, in this process; and one of each as a user starts it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.evaluation.evaluator import evaluate_model
from t2sda_hf.evaluation.inference import load_model, predict_labels, saved_image_size, to_pixel_values
from t2sda_hf.labels import palette
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor

SCRIPTS = Path(__file__).parents[2] / "scripts"
CLASSES = ("road", "building", "sky", "car")


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


evaluate_script, predict_script = load_script("evaluate"), load_script("predict")


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
    return predict_script.main([str(model_folder), str(images), "--output", str(output), *options])


def last_error_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_evaluate_prints_and_saves_what_the_evaluator_returns(model_folder, tmp_path, capsys):
    output = tmp_path / "new folder" / "scores.json"

    code = evaluate_script.main(
        [str(model_folder), "--domain", "streets-target", "--limit", "2", "--output", str(output)]
    )

    assert code == 0
    model, classes = load_model(str(model_folder))
    domain = load_domain(DomainConfig(path="streets-target", split="validation"), classes)
    expected = evaluate_model(model, domain, image_size=(32, 64), classes=CLASSES, limit=2, progress=False)
    saved = json.loads(output.read_text())
    assert {key: saved[key] for key in expected} == expected
    assert (saved["model"], saved["image_size"], saved["mode"]) == (str(model_folder), [32, 64], "whole")
    printed = capsys.readouterr().out
    assert "streets-target (validation), 2 images" in printed
    assert all(f"| {name} " in printed for name in (*CLASSES, "mIoU", "pixel accuracy"))


def test_evaluate_takes_windows_sizes_and_names_of_ids(model_folder, tmp_path):
    output = tmp_path / "scores.json"
    windows = ["--mode", "slide", "--window", "32", "48", "--stride", "16", "24", "--image_size", "48", "96"]
    names = ["--class_names", "car", "road", *(f"other {n}" for n in range(17))]

    code = evaluate_script.main(
        [str(model_folder), "--domain", "streets-source", "--limit", "1", *windows, *names, "--output", str(output)]
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
        (["--domain", "streets-target", "--class_names", "cat", "dog"], "no class is shared"),
        (["--domain", "streets-target", "--label_space", "marscapes"], "label_space must be one of"),
        (["--domain", "streets-target", "--mode", "slide"], "needs window and stride"),
        (["--domain", "streets-target", "--limit", "0"], "nothing to evaluate"),
    ],
)
def test_evaluate_says_in_one_line_what_is_wrong(model_folder, options, message, capsys):
    assert evaluate_script.main([str(model_folder), *options]) == 2

    line = last_error_line(capsys)
    assert line.startswith("ValueError: ")
    assert message in line


def test_missing_model_is_named(tmp_path, capsys):
    assert evaluate_script.main([str(tmp_path / "nothing"), "--domain", "streets-target"]) == 2
    assert f"cannot load a model from '{tmp_path / 'nothing'}'" in last_error_line(capsys)


def test_encoder_without_a_trained_head_is_refused(model_folder, tmp_path):
    encoder = tmp_path / "encoder"
    T2SDAForSemanticSegmentation.from_pretrained(model_folder).segformer.save_pretrained(encoder)

    with pytest.raises(ValueError, match="has no segmentation head"):
        load_model(str(encoder))


def test_input_size_is_read_from_the_processor_beside_the_model(model_folder, tmp_path):
    assert saved_image_size(str(model_folder)) == (32, 64)

    T2SDAImageProcessor(size=None).save_pretrained(tmp_path)
    assert saved_image_size(str(tmp_path)) is None

    T2SDAImageProcessor(size=(32, 64), resize="keep_ratio").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not state one height and width.*--image_size"):
        saved_image_size(str(tmp_path))


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
        f"{image.stem}_{kind}.png" for image in images for kind in ("ids", "color", "overlay")
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


def test_predicted_ids_are_those_of_the_model(model_folder, photos, tmp_path):
    predict(model_folder, photos / "wide.png", tmp_path / "out", "--image_size", "64", "96")

    model, _ = load_model(str(model_folder))
    image = np.array(open_image(photos / "wide.png"))
    expected = predict_labels(model, to_pixel_values(image, (64, 96), torch.device("cpu")), (41, 70))
    np.testing.assert_array_equal(np.array(open_image(tmp_path / "out" / "wide_ids.png")), expected[0].numpy())


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

    assert "a_ids.png exists" in last_error_line(capsys)
    assert (photos / "a_ids.png").read_bytes() == before


def test_images_that_share_a_stem_are_refused(model_folder, photos, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(photos / "wide.bmp")

    assert predict(model_folder, photos, tmp_path / "out") == 2

    line = last_error_line(capsys)
    assert "wide.bmp" in line
    assert "wide.png" in line


@pytest.mark.parametrize("kind", ["text", "cut", "sixteen bits"])
def test_broken_image_is_named_before_anything_is_written(model_folder, photos, tmp_path, capsys, kind):
    broken = photos / "zebra.png"
    if kind == "text":
        broken.write_text("not an image")
    elif kind == "cut":
        broken.write_bytes((photos / "wide.png").read_bytes()[:2000])
    else:
        Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(broken)

    assert predict(model_folder, photos, tmp_path / "out") == 2

    assert last_error_line(capsys).startswith(f"ValueError: {broken} ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["photos/notes.txt", "nowhere", "empty"])
def test_path_without_images_is_named(model_folder, photos, tmp_path, capsys, path):
    (tmp_path / "empty").mkdir()

    assert predict(model_folder, tmp_path / path, tmp_path / "out") == 2

    assert last_error_line(capsys).startswith(f"ValueError: {tmp_path / path} ")


def start(script, *arguments):
    """Run a script as `python scripts/...` in a process of its own, with this folder's modules first on its path."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_scripts_run_although_one_of_them_is_called_like_a_library(model_folder, photos, tmp_path):
    evaluated = start("evaluate.py", model_folder, "--domain", "streets-target", "--limit", 1)
    predicted = start("predict.py", model_folder, photos / "notes.txt", "--output", tmp_path / "out")

    assert evaluated.returncode == 0, evaluated.stderr
    assert "mIoU" in evaluated.stdout
    assert predicted.returncode == 2
    assert "Traceback" not in predicted.stderr
    assert predicted.stderr.strip().splitlines()[-1].startswith("ValueError: ")


@pytest.mark.two_processes
def test_two_processes_print_once_and_save_the_scores_of_one(model_folder, tmp_path):
    arguments = [str(model_folder), "--domain", "streets-target", "--limit", "3", "--output"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    two = subprocess.run(
        [*launcher, str(SCRIPTS / "evaluate.py"), *arguments, str(tmp_path / "two.json")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| mIoU ") == 1
    assert evaluate_script.main([*arguments, str(tmp_path / "one.json")]) == 0
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
