"""The shipped configs: each loads, says only what differs from the defaults, and its family differs as named."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2sda_hf.config import RunConfig, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = [  # tables of ablations and launch files of accelerate have other forms
    path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name not in ("ablations", "accelerate")
]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(left: RunConfig, right: RunConfig) -> dict[str, tuple[Any, Any]]:
    a, b = leaves(asdict(left)), leaves(asdict(right))
    return {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_loads_and_writes_to_its_own_folder(path: Path) -> None:
    assert load_config(path).output_dir.startswith("outputs/")
    folders = [load_config(other).output_dir for other in FILES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_config_lists_only_what_it_changes(path: Path) -> None:
    """Method and domains may be spelled out."""
    default = leaves(asdict(RunConfig()))
    for key, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
        if key == "method" or key.split(".")[0] in ("source", "target", "test"):
            continue
        now = leaves(asdict(load_config(path))).get(key)
        assert now != default.get(key), f"{key}: {value} is the default"


def test_the_camvid_rows_differ_in_the_method_alone() -> None:
    t2sda, self_training, source_only = (
        load_config(CONFIGS / "camvid" / f"{name}.yaml") for name in ("t2sda", "self_training", "source_only")
    )
    assert set(differences(t2sda, self_training)) == {"output_dir", "loss_weights.pull"}
    assert self_training.loss_weights.pull == 0
    assert set(differences(t2sda, source_only)) == {"output_dir", "method"}


def test_the_demo_compares_with_source_only() -> None:
    demo = load_config(CONFIGS / "demo.yaml")
    assert (demo.method, demo.baseline) == ("t2sda", "source_only")
    assert len(demo.classes) >= 8
    assert demo.target.path == demo.test.path == "streets-target"
    assert demo.test.split == "validation" != demo.target.split
