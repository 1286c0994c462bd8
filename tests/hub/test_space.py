"""What `t2sda demo --space` writes. How it looks to a visitor: test_demo_in_browser.py."""

import ast
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from huggingface_hub import RepoCard
from PIL import Image

from t2sda_hf.commands.demo import REQUIREMENTS, write_space
from t2sda_hf.hub import space_app
from t2sda_hf.hub.metric import NAME

ROOT = Path(__file__).parents[2]
SETTINGS = {"title": 'Streets: "dusk"', "models": {"model": "me/streets"}, "colors": {"road": [1, 2, 3]}}


def test_settings_and_metadata_of_a_space(tmp_path: Path) -> None:
    write_space(tmp_path / "space", SETTINGS, [], "6.31.0")
    assert json.loads((tmp_path / "space" / "settings.json").read_text()) == SETTINGS
    made = RepoCard.load(tmp_path / "space" / "README.md").data.to_dict()
    shipped = RepoCard.load(ROOT / "model_cards" / NAME / "README.md").data.to_dict()
    assert (made["title"], made["models"]) == (SETTINGS["title"], ["me/streets"])
    hub_colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    for metadata in (made, shipped):
        assert {metadata["colorFrom"], metadata["colorTo"]} <= hub_colors
        assert (metadata["sdk"], metadata["sdk_version"], metadata["app_file"]) == ("gradio", "6.31.0", "app.py")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_space(tmp_path / "space", SETTINGS, [], "6.31.0")


def test_the_app_of_a_space_needs_only_what_its_requirements_name(tmp_path: Path) -> None:
    """There is no t2sda_hf in a Space, and gradio is what the Space itself is of."""
    write_space(tmp_path / "space", SETTINGS, [], "6.31.0")
    imported = set()
    for node in ast.walk(ast.parse((tmp_path / "space" / "app.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    named = {"PIL" if one == "pillow" else one.partition(">")[0] for one in REQUIREMENTS}
    assert imported - sys.stdlib_module_names == named | {"gradio"}


def test_a_visitor_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """91 bytes of 1 x 3000 pixels were enlarged to 2.4 GB; a bomb is refused by its header."""
    path = str(tmp_path / "picture.png")
    Image.new("L", (1, 3000)).save(path)
    with pytest.raises(ValueError, match="it is 1x3000, more than 16 times as long as wide"):
        space_app.open_image(path, 19)
    thin = np.zeros((512, 32, 3), np.uint8)
    seen = {"labels": thin[..., 0], "confidence": thin[..., 0].astype(np.float32)}
    for view in space_app.VIEWS:
        assert space_app.draw(thin, seen, np.zeros((1, 3), np.uint8), view, 0.5).shape == thin.shape
    Image.new("RGB", (4000, 3000)).save(path)
    for num_classes in (19, 150):
        image = space_app.open_image(path, num_classes)
        assert image.width * image.height * num_classes <= space_app.SCORES
        assert image.width / image.height == pytest.approx(4 / 3, abs=0.01)
    Image.new("1", (6000, 6000)).save(path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="it has 6000x6000 pixels, and 33554432 is the limit"):
        space_app.open_image(path, 19)


def test_a_space_reads_pictures_as_predict_does(tmp_path: Path) -> None:
    exif, path = Image.Exif(), str(tmp_path / "picture.png")
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert space_app.open_image(path, 19).size == (30, 40)
    cv2.imwrite(path, np.full((9, 9, 3), 4000, np.uint16))
    with pytest.raises(ValueError, match="16 bits per channel, the upper ones empty"):
        space_app.open_image(path, 19)
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(path)
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        space_app.open_image(path, 19)
    for content in (b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"):
        Path(path).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            space_app.open_image(path, 19)
