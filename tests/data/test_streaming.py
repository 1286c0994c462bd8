"""A streamed target: every image once per round, shares without overlap, and what a stop does to the order."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import CLASSES, tiny_config

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import ImageStream, StreamedDomain, load_domain
from t2sda_hf.data.pairs import PairDataset, batches

SHARDS, ROWS = 4, 6  # per shard
TOTAL = SHARDS * ROWS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of a round, 5 s


def write(folder, damaged=()):
    """Image n has the grey value n everywhere."""
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        cells = []
        for number in range(shard * ROWS, (shard + 1) * ROWS):
            file = io.BytesIO()
            Image.fromarray(np.full((48, 96, 3), number, np.uint8)).save(file, format="PNG")
            cells.append({"bytes": file.getvalue()[: 60 if number in damaged else None], "path": f"{number}.png"})
        rows = Dataset.from_dict({"image": cells}, Features({"image": ImageFeature()}))
        rows.to_parquet(str(folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"))
    return DomainConfig(path=str(folder), streaming=True, shuffle_buffer=8)


def seen(config, count, rank=0, world=1, workers=0, start=0, seed=0):
    """Which target images the batches of one process show, in order."""
    cfg = tiny_config(
        "--rcs.enabled=false",
        f"--data.num_workers={workers}",
        f"--train={{max_steps: {start + count}, batch_size: 1}}",
        f"--seed={seed}",
    )
    source = load_domain(DomainConfig(path="streets-source", num_images=1), CLASSES)
    target = load_domain(config, CLASSES, labelled=False)
    loader = batches(PairDataset(cfg, source, target, None), rank, world, start)
    return [int(batch.target_images[0, 0, 0, 0]) for batch in loader]


def test_a_round_has_every_image_once_and_the_next_another_order(tmp_path):
    config = write(tmp_path / "stream")
    order = seen(config, 2 * TOTAL)
    first, second = order[:TOTAL], order[TOTAL:]
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    assert first != second
    assert first != sorted(first)
    assert seen(config, TOTAL) == first
    assert seen(config, TOTAL, seed=1) != first


def test_two_processes_share_the_shards_and_workers_their_part(tmp_path):
    config = write(tmp_path / "stream")
    two = [seen(config, TOTAL // 2, rank, 2) for rank in range(2)]
    assert sorted(two[0] + two[1]) == list(range(TOTAL))
    assert {len({number // ROWS for number in part}) for part in two} == {2}  # whole shards
    three = [seen(config, TOTAL // 3, rank, 3) for rank in range(3)]  # 4 shards do not divide by 3: rows do
    assert sorted(number for part in three for number in part) == list(range(TOTAL))
    assert sorted(seen(config, TOTAL, workers=2)) == list(range(TOTAL))


def test_a_resumed_run_says_that_the_order_is_another(tmp_path, caplog):
    config = write(tmp_path / "stream")
    whole = seen(config, TOTAL)
    assert not caplog.records
    rest = seen(config, TOTAL - 5, start=5)
    assert "in another order than without a stop" in caplog.text
    assert rest != whole[5:]
    assert seen(config, TOTAL - 5, start=5) == rest


def test_what_cannot_be_read_is_left_out_and_told(tmp_path, caplog):
    damaged = {19, 20}  # not among the first 16, which are checked
    order = seen(write(tmp_path / "stream", damaged), TOTAL - 2)
    assert sorted(order) == sorted(set(range(TOTAL)) - damaged)
    assert caplog.text.count("left out: an image") == 2
    assert "20.png of" in caplog.text
    nothing = load_domain(write(tmp_path / "stream", range(TOTAL)), CLASSES, labelled=False)
    with pytest.raises(ValueError, match="gets no readable image"):
        next(ImageStream(nothing, 0, 1, seed=0))


def test_only_targets_and_only_streams_are_streamed(tmp_path):
    config = write(tmp_path / "stream")
    domain = load_domain(config, CLASSES, labelled=False)
    assert isinstance(domain, StreamedDomain)
    assert len(domain) == 16
    with pytest.raises(ValueError, match="Set num_images, to fetch the first so many, or stream the target alone"):
        load_domain(config, CLASSES)
    with pytest.raises(ValueError, match="streaming reads parquet files and data sets of the Hub"):
        load_domain(DomainConfig(path="streets-target", streaming=True), CLASSES, labelled=False)
