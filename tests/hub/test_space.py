"""What `t2sda demo --space` writes. How it looks to a visitor: test_demo_in_browser.py."""

import ast
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import RepoCard

from t2sda_hf.commands.demo import REQUIREMENTS, write_space
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
