"""Nothing that a command did not make is ever overwritten."""

import re

import pytest
from PIL import Image

from t2sda_hf.cli import main

FOREIGN = {
    "evaluate, json": (["evaluate", "{model}", "--domain", "streets-target", "--output", "{here}/a.json"], "a.json"),
    "evaluate, csv": (
        ["evaluate", "{model}", "--domain", "streets-target", "--output", "{here}/pairs.json"],
        "pairs.csv",
    ),
    "evaluate, its input": (
        ["evaluate", "{model}", "--domain", "{here}/pairs.csv", "--output", "{here}/pairs.json"],
        "pairs.csv",
    ),
    "check": (["check", "--source.path", "streets-source", "--output", "{here}"], "index.html"),
    "analyze": (["analyze", "{model}", "--domain", "streets-target", "--output", "{here}"], "similarity.csv"),
    "compare": (["compare", "{run}", "--output", "{here}"], "index.html"),
    "compare --proxies": (["compare", "--proxies", "{run}", "--output", "{here}/pairs.csv"], "pairs.csv"),
    "export": (["export", "{model}", "{here}/model.onnx"], "model.onnx"),
    "translator": (["translator", "preview", "--config", "demo", "--output", "{here}/a.png"], "a.png"),
    "repeat": (["repeat", "demo", "--output", "{here}"], "repeat.json"),
    "tables": (["tables", "table08", "--scale", "demo", "--output", "{here}"], "table08.md"),
    "push --card": (["push", "{run}", "me/x", "--card", "{here}"], "README.md"),
    "prepare": (["prepare", "camvid", "--root", "{here}", "--output", "{here}"], "README.md"),
    "predict": (["predict", "{model}", "{photo}", "--output", "{here}"], "wide_ids.png"),
}


@pytest.mark.parametrize(("words", "file"), FOREIGN.values(), ids=FOREIGN)
def test_no_command_overwrites_what_it_did_not_write(finished_run, tmp_path, capsys, monkeypatch, words, file):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    path = here / "demo" / file if words[0] == "tables" else here / file
    path.parent.mkdir(parents=True)
    path.write_text("image,label\n")
    student, photo = finished_run / "t2sda" / "student", tmp_path / "wide.png"
    named = {"model": student, "run": finished_run, "photo": photo, "here": here}
    Image.new("RGB", (40, 40)).save(photo)
    before = {found: found.read_bytes() for found in tmp_path.rglob("*") if found.is_file()}
    assert main([word.format_map(named) for word in words]) == 2
    assert re.search(rf"{path} (exists|is read as data)", capsys.readouterr().err.splitlines()[-1])
    assert {found: found.read_bytes() for found in tmp_path.rglob("*") if found.is_file()} == before
