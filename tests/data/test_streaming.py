"""Streams: a target whose order is a function of the seed and the step, and a source drawn by its class counts."""

import io
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.test_preparing import gta5
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from faults.arena import outcome
from PIL import Image
from running import TINY_RUN, stopped_before, undrawn
from tiny import CLASSES, tiny_config

from t2sda_hf.cli import main
from t2sda_hf.config import DomainConfig, load_config
from t2sda_hf.data import preparing
from t2sda_hf.data.domains import ImageStream, StreamedDomain, load_domain, read_domain
from t2sda_hf.data.pairs import PairDataset, batches
from t2sda_hf.data.rare_class_sampling import class_probabilities, rare_classes
from t2sda_hf.labels import CITYSCAPES_CLASSES

SHARDS, ROWS = 4, 6  # per shard
TOTAL = SHARDS * ROWS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, damaged=(), lengths=(ROWS,) * SHARDS, **options):
    """Image n has the grey value n everywhere; a file for each length."""
    folder.mkdir(exist_ok=True)
    numbers = iter(range(sum(lengths)))
    for shard, length in enumerate(lengths):
        cells = []
        for number in (next(numbers) for _ in range(length)):
            file = io.BytesIO()
            Image.fromarray(np.full((48, 96, 3), number, np.uint8)).save(file, format="PNG")
            cells.append({"bytes": file.getvalue()[: 60 if number in damaged else None], "path": f"{number}.png"})
        rows = Dataset.from_dict({"image": cells}, Features({"image": ImageFeature()}))
        rows.to_parquet(str(folder / f"train-{shard:05d}-of-{len(lengths):05d}.parquet"), **options)
    return DomainConfig(path=str(folder), streaming=True, shuffle_buffer=8)


def seen(config, count, rank=0, world=1, workers=0, start=0, seed=0, micro=1, batch=1):
    """Which target images the batches of one process show, in order."""
    cfg = tiny_config(
        "--rcs.enabled=false",
        f"--data.num_workers={workers}",
        f"--train={{max_steps: {start + count}, batch_size: {batch}, micro_batches: {micro}}}",
        f"--seed={seed}",
    )
    source = load_domain(DomainConfig(path="streets-source", num_images=1), CLASSES)
    target = load_domain(config, CLASSES, labelled=False)
    loader = batches(PairDataset(cfg, source, target, None), rank, world, start)
    return [int(image[0, 0, 0]) for batch in loader for image in batch.target_images]


