"""Needs the extra `demo`, playwright and a chromium: the demo as a visitor meets it, and as a Space."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import walk
from PIL import Image
from test_push import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address(finished_run: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = [str(finished_run / name / "student") for name in ("t2sda", "source_only")]
    command = [sys.executable, "scripts/demo.py", models[0], "--compare", models[1], "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert any("Running on local URL" in line for line in server.stdout)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def test_a_visitor_uploads_clicks_and_looks(address: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((192, 128)).save(tmp_path / "street.png")
    seen = walk(address, tmp_path / "street.png", tmp_path, shutil.which("chromium"))
    assert seen["errors"] == []
    assert seen["foreign"] == []  # it works offline
    for part in ("adapted, % of pixels", "source only", "building", "mean confidence"):
        assert part in seen["text"]
    for name in ("2_classes.png", "3_confidence.png"):
        with Image.open(tmp_path / name) as shot:
            assert len(shot.convert("RGB").getcolors(1 << 24)) > 100


def test_a_space_is_complete(hub_models: tuple[str, str], tmp_path: Path) -> None:
    demo = load_script("demo")
    demo.write_space(
        tmp_path / "space",
        {"title": "Streets", "models": dict(zip(("source only", "adapted"), hub_models, strict=True)), "colors": {}},
        [],
        "6.31.0",
    )
    assert (tmp_path / "space" / "app.py").read_bytes() == (ROOT / "scripts" / "demo.py").read_bytes()
    assert json.loads((tmp_path / "space" / "settings.json").read_text())["models"]["adapted"] == hub_models[1]
    assert "app_file: app.py" in (tmp_path / "space" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="loads its models from the Hub"):
        demo.write_space(tmp_path / "other", {"title": "", "models": {"model": str(tmp_path)}, "colors": {}}, [], "6")


@pytest.fixture
def hub_models() -> tuple[str, str]:
    return "me/source-only", "me/streets"
