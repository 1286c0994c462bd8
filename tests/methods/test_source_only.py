"""The lower bound: cross-entropy on distorted source images, and nothing else."""

from dataclasses import replace

import pytest
import torch
from tiny import alone, tiny_batch, tiny_config, tiny_parts
from torch import Generator, Tensor

from t2sda_hf.augment.color import photometric_distortion
from t2sda_hf.batch import normalize
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import METHODS, source_only_losses

CFG = tiny_config("--method=source_only", "--model={head_dropout: 0, drop_path_rate: 0}")
SOURCE = replace(tiny_batch(CFG), target_images=None, outer_source=None, style_reference=None, inner_corner=None)


def losses(seed: int = 0) -> dict[str, Tensor]:
    (terms,) = source_only_losses(SOURCE, tiny_parts(CFG), CFG, 0, Generator().manual_seed(seed), alone)
    return terms


def test_it_is_the_cross_entropy_of_distorted_images():
    images = photometric_distortion(SOURCE.source_images, Generator().manual_seed(3))
    assert not torch.allclose(images, SOURCE.source_images)
    expected = segmentation_loss(tiny_parts(CFG).student(normalize(images)).logits, SOURCE.source_labels)
    terms = losses(seed=3)
    assert list(terms) == ["source"]
    assert terms["source"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_it_runs_the_student_once_and_no_other_network():
    parts = tiny_parts(CFG)
    calls = []
    parts.student.register_forward_hook(lambda *_: calls.append("student"))
    parts.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    list(source_only_losses(SOURCE, parts, CFG, 0, Generator().manual_seed(0), alone))
    assert calls == ["student"]


def test_gradients_reach_encoder_and_head_alone():
    parts = tiny_parts(CFG)
    for terms in source_only_losses(SOURCE, parts, CFG, 0, Generator().manual_seed(0), alone):
        terms["source"].backward()
    reached = {
        name: any(p.grad is not None for p in part.parameters()) for name, part in parts.student.named_children()
    }
    assert reached == {"segformer": True, "decode_head": True, "projector": False}


def test_it_is_a_function_of_the_generator():
    assert losses(1)["source"] == losses(1)["source"]
    assert losses(1)["source"] != losses(2)["source"]


def test_it_is_known_by_name():
    assert METHODS["source_only"] is source_only_losses