def test_a_round_has_every_image_once_and_the_next_another_order(tmp_path):
    config = write(tmp_path / "stream")
    order = seen(config, 2 * TOTAL)
    first, second = order[:TOTAL], order[TOTAL:]
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    assert first != second
    assert first != sorted(first)
    assert len({number // ROWS for number in first[:SHARDS]}) == SHARDS  # neighbours are of different files
    assert seen(config, TOTAL, seed=1) != first


def test_the_order_does_not_depend_on_a_stop_on_workers_or_on_processes(tmp_path):
    config = write(tmp_path / "stream", lengths=(6, 5, 6, 2))
    whole = seen(config, 20, batch=2)
    for start in (1, 7):
        assert seen(config, 20 - start, start=start, batch=2) == whole[2 * start :]
    for workers in (1, 2):
        assert seen(config, 20, workers=workers, batch=2) == whole
    together = seen(config, 8, micro=2)
    two = [seen(config, 8, rank, 2) for rank in range(2)]
    assert [number for pair in zip(*two, strict=True) for number in pair] == together


def test_processes_and_workers_open_row_groups_of_their_own(tmp_path, monkeypatch):
    target = load_domain(write(tmp_path / "stream"), CLASSES, labelled=False)
    visited = ImageStream._visited
    opened = []
    monkeypatch.setattr(ImageStream, "_visited", lambda self, visit: opened.append(visit) or visited(self, visit))
    for worker in range(4):  # two of each of two processes
        stream = ImageStream(target, seed=0, slots=2, draws=1)
        for batch in range(worker, 4 * TOTAL, 4):
            stream.image(batch, 0)
    assert len(opened) == len(set(opened)) == 4 * TOTAL / ROWS


def test_images_of_short_files_and_row_groups_are_drawn_as_often_as_others(tmp_path):
    """By the row groups of many visits, against the exact expectation: the same for each image."""
    lengths = (8, 8, 6, 8, 1)
    config = write(tmp_path / "stream", lengths=lengths, batch_size=4)  # rows of a row group; 6 are 4 and 2
    stream = ImageStream(load_domain(config, CLASSES, labelled=False), seed=0, slots=1, draws=1)
    times = np.zeros(sum(lengths))
    visits = 800
    for visit in range(visits):
        rows, order = stream._visited(visit)
        assert len(order) == 4
        for index in order:
            times[int(rows["image"][index].as_py()["path"].removesuffix(".png"))] += 1
    expected = 4 * visits / sum(lengths)
    in_group = np.repeat([4] * 4 + [4, 2] + [4] * 2 + [1], [4] * 4 + [4, 2] + [4] * 2 + [1])
    # Draws of one visit are of one row group, so a visit counts 4/length for each of its images.
    sd = np.sqrt(expected * 4 / in_group)
    assert np.abs((times - expected) / sd).max() < 4


def test_a_later_file_without_the_column_is_named_in_one_sentence(tmp_path):
    config = write(tmp_path / "stream")
    file = tmp_path / "stream" / "train-00003-of-00004.parquet"  # the first 16 rows are checked
    pq.write_table(pq.read_table(file).rename_columns(["picture"]), file)
    with pytest.raises(ValueError, match=r"its file number 4 has no column 'image', but picture\. All files"):
        seen(config, TOTAL)


def test_what_cannot_be_read_is_left_out_and_told(tmp_path, caplog):
    damaged = {19, 20}  # not among the first 16, which are checked
    order = seen(write(tmp_path / "stream", damaged), TOTAL)
    assert set(order) == set(range(TOTAL)) - damaged
    assert caplog.text.count("left out: an image") >= 2
    assert "20.png of" in caplog.text
    nothing = load_domain(write(tmp_path / "stream", range(TOTAL)), CLASSES, labelled=False)
    with pytest.raises(ValueError, match="has 6 images in one row group of which none can be read"):
        ImageStream(nothing, 0, 1, 1).image(0, 0)
    for file in (tmp_path / "stream").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-00000-of-00004.parquet cannot be read as parquet: .*Copy or export"):
        ImageStream(nothing, 0, 1, 1)


def test_a_stream_of_other_files_is_another_input(tmp_path):
    config = write(tmp_path / "stream")
    before = read_domain(load_domain(config, CLASSES, labelled=False), CLASSES).contents.record()
    write(tmp_path / "stream", lengths=(6, 6, 6, 5))
    now = read_domain(load_domain(config, CLASSES, labelled=False), CLASSES).contents
    assert now.difference(before).endswith("differ from those before, first: the list of its files")


OPENED = []
sys.addaudithook(lambda event, arguments: event == "open" and OPENED.append(str(arguments[0])))  # it cannot be removed


def parquet_opened():
    """Names of the parquet files that were opened since the last call."""
    names = [name.rpartition("/")[2] for name in OPENED if name.endswith(".parquet")]
    OPENED.clear()
    return names


def many(folder, number, split="train"):
    """So many stand-ins: links to one file."""
    first = folder / f"{split}-00000-of-{number:05d}.parquet"
    next(folder.glob(f"{split}-*.parquet")).rename(first)
    for shard in range(1, number):
        first.with_name(f"{split}-{shard:05d}-of-{number:05d}.parquet").hardlink_to(first)


def test_a_start_opens_as_many_files_of_1000_as_of_10(tmp_path):
    counted = []
    for number in (10, 1000):
        config = write(tmp_path / f"{number}", lengths=(ROWS,))
        many(tmp_path / f"{number}", number)
        parquet_opened()
        target = load_domain(config, CLASSES, labelled=False)
        read_domain(target, CLASSES)
        stream = ImageStream(target, seed=0, slots=1, draws=1)
        stream.image(0, 0)
        counted.append(len(parquet_opened()))
    assert counted[0] == counted[1] <= 5


def test_only_what_is_parquet_is_streamed(tmp_path):
    domain = load_domain(write(tmp_path / "stream"), CLASSES, labelled=False)
    assert isinstance(domain, StreamedDomain)
    assert len(domain) == 16
    with pytest.raises(ValueError, match="streaming reads parquet files and data sets of the Hub"):
        load_domain(DomainConfig(path="streets-target", streaming=True), CLASSES, labelled=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"image": "a.png"}')
    with pytest.raises(ValueError, match=r"a stream reads parquet files, and .* is of the kind json: save it as"):
        load_domain(DomainConfig(path=str(tmp_path / "other"), streaming=True), CLASSES, labelled=False)
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "text" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"column 'image' holds Value\('string'\), not images"):
        load_domain(DomainConfig(path=str(tmp_path / "text"), streaming=True), CLASSES, labelled=False)
    with pytest.raises(ValueError, match="has no column 'photo': it has image"):
        load_domain(replace(domain.config, image_column="photo"), CLASSES, labelled=False)


@pytest.fixture
def game(tmp_path, monkeypatch):
    """18 images in 9 files of `t2sda prepare`, as a source that is streamed; and what it was made of."""
    monkeypatch.setattr(preparing, "ROWS_PER_SHARD", 2)
    made = gta5(tmp_path / "raw", 18)["train"]
    arguments = ["gta5", "--root", str(tmp_path / "raw"), "--output", str(tmp_path / "game"), "--incomplete"]
    assert main(["prepare", *arguments, "--processes", "1"]) == 0
    return DomainConfig(path=str(tmp_path / "game"), streaming=True), made, arguments


def test_a_streamed_source_gives_the_samples_of_the_same_files_at_hand(game):
    config, _, _ = game
    cfg = tiny_config("--rcs.min_pixels=20", "--data.num_workers=0", "--train.max_steps=40", "--train.batch_size=1")
    target = load_domain(DomainConfig(path="streets-target", num_images=3), CITYSCAPES_CLASSES, labelled=False)
    both = []
    for one in (config, replace(config, streaming=False)):
        source = load_domain(one, CITYSCAPES_CLASSES)
        read = read_domain(source, CITYSCAPES_CLASSES)
        dataset = PairDataset(cfg, source, target, rare_classes(read.counts, 0.01, 20))
        both.append((read, [dataset[position] for position in range(40)]))
    (streamed, samples), (at_hand, others) = both
    assert np.array_equal(streamed.counts, at_hand.counts)
    assert np.array_equal(streamed.sizes, at_hand.sizes)
    assert streamed.contents == at_hand.contents
    for sample, other in zip(samples, others, strict=True):
        assert sample.keys() == other.keys()
        assert all(np.array_equal(sample[name], other[name]) for name in sample)


def test_a_resumed_run_is_the_uninterrupted_one_when_source_and_target_are_streamed(game, tmp_path, monkeypatch):
    write(tmp_path / "stream", lengths=(6, 5, 6, 2))
    (tmp_path / "run.yaml").write_text(TINY_RUN, encoding="utf-8")
    own = [
        f"--source={{path: {tmp_path / 'game'}, streaming: true, label_space: cityscapes, num_images: null}}",
        f"--target={{path: {tmp_path / 'stream'}, streaming: true, shuffle_buffer: 8, num_images: null}}",
        "--train={max_steps: 7, batch_size: 2, micro_batches: 2}",
        "--test.num_images=1",
    ]
    undrawn(monkeypatch)

    def train(name, *more):
        config = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / name)]
        return main(["train", *config, *own, *more])

    assert train("whole") == 0
    stopped_before(monkeypatch, 4)
    assert train("cut") == 143
    assert train("cut", "--resume", "auto", "--data.num_workers", "1") == 0
    assert outcome(tmp_path / "cut", "t2sda") == outcome(tmp_path / "whole", "t2sda")


