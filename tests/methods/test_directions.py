"""Table 7: what is pulled to what, and what the source loss sees (method 5.11)."""

from itertools import product

import pytest
import torch
from reference import pull as slow
from tiny import CLASSES, alone, tiny_batch, tiny_config, tiny_parts
from torch import Generator, Tensor

from t2sda_hf.batch import normalize
from t2sda_hf.config import RunConfig
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import t2sda
from t2sda_hf.methods.t2sda import pseudo_target, t2sda_losses
from t2sda_hf.teacher import make_pseudo_labels

K = len(CLASSES)
CALM = "--model={head_dropout: 0, drop_path_rate: 0}"
DOMAINS = ("source", "ptarget", "target")


def small(maps: Tensor) -> Tensor:
    return maps[:, ::4, ::4]


def run(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """Losses, parts, batch, and the arguments of pull_loss."""
    calls = []
    pull_loss = t2sda.pull_loss
    monkeypatch.setattr(t2sda, "pull_loss", lambda *args, **kw: calls.append(args) or pull_loss(*args, **kw))
    batch, parts = tiny_batch(cfg), tiny_parts(cfg)
    torch.manual_seed(0)
    terms: dict[str, Tensor] = {}
    for part in t2sda_losses(batch, parts, cfg, 0, Generator().manual_seed(0), alone):
        terms |= part
    return terms, parts, batch, calls


def views(parts, batch, cfg) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Images and labels by domain (labels at feature size, 255 where they do not count), pseudo-labels, confidence."""
    with torch.no_grad():
        y_t, confidence = make_pseudo_labels(parts.teacher(normalize(batch.target_images)).logits, (32, 64))
        styled = pseudo_target(batch, parts, cfg, Generator())
    trusted = y_t.clone()
    trusted[:, : cfg.uda.ignore_top] = trusted[:, -cfg.uda.ignore_bottom :] = 255
    images = {"source": batch.source_images, "ptarget": styled, "target": batch.target_images}
    labels = {"source": batch.source_labels, "ptarget": batch.source_labels, "target": trusted}
    return images, {name: small(maps) for name, maps in labels.items()}, small(y_t), small(confidence)


@pytest.mark.parametrize(("query", "key"), list(product(DOMAINS, DOMAINS)))
def test_queries_and_prototypes_are_those_of_the_named_domains(query, key, monkeypatch):
    cfg = tiny_config(CALM, f"--pull={{query_domain: {query}, key_domain: {key}}}")
    terms, parts, batch, calls = run(cfg, monkeypatch)
    (args,) = calls
    images, labels, y_t, confidence = views(parts, batch, cfg)
    queries, keys_s, keys_t, prototypes, samples, _ = args
    with torch.no_grad():
        expected = parts.student(normalize(images[query]), project=True, segment=False).embeddings
    torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-4)
    for keys, domain in ((keys_s, "source"), (keys_t, "target")):  # negatives come from these two, whatever is pulled
        torch.testing.assert_close(keys, parts.teacher(normalize(images[domain]), project=True).embeddings)
    pulled_to = parts.teacher(normalize(images[key]), project=True).embeddings.double()
    for class_id in range(K):
        mean = slow.prototype(pulled_to, labels[key], class_id)
        if mean is not None:
            torch.testing.assert_close(prototypes[class_id].double(), mean, rtol=1e-4, atol=1e-5)

    counts = [int((labels[query] == c).sum()) for c in range(K)]
    wanted = slow.cbqs(counts, K, cfg.pull.num_queries)
    has_key = [bool((labels[key] == c).any()) for c in range(K)]
    assert samples.classes == [c for c in range(K) if wanted[c] and has_key[c]]
    for class_id, rows, from_source, from_target in zip(*vars(samples).values(), strict=True):
        assert len(rows) == wanted[class_id]
        assert (labels[query].flatten()[rows] == class_id).all()
        assert set(from_source.tolist()) <= slow.source_negatives(labels["source"], class_id)
        allowed = slow.target_negatives(y_t, confidence, cfg.pull.unreliable_ratio, class_id)
        assert set(from_target.tolist()) <= allowed
    assert torch.isfinite(terms["pull"])


@pytest.mark.parametrize(("query", "key"), [("target", "source"), ("source", "target")])
def test_unsure_pseudo_labels_can_be_left_out(query, key, monkeypatch):
    """Open point A24: neither queries nor members of prototypes; unreliable negatives are what they were."""
    cfg = tiny_config(CALM, f"--pull={{query_domain: {query}, key_domain: {key}, target_min_conf: 0.5}}")
    _, parts, batch, calls = run(cfg, monkeypatch)
    _, labels, y_t, confidence = views(parts, batch, cfg)
    unsure = confidence < 0.5
    assert 0.1 < unsure.float().mean() < 0.9, "otherwise the test says nothing"
    trusted = labels["target"].masked_fill(unsure, 255)
    _, _, keys_t, prototypes, samples, _ = calls[0]
    for class_id, rows, _, from_target in zip(*vars(samples).values(), strict=True):
        if query == "target":
            assert (trusted.flatten()[rows] == class_id).all()
        else:
            mean = slow.prototype(keys_t.double(), trusted, class_id)
            torch.testing.assert_close(prototypes[class_id].double(), mean, rtol=1e-4, atol=1e-5)
        allowed = slow.target_negatives(y_t, confidence, cfg.pull.unreliable_ratio, class_id)
        assert set(from_target.tolist()) <= allowed
    wanted = [trusted.eq(c).any() and labels["source"].eq(c).any() for c in range(K)]
    assert samples.classes == [c for c in range(K) if wanted[c]]


def test_a_class_without_anything_to_pull_it_to_sends_no_queries(monkeypatch):
    """The source shows one class, the target is predicted as several."""
    cfg = tiny_config(CALM, "--pull={query_domain: target, key_domain: source}")
    batch, parts = tiny_batch(cfg), tiny_parts(cfg)
    batch.source_labels[:] = 2
    batch.source_labels[:, :8] = 3
    calls = []
    pull_loss = t2sda.pull_loss
    monkeypatch.setattr(t2sda, "pull_loss", lambda *args, **kw: calls.append(args) or pull_loss(*args, **kw))
    for terms in t2sda_losses(batch, parts, cfg, 0, Generator().manual_seed(0), alone):
        assert all(torch.isfinite(value) for value in terms.values())
    assert set(calls[0][4].classes) <= {2, 3}
    _, labels, _, _ = views(parts, batch, cfg)
    assert len(labels["target"].unique()) > 2, "the teacher must predict more classes for this test to say anything"


@pytest.mark.parametrize(
    ("query", "key", "student", "teacher"),
    [
        ("ptarget", "source", 3, 2),
        ("source", "source", 3, 2),
        ("source", "target", 3, 2),
        ("source", "ptarget", 3, 3),  # only this one looks at a third kind of key
        ("target", "source", 3, 2),
    ],
)
def test_every_direction_costs_its_own_passes(query, key, student, teacher):
    cfg = tiny_config(f"--pull={{query_domain: {query}, key_domain: {key}}}")
    batch, parts = tiny_batch(cfg), tiny_parts(cfg)
    calls = []
    parts.student.register_forward_hook(lambda *_: calls.append("student"))
    parts.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    list(t2sda_losses(batch, parts, cfg, 0, Generator().manual_seed(0), alone))
    assert (calls.count("student"), calls.count("teacher")) == (student, teacher)


@pytest.mark.parametrize(
    ("overrides", "translates"),
    [
        ([], True),
        (["--pull.query_domain=source"], False),
        (["--pull={query_domain: source, key_domain: target}"], False),
        (["--pull={query_domain: source, key_domain: ptarget}"], True),
        (["--pull.query_domain=target"], False),
        (["--loss_weights.pull=0"], False),
        (["--loss_weights.pull=0", "--uda.source_ce_on=ptarget"], True),
        (["--loss_weights.pull=0", "--mix.source=pseudo_target"], True),
        (["--translate.engine=none"], False),
        (["--method=source_only"], False),
    ],
)
def test_images_are_translated_only_if_somebody_looks_at_them(overrides, translates):
    cfg = tiny_config(*overrides)
    assert cfg.translates == cfg.uses_outer_crop == translates


@pytest.mark.parametrize("pull", [0.1, 0])
@pytest.mark.parametrize("domain", ["source", "ptarget"])
def test_the_source_loss_can_see_the_translated_image(domain, pull):
    cfg = tiny_config(CALM, f"--uda.source_ce_on={domain}", f"--loss_weights.pull={pull}")
    batch, parts = tiny_batch(cfg), tiny_parts(cfg)
    seen: list[Tensor] = []
    parts.student.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    terms = next(t2sda_losses(batch, parts, cfg, 0, Generator().manual_seed(0), alone))
    images = {"source": batch.source_images, "ptarget": pseudo_target(batch, parts, cfg, Generator())}
    assert (images["source"] - images["ptarget"]).abs().mean() > 0.02
    torch.testing.assert_close(seen[0], normalize(images[domain]))
    expected = segmentation_loss(tiny_parts(cfg).student(seen[0]).logits, batch.source_labels)
    assert terms["source"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mixed_image_still_shows_the_source():
    """Open point A7: only the source loss moves to the translated image."""
    given = []
    for name in ("source", "ptarget"):
        cfg = tiny_config(CALM, f"--uda.source_ce_on={name}", "--loss_weights={source: 0, pull: 0}")
        batch, parts = tiny_batch(cfg), tiny_parts(cfg)
        seen: list[Tensor] = []
        parts.student.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        list(t2sda_losses(batch, parts, cfg, 0, Generator().manual_seed(0), alone))
        given.append(seen[-1])
    torch.testing.assert_close(*given)
