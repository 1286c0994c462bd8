"""Drawn at once: the same branches are dropped as by transformers' modules, bit by bit, with fewer kernels."""

import math
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.segformer.modeling_segformer import SegformerDropPath

from t2sda_hf.methods.drop_path import DropPath, drop_paths_at_once
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation


def network(rate: float = 0.5) -> T2SDAForSemanticSegmentation:
    torch.manual_seed(0)
    sizes = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    config = T2SDAConfig(**sizes, head="all_mlp", decoder_hidden_size=8, num_labels=3, drop_path_rate=rate)
    return T2SDAForSemanticSegmentation(config)


def trained_once(model: T2SDAForSemanticSegmentation) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of two forwards with one generator, as a step has them, and the gradients of their sum."""
    torch.manual_seed(1)
    images = torch.randn(3, 3, 64, 96)
    logits = torch.cat([model(images).logits, model(images.flip(0)).logits])
    logits.square().sum().backward()
    return logits, [own.grad for own in model.parameters() if own.grad is not None]


def test_the_same_branches_are_dropped() -> None:
    plain = network()
    joint = deepcopy(plain)
    drop_paths_at_once(joint)
    assert sum(isinstance(module, DropPath) for module in joint.modules()) == 4  # the first block never drops
    assert not any(isinstance(module, SegformerDropPath) for module in joint.modules())
    assert joint.state_dict().keys() == plain.state_dict().keys()
    logits, gradients = trained_once(plain)
    next_number = torch.rand(1)
    found, own = trained_once(joint)
    assert torch.equal(torch.rand(1), next_number)  # whatever draws next, draws what it drew before
    assert torch.equal(found, logits)
    assert all(torch.equal(one, other) for one, other in zip(own, gradients, strict=True))


def test_a_copy_draws_for_itself() -> None:
    """The teacher is a copy of the student: what one draws is not what the other drops."""
    model = network()
    drop_paths_at_once(model)
    copy = deepcopy(model)
    paths = {id(module._drawn[0]) for net in (model, copy) for module in net.modules() if isinstance(module, DropPath)}
    assert len(paths) == 2
    assert torch.equal(trained_once(model)[0], trained_once(copy)[0])


def test_nothing_is_dropped_where_nothing_was_or_blocks_are_computed_twice() -> None:
    model = network().eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).logits
    drop_paths_at_once(model)
    assert torch.equal(model(images).logits, expected)
    for other in (network(rate=0.0), network()):
        other.activation_checkpointing_enable()
        drop_paths_at_once(other)
        assert not any(isinstance(module, DropPath) for module in other.modules())
    trained_once(other.train())


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_mean_over_many_images_is_kept(rate: float) -> None:
    model = network(rate)
    drop_paths_at_once(model)
    encoder = model.pretrained_encoder
    last = [module for module in encoder.modules() if isinstance(module, DropPath)][-1]
    last._drawn[0].draw(encoder.train(), (torch.empty(20000, 3, 1, 1),), {})
    divisors, keep = list(last._drawn[0].divisors), last._drawn[0].keep
    assert len(divisors) == len(keep) == 8
    assert keep[-1] == 1 - rate
    for divisor, own in zip(divisors, keep, strict=True):
        assert set(divisor.unique().tolist()) <= {math.inf, own.item()}
        assert abs((1 / divisor).mean().item() - 1) < 0.03


class Count(TorchDispatchMode):
    """Operations that are dispatched."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_a_branch_takes_fewer_kernels() -> None:
    numbers = []
    for at_once in (False, True):
        model = network()
        if at_once:
            drop_paths_at_once(model)
        with Count() as count:
            trained_once(model)
        numbers.append(count.number)
    assert numbers[0] - numbers[1] >= 2 * (8 * 4 - 12)  # two forwards of eight branches