def test_draws_of_a_streamed_source_are_those_of_its_label_maps(game):
    """Against a slow twin that counts pixels itself."""
    config, made, _ = game
    counts = np.array([[(labels == c).sum() for c in range(19)] for _, _, labels in made])
    probabilities = class_probabilities(counts.sum(axis=0) / counts.sum(), 0.1)
    rare = rare_classes(read_domain(load_domain(config), CITYSCAPES_CLASSES).counts, 0.1, 20)
    for seed in range(50):
        twin = np.random.default_rng(seed)
        class_id = twin.choice(19, p=probabilities)
        index = twin.choice([index for index in range(18) if counts[index, class_id] > 20])
        assert rare.draw(np.random.default_rng(seed)) == (index, class_id)


def test_a_streamed_source_opens_the_files_it_draws_from(game, monkeypatch):
    config, _, _ = game
    parquet_opened()
    source = load_domain(config, CITYSCAPES_CLASSES)
    assert not parquet_opened()  # the class counts are read by pyarrow itself
    source.image(5)
    source.labels(17)
    assert parquet_opened() == ["train-00002-of-00009.parquet", "train-00008-of-00009.parquet"]
    monkeypatch.setattr("t2sda_hf.data.domains.LOOKED_AT", 3)
    read_domain(source, CITYSCAPES_CLASSES)
    assert len(set(parquet_opened())) == 3


def test_class_counts_that_are_missing_or_of_other_files_are_refused(game, tmp_path):
    config, _, arguments = game
    folder = tmp_path / "game"
    counts, third = folder / "class_counts-train.parquet", folder / "train-00002-of-00009.parquet"
    was, whole = counts.read_bytes(), third.read_bytes()
    for wrong in ({"crop_box": (0, 0, 20, 20)}, {"valid_mask": "mask.png"}):
        with pytest.raises(ValueError, match="crop_box and valid_mask would change them"):
            load_domain(replace(config, **wrong))
    third.write_bytes(whole + b" ")
    with pytest.raises(ValueError, match=rf"1 of 9 differ, first {third.name} \({len(whole)} bytes there, "):
        load_domain(config)
    third.unlink()
    with pytest.raises(ValueError, match=rf"1 of 8 differ, first {third.name} \(\d+ bytes there, no here"):
        load_domain(config)
    third.write_bytes(bytes(len(whole)))  # the same size
    with pytest.raises(ValueError, match=r"row \d+ .*is not the image that class_counts-train.parquet tells of"):
        read_domain(load_domain(config), CITYSCAPES_CLASSES)
    third.write_bytes(whole)
    counts.write_bytes(was[:-20])
    with pytest.raises(ValueError, match=r"class_counts-train.parquet holds no class counts: .*Write it anew with"):
        load_domain(config)
    counts.unlink()
    with pytest.raises(ValueError, match=r"class_counts-train.parquet, .*is not there: write it with `t2sda prepare`"):
        load_domain(config)
    assert main(["prepare", *arguments, "--processes", "1"]) == 0  # nothing else is written
    assert counts.read_bytes() == was
    for role in ("test", "target_labelled"):
        with pytest.raises(ValueError, match=rf"{role}.streaming must be false, or num_images be given"):
            load_config(None, [f"--{role}={{path: {folder}, streaming: true}}"])
