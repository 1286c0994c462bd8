"""A source and a target are streamed from a Hub on this machine: what is asked of it, and that nothing else changes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.test_preparing import cityscapes
from huggingface_hub import HfFileSystem
from server import Hub, Repository, content

from t2sda_hf.cli import main
from t2sda_hf.config import DomainConfig
from t2sda_hf.data import preparing
from t2sda_hf.data.domains import ImageStream, load_domain, read_domain
from t2sda_hf.labels import CITYSCAPES_CLASSES


@pytest.fixture
def put(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """A function that uploads a folder; everything here asks the Hub of this test."""
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    HfFileSystem.clear_instance_cache()

    def upload(name: str, folder: Path) -> None:
        hub.repositories[name] = Repository()
        hub.repositories[name].commit("main", content(folder))

    return upload


def test_source_and_target_of_the_hub_are_those_of_the_folder(
    hub: Hub, put: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ROWS_PER_SHARD", 4)
    cityscapes(tmp_path / "raw", 6)
    arguments = ["--root", str(tmp_path / "raw"), "--output", str(tmp_path / "city"), "--incomplete"]
    assert main(["prepare", "cityscapes", *arguments, "--processes", "1"]) == 0  # two splits, a configuration each
    put("me/city", tmp_path / "city")
    there, here = (DomainConfig(path=path, streaming=True) for path in ("me/city", str(tmp_path / "city")))
    source, twin = load_domain(there), load_domain(here)
    assert len(source) == 12
    read, read_here = (read_domain(one, CITYSCAPES_CLASSES) for one in (source, twin))
    assert np.array_equal(read.counts, read_here.counts)
    assert read.contents == read_here.contents
    hub.requests.clear()
    assert np.array_equal(source.image(7), twin.image(7))
    assert len(hub.requests) == 1  # the bytes of this image
    assert np.array_equal(source.labels(7), twin.labels(7))
    targets = [load_domain(one, CITYSCAPES_CLASSES, labelled=False) for one in (there, here)]
    streams = [ImageStream(target, seed=0, slots=1, draws=2) for target in targets]
    for batch in range(8):
        assert np.array_equal(*(stream.image(batch, 1) for stream in streams))
    contents = [read_domain(target, CITYSCAPES_CLASSES).contents for target in targets]
    assert contents[0].fingerprint == contents[1].fingerprint
    (tmp_path / "city" / "class_counts-train.parquet").unlink()
    put("me/bare", tmp_path / "city")
    with pytest.raises(ValueError, match=r"class_counts-train.parquet, .*is not there: write it with `t2sda prepare`"):
        load_domain(DomainConfig(path="me/bare", streaming=True))


def test_a_start_asks_as_often_for_50_files_as_for_10(
    hub: Hub, put: Callable[[str, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ROWS_PER_SHARD", 20)
    cityscapes(tmp_path / "raw", 10)
    arguments = ["--root", str(tmp_path / "raw"), "--output", str(tmp_path / "city"), "--splits", "train"]
    assert main(["prepare", "cityscapes", *arguments, "--incomplete", "--processes", "1"]) == 0
    asked = []
    for number in (10, 50):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for shard in range(number):
            name = f"train-{shard:05d}-of-{number:05d}.parquet"
            shutil.copyfile(tmp_path / "city" / "train-00000-of-00001.parquet", folder / name)
        put(f"me/city{number}", folder)
        hub.requests.clear()
        target = load_domain(DomainConfig(path=f"me/city{number}", streaming=True), CITYSCAPES_CLASSES, labelled=False)
        read_domain(target, CITYSCAPES_CLASSES)
        ImageStream(target, seed=0, slots=1, draws=1).image(0, 0)
        asked.append(len(hub.requests))
    assert asked[0] == asked[1] < 25
