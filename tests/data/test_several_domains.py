"""Several sources and targets: what a list means in a config, how often each domain and each class is drawn."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import CLASSES, tiny_config

from t2sda_hf.config import (
    RunConfig,
    changes,
    differences,
    domain_names,
    dump_config,
    load_config,
    shares_of,
)
from t2sda_hf.data.domains import JointDomain, load_domain, load_domains, read_domain
from t2sda_hf.data.pairs import PairDataset
from t2sda_hf.data.rare_class_sampling import joint_rare_classes, joint_shares_of_pixels, rare_classes
from t2sda_hf.data.streets import streets
from t2sda_hf.training.derive import Facts, derive, draw_probabilities, even_draws, worth_of_even_draws

TWO = "--source=[{path: streets-source, num_images: 3}, {path: streets-simulator, num_images: 2, share: 3}]"


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("role", ["source", "target", "test"])
def test_a_list_of_one_is_a_single_domain(role, tmp_path):
    single = load_config(None, [f"--{role}={{path: a, resize: [4, 8]}}"])
    assert load_config(None, [f"--{role}=[{{path: a, resize: [4, 8]}}]"]) == single
    (tmp_path / "run.yaml").write_text(f"{role}:\n- path: a\n  resize: [4, 8]\n", encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == single
    assert load_config(tmp_path / "run.yaml", [f"--{role}=[]"]) == RunConfig()


def test_each_domain_of_a_list_is_its_own_and_a_key_of_the_list_is_that_of_all(tmp_path):
    cfg = load_config(None, ["--test=[{path: a}, {path: b, split: night, label_map: {x: y}}]", "--test.resize=[4, 8]"])
    one, two = cfg.tests
    assert (one.path, one.split, one.label_map, one.resize) == ("a", "validation", {}, (4, 8))
    assert (two.path, two.split, two.label_map, two.resize) == ("b", "night", {"x": "y"}, (4, 8))
    words = ["--test.resize=[4, 8]", "--test=[{path: a}, {path: b, split: night, label_map: {x: y}}]"]
    assert load_config(None, words) == cfg  # in any order
    (tmp_path / "again.yaml").write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == cfg
    assert domain_names(asdict(cfg))["test"] == "a + b"
    assert shares_of(load_config(None, [TWO]).source) == (0.25, 0.75)


def test_runs_are_compared_domain_by_domain():
    one, two = (asdict(load_config(None, [f"--source=[{{path: a}}, {{path: b, share: {n}}}]"])) for n in (1, 2))
    assert differences(one, two) == {"source.2.share": (1.0, 2.0)}
    assert differences(yaml.safe_load(dump_config(load_config(None, [TWO]))), asdict(load_config(None, [TWO]))) == {}
    assert [changes(f"{role}.2.path") for role in ("source", "test")] == ["placement", "scoring"]
    assert changes("source.2.label_map.wall") == changes("source.2.share") == "learning"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--source=[{path: a}, {path: b, resize: 3}]"],
            r"source 2 of 2 \(b\): source.resize in the command line must",
        ),
        (["--source=[{path: a}, {path: b, share: 0}]"], r"source 2 of 2 \(b\): share must be positive, got 0.0"),
        (["--source=[{path: a}, {path: b, pth: c}]"], "'source.pth' in the command line, source 2 of 2. Did you mean"),
        (
            ["--source=[{path: a}, b]"],
            "source 2 of 2 in the command line must be a mapping of the keys of a domain, got",
        ),
        (["--target=[{path: a, share: 0.5}]"], "target.share must be left out for a single domain, got 0.5"),
        (["--target=[{path: a}, {split: b}]"], "target 2 of 2 must be a domain with a path, got ''"),
        (
            ["--target=[{path: a}, {path: a, share: 2}]"],
            r"target 2 of 2 \(a\) is target 1 again. Give it once; to have",
        ),
        (
            ["--test=[{path: a}, {path: b, share: 2}]"],
            "test.share must be left out: it is for sources and targets, got",
        ),
        (
            [TWO, "--source.path=a"],
            "source is a list of 2 domains, and source.path in the command line does not say of",
        ),
        (["--target_labelled=[{path: a}]"], "target_labelled in the command line is a section, got the value"),
    ],
)
def test_a_broken_list_says_which_domain_it_is(words, said):
    with pytest.raises(ValueError, match=said):
        load_config(None, words)


# ------------------------------------------------------------------------------------------------------------ sampling


def slow_draws(counts, shares, temperature, floor):
    """(image, class) -> probability: the domain by its share, a class of it by the joint frequencies, an image."""
    num_classes = len(counts[0][0])
    joint = [0.0] * num_classes
    for share, rows in zip(shares, counts, strict=True):
        pixels = sum(map(sum, rows))
        for c in range(num_classes):
            joint[c] += share * sum(row[c] for row in rows) / pixels
    found, first = {}, 0
    for share, rows in zip(shares, counts, strict=True):
        here = [c for c in range(num_classes) if any(row[c] for row in rows)]
        weights = {c: math.exp((1 - joint[c]) / temperature) for c in here}
        for c in here:
            rich = [i for i, row in enumerate(rows) if row[c] > floor] or [i for i, row in enumerate(rows) if row[c]]
            for i in rich:
                found[first + i, c] = share * weights[c] / sum(weights.values()) / len(rich)
        first += len(rows)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_of_several_domains_are_those_of_the_slow_twin(seed):
    random = np.random.default_rng(seed)
    counts = [random.integers(-60, 100, (number, 5)).clip(0) for number in (7, 3, 4)]
    counts[1][:, 2] = 0  # a class that one of them does not have
    shares = (0.5, 0.3, 0.2)
    rare = joint_rare_classes(counts, shares, 0.1, 20)
    expected = slow_draws([one.tolist() for one in counts], shares, 0.1, 20)
    found = Counter()
    for entry, (probability, images) in enumerate(zip(rare.probabilities, rare.images, strict=True)):
        for image in images:
            found[int(image), entry % 5] += probability / len(images)
    assert {pair: p for pair, p in found.items() if p} == pytest.approx(expected)
    assert rare.of_classes.sum() == pytest.approx(1)
    by_domain = np.split(draw_probabilities(rare, 14), [7, 10])
    assert [part.sum() for part in by_domain] == pytest.approx(shares)
    index, class_id = rare.draw(np.random.default_rng(seed))
    assert (index, class_id) in expected


def test_one_domain_is_drawn_from_as_ever():
    counts = np.random.default_rng(0).integers(0, 50, (9, 4))
    one, plain = joint_rare_classes([counts], (1.0,), 0.05, 10), rare_classes(counts, 0.05, 10)
    assert np.array_equal(one.probabilities, plain.probabilities)
    assert np.array_equal(plain.of_classes, plain.probabilities)
    assert np.array_equal(joint_shares_of_pixels([counts], (1.0,)), counts.sum(axis=0) / counts.sum())
    assert worth_of_even_draws([9], (1.0,)) == 9


def test_draws_by_shares_are_worth_as_many_images_as_they_can():
    assert worth_of_even_draws([10, 10], (0.5, 0.5)) == pytest.approx(20)
    assert worth_of_even_draws([1000, 10], (0.5, 0.5)) == pytest.approx(1 / (0.25 / 1000 + 0.25 / 10))
    assert even_draws([2, 1], (0.25, 0.75)).tolist() == [0.125, 0.125, 0.75]


def test_a_joint_domain_counts_through_its_parts_and_draws_by_the_shares():
    cfg = load_config(None, [f"--classes=[{', '.join(CLASSES)}]", TWO])
    joint = load_domains("source", cfg.source, CLASSES)
    assert isinstance(joint, JointDomain)
    parts = [load_domain(one, CLASSES) for one in cfg.sources]
    assert len(joint) == 5
    for index, (part, own) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        assert np.array_equal(joint.image(index), parts[part].image(own))
        assert np.array_equal(joint.labels(index), parts[part].labels(own))
        assert joint.at(index)[0].name == parts[part].name
    with pytest.raises(IndexError):
        joint.at(5)
    rng = np.random.default_rng(0)
    drawn = Counter(joint.draw(rng) for _ in range(4000))
    assert (drawn[3] + drawn[4]) / 4000 == pytest.approx(0.75, abs=0.03)
    read, each = read_domain(joint, CLASSES), [read_domain(part, CLASSES) for part in parts]
    assert np.array_equal(read.counts, np.concatenate([one.counts for one in each]))
    assert read.images == each[0].images | each[1].images
    swapped = read_domain(load_domains("source", cfg.sources[::-1], CLASSES), CLASSES)
    assert read.contents.fingerprint != swapped.contents.fingerprint


def test_target_halves_follow_the_shares_and_the_style_is_that_of_the_pair():
    size = "{crop_size: [96, 192], outer_crop_size: [96, 192], flip: false}"  # whole images
    lists = "[{path: streets-target, num_images: 2}, {path: streets-night, num_images: 2, share: 3}]"
    cfg = tiny_config("--rcs.enabled=false", f"--data={size}", TWO, f"--target={lists}")
    source = load_domains("source", cfg.source, cfg.classes)
    target = load_domains("target", cfg.target, cfg.classes, labelled=False)
    dataset, seen = PairDataset(cfg, source, target, None), Counter()
    for position in range(60):
        sample = dataset[position]
        assert np.array_equal(sample["style_reference"], sample["target_images"])
        night = any(np.array_equal(sample["target_images"], target.image(index)) for index in (2, 3))
        simulator = any(np.array_equal(sample["source_images"], source.image(index)) for index in (3, 4))
        seen[simulator, night] += 1
        again = dataset[position]
        assert all(np.array_equal(value, again[name]) for name, value in sample.items())
    assert sum(seen.values()) == 60
    assert 30 < seen[True, True] + seen[False, True] < 58  # 45 are expected
    assert 30 < seen[True, True] + seen[True, False] < 58
    assert len(seen) == 4  # each source meets each target


# ---------------------------------------------------------------------------------------------------- classes and sizes


def made(folder: Path, ids: np.ndarray, names: list[str]) -> str:
    """A labelled domain of two images, as words of YAML."""
    for number in range(2):
        for kind, array in (("images", np.stack([40 * ids] * 3, axis=-1) + number), ("labels", ids)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(folder / kind / f"{number}.png")
    return f"{{path: {folder}/images, label_path: {folder}/labels, class_names: [{', '.join(names)}]}}"


def test_a_class_that_one_source_has_is_learned_from_it_and_ignored_in_the_others(tmp_path):
    first = made(tmp_path / "a", np.tile([0, 1], (32, 16)), ["road", "sky"])
    other = made(tmp_path / "b", np.tile([0, 1, 2, 2], (64, 16)), ["sky", "pole", "road"])  # a pole is no class here
    cfg = load_config(None, ["--classes=[road, sky, person]", f"--source=[{first}, {other}]"])
    joint = load_domains("source", cfg.source, cfg.classes)
    assert set(np.unique(joint.labels(0))) == {0, 1}
    assert joint.labels(2)[0, :4].tolist() == [1, 255, 0, 0]  # neither right nor wrong
    read = read_domain(joint, cfg.classes)
    assert joint_shares_of_pixels(np.split(read.counts, 2), joint.shares) == pytest.approx([7 / 12, 5 / 12, 0])
    rare = joint_rare_classes(np.split(read.counts, 2), joint.shares, 0.5, 1)
    assert rare.probabilities.reshape(2, 3)[:, 2].tolist() == [0, 0]  # what nobody has is never drawn
    third = made(tmp_path / "c", np.tile([0, 1], (32, 16)), ["person", "road"])
    cfg = load_config(None, ["--classes=[road, sky, person]", f"--source=[{first}, {third}]"])
    read = read_domain(load_domains("source", cfg.source, cfg.classes), cfg.classes)
    by_domain = joint_rare_classes(np.split(read.counts, 2), (0.5, 0.5), 0.5, 1).probabilities.reshape(2, 3) > 0
    assert by_domain.tolist() == [[True, True, False], [True, False, True]]


def test_a_domain_that_cannot_be_read_is_named_by_its_place_and_path(tmp_path):
    good = made(tmp_path / "a", np.tile([0, 1], (32, 16)), ["road", "sky"])
    alien = made(tmp_path / "b", np.tile([0, 1], (32, 16)), ["cow", "hut"])
    for words, said in (
        (f"[{good}, {alien}]", r"source 2 of 2 \(.*b/images\): .*: no class is shared: the data set has cow, hut"),
        (f"[{good}, {{path: nowhere}}]", r"source 2 of 2 \(nowhere\): "),
    ):
        with pytest.raises(ValueError, match=said):
            load_domains("source", load_config(None, [f"--source={words}"]).source, ("road", "sky"))
    joint = load_domains(
        "source", load_config(None, [f"--source=[{good}, {good[:-1]}, num_images: 1}}]"]).source, ("road", "sky")
    )
    (tmp_path / "a" / "labels" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"source 1 of 2 \(.*a/images\): "):
        read_domain(joint, ("road", "sky"))


def test_a_stream_is_none_of_several(tmp_path):
    streets("target", "train", 2).to_parquet(tmp_path / "train.parquet")
    listed = load_config(None, [f"--target=[{{path: {tmp_path}, streaming: true}}, {{path: streets-night}}]"]).target
    with pytest.raises(ValueError, match=r"target 1 of 2 \(.*\) is streamed, which only a single target can be"):
        load_domains("target", listed, CLASSES, labelled=False)


def test_crops_fit_into_the_images_of_every_domain():
    counts = np.full((6, 19), 100)
    sizes = np.array([[400, 900]] * 4 + [[200, 500]] * 2)
    cfg = load_config(None, ["--source=[{path: a}, {path: b, resize: [300, 750]}]", "--target.path=c"])
    facts = Facts(counts, sizes, np.array([[600, 800]] * 3), None, (4, 2), ())
    derived = derive(cfg, facts)
    assert derived.cfg.data.crop_size == (288, 512)  # the second source is 300x750
    assert derived.cfg.data.outer_crop_size == (300, 750)
    said = " ".join(derived.said)
    assert "source images in the batches: 50% of a (train), 50% of b (train). Together their labelled" in said
    assert "source 1 images of 400x900 and source 2 images of 300x750" in said
