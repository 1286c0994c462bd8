"""Needs the extra `browser` and a chromium (make browser): the pages as a visitor meets them."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from PIL import Image
from server import TOKEN, Hub

from t2sda_hf.cli import main
from t2sda_hf.evaluation.page import write_comparison, write_page
from t2sda_hf.hub.metric import NAME
from t2sda_hf.hub.push import push_run

ROOT = Path(__file__).parents[2]
missing = [name for name in ("gradio", "playwright") if not find_spec(name)]
missing += [] if shutil.which("chromium") else ["chromium"]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"not installed, see `make browser`: {', '.join(missing)}"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # see test_push
]


@pytest.fixture
def street(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((192, 128)).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def shares(model: Path, image: Path, out: Path, classes: int) -> list[str]:
    """Per-class shares in % of what `t2sda predict` sees, as the page writes them."""
    assert main(["predict", str(model), str(image), "--output", str(out)]) == 0
    with Image.open(out / f"{image.stem}_ids.png") as picture:
        ids = np.array(picture)
    return [f"{100 * share:.1f}" for share in np.bincount(ids.ravel(), minlength=classes) / ids.size]


def check(seen, folder: Path) -> None:
    assert seen.errors == []
    assert seen.foreign == []  # it works offline
    for name in ("2_example", "3_classes", "4_overlay", "5_confidence"):
        with Image.open(folder / f"{name}.png") as shot:
            assert len(shot.convert("RGB").getcolors(1 << 24)) > 100


def test_a_visitor_compares_two_models(finished_run: Path, street: Path, tmp_path: Path) -> None:
    from browser import served, walk

    models = [finished_run / name / "student" for name in ("source_only", "t2sda")]
    command = ["-m", "t2sda_hf", "demo", str(models[1]), "--compare", str(models[0])]
    with served(command, ROOT, os.environ | {"PYTHONPATH": str(ROOT)}) as url:
        seen = walk(url, street, tmp_path)
    check(seen, tmp_path)
    text = " ".join(seen.text.split())
    old, new = (shares(model, street, tmp_path / model.parent.name, 5) for model in models)
    for name, *pair in zip(("road", "building", "sky", "person", "car"), old, new, strict=True):
        assert " ".join([name, *pair]) in text
    assert f"{finished_run.name}, t2sda" in text  # its title is the name of the model
    assert "source only, % of pixels" in text
    assert "adapted, % of pixels" in text


def test_a_space_runs_without_the_package(
    hub: Hub, api: HfApi, finished_run: Path, street: Path, tmp_path: Path
) -> None:
    from browser import served, walk

    push_run(finished_run, "me/streets", api=api)
    push_run(finished_run / "source_only", "me/source-only", api=api)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    own |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    space = tmp_path / "space"
    command = [sys.executable, "-m", "t2sda_hf", "demo", "me/streets", "--compare", "me/source-only"]
    command += ["--space", str(space)]
    printed = subprocess.run(
        command, cwd=ROOT, env=own | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert f"hf upload USER/NAME {space} --repo-type space" in printed.stdout
    assert sorted(path.name for path in space.iterdir()) == [
        "README.md",
        "app.py",
        "examples",
        "requirements.txt",
        "settings.json",
    ]
    # Without site no editable install is found: only the libraries.
    with served(["-S", "app.py"], space, own | {"PYTHONPATH": sysconfig.get_path("purelib")}) as url:
        check(walk(url, street, tmp_path), tmp_path)


def test_a_space_loads_its_models_from_the_hub(finished_run: Path, tmp_path: Path, capsys) -> None:
    words = ["demo", str(finished_run / "t2sda" / "student"), "--space", str(tmp_path / "space")]
    assert main(words) == 2
    assert "loads its models from the Hub" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_the_page_of_the_metric_computes(tmp_path: Path) -> None:
    from browser import served, visit

    folder = shutil.copytree(ROOT / "model_cards" / NAME, tmp_path / "app")  # a Space's folder has its own name
    own = os.environ | {"HF_HOME": str(tmp_path / "home")}
    own.pop("PYTHONPATH", None)
    with served(["app.py"], folder, own) as url, visit(url) as (page, seen):
        page.get_by_role("button", name="Compute").click()
        page.get_by_text("mean_iou").first.wait_for()
        page.get_by_text("0.5000").first.wait_for()
        page.screenshot(path=tmp_path / "metric.png", full_page=True)
    assert (seen.errors, seen.foreign) == ([], [])
    assert "overall_accuracy" in seen.text


@pytest.mark.parametrize("width", [360, 485, 1440])
def test_pages_fit_a_phone_and_a_wide_screen(
    finished_run: Path, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from browser import visit

    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished_run, tmp_path / "run")
    Image.new("RGB", (1755, 811), "white").save(run / "panel.png")
    Image.new("RGB", (702, 900), "black").save(run / "panel_narrow.png")
    pages = [write_page(run), write_comparison([run], tmp_path / "both")]
    assert (
        main(["check", "--config", "demo", "--source.num_images=2", "--target.num_images=2", "--only", "source"]) == 0
    )
    for path in (*pages, tmp_path / "outputs" / "check" / "index.html"):
        with visit(path.as_uri(), width, 800) as (page, seen):
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
            first = page.evaluate("(({width, bottom}) => [width, bottom])(document.images[0].getBoundingClientRect())")
            assert 300 < first[0] <= width
            if path == pages[0]:
                shown = page.evaluate("document.images[0].currentSrc")
                assert shown.endswith("panel_narrow.png" if width < 700 else "panel.png")
        assert (seen.errors, seen.foreign) == ([], [])
