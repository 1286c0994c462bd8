"""Table 7: what is pulled to what, and what the source loss sees (method 5.11)."""

from itertools import product

import pytest
import torch
from reference import pull as slow
from reference.samples import listed
from tiny import CLASSES, tiny_batch, tiny_config, tiny_graphs, tiny_networks, tiny_step, together
from torch import Tensor, nn

from t2sda_hf.batch import normalize
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods.t2sda import pseudo_target
from t2sda_hf.teacher import class_probabilities

K = len(CLASSES)
CALM = "--model={head_dropout: 0, drop_path_rate: 0}"
DOMAINS = ("source", "ptarget", "target")


def small(maps: Tensor) -> Tensor:
    return maps[:, ::4, ::4]


def embeddings_of(network: nn.Module) -> list[Tensor]:
    """A list that fills with what the network's projector returns."""
    made: list[Tensor] = []
    network.projector.register_forward_hook(lambda module, args, output: made.append(output.detach()))
    return made


def views(networks, batch, cfg) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Images and labels by domain (labels at feature size, 255 where they do not count), pseudo-labels, confidence."""
    with torch.no_grad():
        confidence, y_t = class_probabilities(networks.teacher(normalize(batch.target_images)).logits, (32, 64)).max(
            dim=1
        )
        styled = pseudo_target(tiny_step(cfg, networks, batch))
    trusted = y_t.clone()
    trusted[:, : cfg.uda.ignore_top] = trusted[:, -cfg.uda.ignore_bottom :] = 255
    images = {"source": batch.source_images, "ptarget": styled, "target": batch.target_images}
    labels = {"source": batch.source_labels, "ptarget": batch.source_labels, "target": trusted}
    return images, {name: small(maps) for name, maps in labels.items()}, small(y_t), small(confidence)


@pytest.mark.parametrize(("query", "key"), list(product(DOMAINS, DOMAINS)))
def test_queries_and_prototypes_are_those_of_the_named_domains(query, key):
    cfg = tiny_config(CALM, f"--pull={{query_domain: {query}, key_domain: {key}}}")
    networks, batch = tiny_networks(cfg), tiny_batch(cfg)
    asked, answered = embeddings_of(networks.student), embeddings_of(networks.teacher)
    losses, seen = together(tiny_graphs(cfg, networks, batch))
    ((queries,), (keys_t, keys_s, *_)) = asked, tuple(answered)
    samples, prototypes = listed(seen["samples"]), seen["prototypes"]
    images, labels, y_t, confidence = views(networks, batch, cfg)
    with torch.no_grad():
        expected = networks.student(normalize(images[query]), project=True, segment=False).embeddings
    torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-4)
    for keys, domain in ((keys_s, "source"), (keys_t, "target")):  # negatives come from these two, whatever is pulled
        torch.testing.assert_close(keys, networks.teacher(normalize(images[domain]), project=True).embeddings)
    pulled_to = networks.teacher(normalize(images[key]), project=True).embeddings.double()
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
    assert torch.isfinite(losses["pull"])


@pytest.mark.parametrize(("query", "key"), [("target", "source"), ("source", "target")])
def test_unsure_pseudo_labels_can_be_left_out(query, key):
    """Open point A24: neither queries nor members of prototypes; unreliable negatives are what they were."""
    cfg = tiny_config(CALM, f"--pull={{query_domain: {query}, key_domain: {key}, target_min_conf: 0.5}}")
    networks, batch = tiny_networks(cfg), tiny_batch(cfg)
    _, seen = together(tiny_graphs(cfg, networks, batch))
    samples = listed(seen["samples"])
    images, labels, y_t, confidence = views(networks, batch, cfg)
    keys_t = networks.teacher(normalize(images["target"]), project=True).embeddings.double()
    unsure = confidence < 0.5
    assert 0.1 < unsure.float().mean() < 0.9, "otherwise the test says nothing"
    trusted = labels["target"].masked_fill(unsure, 255)
    for class_id, rows, _, from_target in zip(*vars(samples).values(), strict=True):
        if query == "target":
            assert (trusted.flatten()[rows] == class_id).all()
        else:
            mean = slow.prototype(keys_t, trusted, class_id)
            torch.testing.assert_close(seen["prototypes"][class_id].double(), mean, rtol=1e-4, atol=1e-5)
        allowed = slow.target_negatives(y_t, confidence, cfg.pull.unreliable_ratio, class_id)
        assert set(from_target.tolist()) <= allowed
    wanted = [trusted.eq(c).any() and labels["source"].eq(c).any() for c in range(K)]
    assert samples.classes == [c for c in range(K) if wanted[c]]


def test_a_class_without_anything_to_pull_it_to_sends_no_queries():
    """The source shows one class, the target is predicted as several."""
    cfg = tiny_config(CALM, "--pull={query_domain: target, key_domain: source}")
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    batch.source_labels[:] = 2
    batch.source_labels[:, :8] = 3
    losses, seen = together(tiny_graphs(cfg, networks, batch))
    assert all(torch.isfinite(value) for value in losses.values())
    assert set(listed(seen["samples"]).classes) <= {2, 3}
    _, labels, _, _ = views(networks, batch, cfg)
    assert len(labels["target"].unique()) > 2, "the teacher must predict more classes for this test to say anything"


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
    batch, networks = tiny_batch(cfg), tiny_networks(cfg)
    seen: list[Tensor] = []
    networks.student.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    losses = next(tiny_graphs(cfg, networks, batch)).losses
    images = {"source": batch.source_images, "ptarget": pseudo_target(tiny_step(cfg, networks, batch))}
    assert (images["source"] - images["ptarget"]).abs().mean() > 0.02
    torch.testing.assert_close(seen[0], normalize(images[domain]))
    expected = segmentation_loss(tiny_networks(cfg).student(seen[0]).logits, batch.source_labels)
    assert losses["source"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mixed_image_still_shows_the_source():
    """Open point A7: only the source loss moves to the translated image."""
    given = []
    for name in ("source", "ptarget"):
        cfg = tiny_config(CALM, f"--uda.source_ce_on={name}", "--loss_weights={source: 0, pull: 0}")
        batch, networks = tiny_batch(cfg), tiny_networks(cfg)
        seen: list[Tensor] = []
        networks.student.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        list(tiny_graphs(cfg, networks, batch))
        given.append(seen[-1])
    torch.testing.assert_close(*given)
