"""Labelled images of the target among those of the source: which of them make prototypes."""

from dataclasses import replace

import pytest
import torch
from reference import pull as slow
from tiny import CLASSES, tiny_batch, tiny_config, tiny_graphs, tiny_networks, together

from t2sda_hf.batch import normalize

CALM = "--augment={jitter_probability: 0, blur_probability: 0}"
FEW = ("--target.path=streets-target", "--target_labels=8")


@pytest.mark.parametrize("prototypes", ["source", "both"])
def test_prototypes_are_those_of_the_slow_twin_on_the_images_that_are_asked_for(prototypes):
    cfg = tiny_config(CALM, *FEW, f"--pull.prototypes={prototypes}")
    batch, networks = replace(tiny_batch(cfg), from_target=torch.tensor([False, True])), tiny_networks(cfg)
    losses, seen = together(tiny_graphs(cfg, networks, batch))
    keys = networks.teacher(normalize(batch.source_images), project=True).embeddings
    labels = batch.source_labels[:, 2::4, 2::4].clone()  # blocks of 8: the nearest of 4x4 is any
    if prototypes == "source":
        keys, labels = keys[:1], labels[:1]
    for class_id in range(len(CLASSES)):
        expected = slow.prototype(keys, labels, class_id)
        if expected is not None:
            torch.testing.assert_close(seen["prototypes"][class_id].double(), expected.double(), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(losses["pull"])


def test_other_losses_do_not_ask_whose_the_labelled_image_is():
    cfg = tiny_config(CALM, *FEW)
    batch = tiny_batch(cfg)
    batch.style_reference[0] = batch.outer_source[0]  # as the data give it: translated, it would be as it is
    of_target = replace(batch, from_target=torch.tensor([True, False]))
    plain, _ = together(tiny_graphs(cfg, None, batch))
    few, _ = together(tiny_graphs(cfg, None, of_target))
    both, _ = together(tiny_graphs(tiny_config(CALM, *FEW, "--pull.prototypes=both"), None, of_target))
    for name in ("source", "target"):
        torch.testing.assert_close(few[name], plain[name])
    for name in plain:
        torch.testing.assert_close(both[name], plain[name], rtol=1e-5, atol=1e-6)


def test_a_batch_of_the_target_alone_pulls_nothing_to_the_source():
    cfg = tiny_config(CALM, *FEW)
    batch = replace(tiny_batch(cfg), from_target=torch.tensor([True, True]))
    assert together(tiny_graphs(cfg, None, batch))[0]["pull"] == 0
