"""Distillation against slow twins: the soft labels, whose pseudo-labels, whose keys."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_model, tiny_step, together

from t2sda_hf.batch import normalize
from t2sda_hf.losses.segmentation import segmentation_loss, soft_label_loss
from t2sda_hf.methods import distil_losses, make_networks
from t2sda_hf.teacher import class_probabilities
from t2sda_hf.translate import build_engine

DISTIL = (
    "--method=distil",
    "--start_model=of a test",
    "--target.path=streets-target",
    "--augment={jitter_probability: 0, blur_probability: 0}",
)


def step_of(*overrides):
    cfg = tiny_config(*DISTIL, *overrides)
    larger = tiny_model(tiny_config("--model.decoder_hidden_size=24"), seed=3)
    larger.decode_head.classifier.weight.data *= 100
    networks = make_networks(cfg, tiny_model(cfg).train(), build_engine(cfg.translate), larger)
    return tiny_step(cfg, networks, tiny_batch(cfg)), larger


def losses_of(step):
    torch.manual_seed(0)
    return together(distil_losses(step))


def test_soft_labels_are_compared_as_the_slow_twin_does():
    random = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 2, 5, 3, 4, generator=random).unbind()
    total = 0.0
    for image in range(2):
        for y in range(3):
            for x in range(4):
                p = [math.exp(v) for v in others[image, :, y, x].tolist()]
                q = [math.exp(v) for v in logits[image, :, y, x].tolist()]
                total += sum(
                    a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q))) for a, b in zip(p, q, strict=True)
                )
    assert soft_label_loss(logits, others).item() == pytest.approx(total / 24, rel=1e-5)
    assert soft_label_loss(others + 3, others).item() == pytest.approx(0, abs=1e-6)
    small = torch.randn(2, 5, 2, 2, generator=random)
    larger = torch.nn.functional.interpolate(small, size=(3, 4), mode="bilinear", align_corners=False)
    assert soft_label_loss(small, others) == soft_label_loss(larger, others)


def test_the_finished_model_teaches_both_domains_and_is_not_changed():
    step, larger = step_of("--pull.start_step=1", "--model.head_dropout=0", "--model.drop_path_rate=0")
    before = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    batch = step.batch
    both = torch.cat([batch.source_images, batch.target_images])
    losses, seen = losses_of(step)
    soft = larger(normalize(both)).logits
    confidence, labels = class_probabilities(soft[2:], (32, 64)).max(dim=1)
    assert torch.equal(seen["pseudo_labels"], labels)
    torch.testing.assert_close(seen["confidence"], confidence)
    with torch.no_grad():
        logits = step.networks.student(normalize(both)).logits  # batch norm of the same batch
    torch.testing.assert_close(losses["distil"], soft_label_loss(logits, soft))
    torch.testing.assert_close(losses["source"], segmentation_loss(logits[:2], batch.source_labels))
    (losses["distil"] + losses["source"]).backward()
    assert all(parameter.grad is None for parameter in larger.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in larger.state_dict().items())


def test_the_pull_is_among_the_students_own_embeddings():
    step, _ = step_of("--loss_weights={distil: 0, source: 0}")
    losses, seen = losses_of(step)
    assert set(losses) == {"pull"}
    assert seen["prototypes"].shape[1] == step.cfg.projector.dim
    losses["pull"].backward()
    assert all(parameter.grad is not None for parameter in step.networks.student.projector.parameters())
