"""Whoever installs the wheel, and has nothing of this repository: the command, the recipes, the way to the Hub."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.server import TOKEN, serve
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from trove_classifiers import classifiers

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("t2sda_hf", "configs", "model_cards", "pyproject.toml", "README.md", "LICENSE")
FEW = ["--source.num_images=6", "--target.num_images=6", "--test.num_images=2", "--evaluation.source_images=0"]
END = "<the end of a command>\n"
ALL = f"""
import json, sys
from t2sda_hf.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    assert code == 0, (words, code)
    print(end={END!r})
"""
SHORT = ["--train.max_steps=1", "--train.evaluate_every=1", "--train.batch_size=1"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`t2sda` in an environment that has the wheel of this repository, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / "clone" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *build, str(folder / "clone")], check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "empty")], check=True, timeout=300)
    python = folder / "empty" / "bin" / "python"
    wheel = next(folder.glob("t2sda_hf-*.whl"))
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=300
    )
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip())
    # A folder that a .pth file adds is searched for packages, but its own .pth files (editable installs) are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "empty" / "bin" / "t2sda"


def test_the_wheel_takes_a_stranger_from_recipe_to_hub(command: Path, tmp_path: Path) -> None:
    photographs, cache = tmp_path / "photos", tmp_path / "cache"
    photographs.mkdir()
    Image.new("RGB", (96, 64), "gray").save(photographs / "street.png")
    with serve() as hub:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "T2SDA"))}
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        settings["OMP_NUM_THREADS"] = "1"  # other tests have the other cores

        def printed(*command: str) -> str:
            done = subprocess.run(
                command, cwd=tmp_path, env=plain | settings, capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
            return done.stdout

        def t2sda(*commands: list[str]) -> Iterator[str]:
            """Of all in one process, as an import takes longer than most of them."""
            return iter(printed(str(command.with_name("python")), "-c", ALL, json.dumps(commands)).split(END)[:-1])

        assert "gta_cityscapes/t2sda_daformer" in printed(str(command), "train", "--list").splitlines()
        assert str(command.parents[1]) in printed(str(command), "env")  # the recipes are those of the wheel
        predict = ["predict", "outputs/demo/t2sda/student", "photos", "--output", "seen"]
        said = t2sda(
            ["check", "--config", "demo", *FEW[:3], "--processes=1"],
            ["train", "--config", "demo", *FEW, *SHORT],
            ["evaluate", "outputs/demo", "--config", "demo", "--limit", "2"],
            predict,
            ["push", "outputs/demo", "me/streets", "--license", "apache-2.0"],
            [predict[0], "me/streets", *predict[2:-1], "from_hub"],
        )
        assert "0 kinds of faults" in next(said)
        assert f"Figures in {Path('outputs', 'demo', 'summary.json')}" in next(said)
        assert "| mIoU" in next(said)
        assert (tmp_path / "seen" / "street_overlay.png").is_file()
        assert f"Published: {hub.url}/me/streets" in list(said)[1]
        assert {"model.safetensors", "README.md", "config.json"} <= set(hub.files("me/streets"))
        assert (tmp_path / "from_hub" / "street_ids.png").read_bytes() == (
            tmp_path / "seen" / "street_ids.png"
        ).read_bytes()


def test_every_extra_fits_the_pinned_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    for extra, words in (project["optional-dependencies"] | {"": project["dependencies"]}).items():
        for asked in map(Requirement, words):
            own = asked.name in ("t2sda_hf", "imagecorruptions-imaug")  # the second clashes with headless OpenCV
            assert own or asked.specifier.contains(pinned[canonicalize_name(asked.name)]), (extra, str(asked))


def test_the_metadata_says_who_where_and_what() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": "The t2sda_hf authors"}]
    assert project["urls"]["Paper"] == "https://arxiv.org/abs/2305.13752"
    assert set(project["classifiers"]) <= set(classifiers)
    supported = [word.rpartition(" ")[2] for word in project["classifiers"] if ":: Python :: 3." in word]
    assert [version in Requirement(f"x{project['requires-python']}").specifier for version in supported] == [True] * 3
