"""The lower bound: cross-entropy on distorted source images, and nothing else."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_graphs, tiny_networks
from torch import Generator, Tensor

from t2sda_hf.augment.color import photometric_distortion
from t2sda_hf.batch import normalize
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import METHODS, source_only_losses

CFG = tiny_config("--method=source_only", "--model={head_dropout: 0, drop_path_rate: 0}")
SOURCE = replace(tiny_batch(CFG), target_images=None, outer_source=None, style_reference=None, inner_corner=None)


def losses(seed: int = 0) -> dict[str, Tensor]:
    (graph,) = tiny_graphs(CFG, batch=SOURCE, seed=seed)
    return graph.losses


def test_it_is_the_cross_entropy_of_distorted_images():
    images = photometric_distortion(SOURCE.source_images, Generator().manual_seed(3))
    assert not torch.allclose(images, SOURCE.source_images)
    expected = segmentation_loss(tiny_networks(CFG).student(normalize(images)).logits, SOURCE.source_labels)
    terms = losses(seed=3)
    assert list(terms) == ["source"]
    assert terms["source"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_reach_encoder_and_head_alone():
    networks = tiny_networks(CFG)
    for graph in tiny_graphs(CFG, networks, SOURCE):
        graph.losses["source"].backward()
    reached = {
        name: any(p.grad is not None for p in part.parameters()) for name, part in networks.student.named_children()
    }
    assert reached == {"segformer": True, "decode_head": True, "projector": False}


def test_it_is_a_function_of_the_generator():
    assert losses(1)["source"] == losses(1)["source"]
    assert losses(1)["source"] != losses(2)["source"]


def test_it_is_known_by_name():
    assert METHODS["source_only"] is source_only_losses


def test_the_upper_bound_is_the_same_objective():
    assert METHODS["target_only"] is METHODS["source_only"] is source_only_losses
