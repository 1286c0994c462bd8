"""Source-free adaptation against slow twins: which pseudo-labels are trusted, what is pasted, what the pull is to."""

import math
from dataclasses import replace

import pytest
import torch
from reference.samples import listed
from tiny import CLASSES, tiny_batch, tiny_config, tiny_graphs, tiny_networks, together

from t2sda_hf.batch import UdaBatch
from t2sda_hf.evaluation.watch import falls
from t2sda_hf.teacher import surest_of_each_class

K = len(CLASSES)
CALM = "--augment={jitter_probability: 0, blur_probability: 0}"
FREE = (
    "--method=source_free",
    "--start_model=of a test",
    "--target.path=streets-target",
    "--pull.query_domain=target",
    "--uda.weight_scope=class",
    "--uda.pseudo_threshold=0.9",
    CALM,
)


def free_batch(cfg) -> UdaBatch:
    empty = torch.zeros(2, 0, 0, dtype=torch.int64)
    return UdaBatch(torch.zeros(2, 3, 0, 0), empty, tiny_batch(cfg).target_images)


@pytest.mark.parametrize(("share", "threshold"), [(0.5, 1.0), (0.3, 0.8), (1.0, 1.0), (0.01, 1.0)])
def test_of_each_class_the_surest_are_trusted(share, threshold):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, 6, 7), generator=random)  # class 4 of 5 is nowhere
    confidence = (torch.randint(5, 21, (2, 6, 7), generator=random) / 20).float()  # with ties
    inside = (torch.rand(2, 6, 7, generator=random) > 0.2).float()
    trusted = surest_of_each_class(labels, confidence, inside, share, threshold, 5)
    for class_id in range(4):
        mine = (labels == class_id) & (inside > 0)
        ranked = sorted(confidence[mine].tolist(), reverse=True)
        limit = ranked[math.ceil(share * len(ranked)) - 1]
        expected = mine & ((confidence >= limit) | (confidence >= threshold))
        assert torch.equal(trusted.bool() & (labels == class_id), expected)


def test_the_pull_is_to_the_rows_of_the_classifier_and_away_from_those_of_other_classes():
    cfg = tiny_config(*FREE)
    networks = tiny_networks(cfg)
    losses, seen = together(tiny_graphs(cfg, networks, free_batch(cfg)))
    rows = networks.teacher.decode_head.classifier.weight.flatten(1)
    torch.testing.assert_close(seen["prototypes"], rows)
    samples = listed(seen["samples"])
    assert samples.classes
    for class_id, negatives in zip(samples.classes, samples.source_negatives, strict=True):
        assert set(negatives.tolist()) <= set(range(K)) - {class_id}  # pixel c of the keys is the row of class c
    cells, labels = (seen[name][:, ::4, ::4].flatten() for name in ("pixel_weights", "pseudo_labels"))
    for class_id, queries in zip(samples.classes, samples.queries, strict=True):
        assert (labels[queries] == class_id).all()
        assert (cells[queries] > 0).all()
    assert torch.isfinite(losses["pull"])
    assert losses["pull"] > 0


def test_the_pull_reaches_encoder_and_head_and_neither_projector_nor_classifier():
    cfg = tiny_config(*FREE, "--loss_weights={target: 0, pull: 1}")
    networks = tiny_networks(cfg)
    for graph in tiny_graphs(cfg, networks, free_batch(cfg)):
        sum(graph.losses.values()).backward()
    reached = {name for name, p in networks.student.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert any(name.startswith("segformer.") for name in reached)
    assert "decode_head.linear_fuse.weight" in reached
    assert not any(name.startswith(("projector.", "decode_head.classifier.")) for name in reached)


def test_trusted_classes_of_one_target_image_are_pasted_into_the_other():
    cfg = tiny_config(*FREE, "--loss_weights.pull=0")
    batch = free_batch(cfg)
    _, seen = together(tiny_graphs(cfg, None, batch))
    labels, weights, pasted = seen["pseudo_labels"], seen["pixel_weights"], seen["from_source"]
    assert pasted.any()
    for image in range(2):
        other = 1 - image
        drawn = {int(labels[other, y, x]) for y, x in pasted[image].nonzero().tolist()}
        for y in range(0, labels.shape[1], 3):
            for x in range(0, labels.shape[2], 3):
                is_pasted = int(labels[other, y, x]) in drawn and weights[other, y, x] > 0
                assert bool(pasted[image, y, x]) == is_pasted
                source = other if is_pasted else image
                torch.testing.assert_close(seen["mixed_images"][image, :, y, x], batch.target_images[source, :, y, x])
                assert seen["mixed_labels"][image, y, x] == labels[source, y, x]
                assert seen["mixed_weights"][image, y, x] == weights[source, y, x]


def test_the_anchor_is_half_the_squared_distance_to_the_first_weights():
    cfg = tiny_config(*FREE, "--loss_weights={anchor: 0.1, pull: 0}")
    networks = tiny_networks(cfg)
    assert together(tiny_graphs(cfg, networks, free_batch(cfg)))[0]["anchor"] == 0
    number = 0
    for parameter in networks.student.parameters():
        parameter.data += 0.5
        number += parameter.numel()
    (last,) = [graph for graph in tiny_graphs(cfg, networks, free_batch(cfg)) if "anchor" in graph.losses]
    assert last.losses["anchor"].item() == pytest.approx(0.125 * number, rel=1e-3)
    last.losses["anchor"].backward()
    torch.testing.assert_close(
        networks.student.decode_head.classifier.bias.grad, torch.full((K,), 0.5), rtol=1e-4, atol=1e-5
    )


def test_class_balance_is_a_choice_for_adaptation_too():
    cfg = tiny_config("--uda.weight_scope=class", "--uda.class_share=0.25", CALM)
    _, seen = together(tiny_graphs(cfg))
    labels, confidence = seen["pseudo_labels"], seen["confidence"]
    inside = torch.zeros_like(confidence)
    inside[:, 2:-4] = 1
    expected = surest_of_each_class(labels, confidence, inside, 0.25, cfg.uda.pseudo_threshold, K)
    assert torch.equal(seen["pixel_weights"], expected)
    plain = replace(cfg, uda=replace(cfg.uda, weight_scope="batch"))
    assert not torch.equal(together(tiny_graphs(plain))[1]["pixel_weights"], expected)


def test_falls_are_counted_from_the_end():
    assert [falls(values) for values in ([], [1], [1, 2], [2, 1], [3, 2, 1], [3, 1, 2, 1], [1, 1], [2, 1, 1])] == [
        0,
        0,
        0,
        1,
        2,
        1,
        0,
        0,
    ]
