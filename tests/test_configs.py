"""The shipped configs: each loads, says only what differs from the defaults, and its family differs as named."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2sda_hf.config import RunConfig, dump_config, flatten, json_schema, load_config, recipe_names
from t2sda_hf.config import differences as changed

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = [  # tables of ablations and launch files of accelerate have other forms
    path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name not in ("ablations", "accelerate")
]


def differences(left: RunConfig, right: RunConfig) -> dict[str, tuple[Any, Any]]:
    a, b = flatten(asdict(left)), flatten(asdict(right))
    return {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def test_every_recipe_writes_to_its_own_folder() -> None:
    folders = [load_config(name).output_dir for name in recipe_names()]
    assert all(folder.startswith("outputs/") for folder in folders)
    assert len(set(folders)) == len(folders) == 39


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_means_what_it_meant(name: str) -> None:
    """recipes.json holds what each resolved to before recipes had bases and the defaults became neutral. Whoever means
    to change a recipe edits it there, too."""
    recorded = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))
    expected, now = recorded["defaults"] | recorded[name], yaml.safe_load(dump_config(load_config(name)))
    assert changed(expected, now) == {}  # of what anybody reads


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_lists_only_what_it_changes(path: Path) -> None:
    """Against its base, or the defaults. Method and domains may be spelled out."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = content.pop("base", None)
    before = flatten(yaml.safe_load(dump_config(RunConfig())))
    if base:
        before |= flatten(yaml.safe_load((CONFIGS / f"{base}.yaml").read_text(encoding="utf-8")))
    for key, value in flatten(content).items():
        if key == "method" or key.split(".")[0] in ("source", "target", "test"):
            continue
        assert value != before[key], f"{key}: {value} is what {base or 'the default'} says"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_names_the_schema_that_editors_check_it_by(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == (CONFIGS / "schema.json").resolve()


def test_the_schema_is_that_of_the_code() -> None:
    """Written by `t2sda config --schema`."""
    assert json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8")) == json_schema()


def test_the_demo_compares_with_source_only() -> None:
    demo = load_config(CONFIGS / "demo.yaml")
    assert (demo.method, demo.baseline) == ("t2sda", "source_only")
    assert len(demo.classes) >= 8
    assert demo.target.path == demo.test.path == "streets-target"
    assert demo.test.split == "validation" != demo.target.split
