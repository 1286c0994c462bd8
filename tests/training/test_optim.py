"""The learning rate of the public log, and who is decayed at which rate."""

from collections.abc import Iterator

import pytest
import torch
from reference.schedule import learning_rate
from tiny import tiny_config, tiny_model
from torch import nn

from t2sda_hf.config import LossWeights, OptimConfig
from t2sda_hf.teacher import make_teacher
from t2sda_hf.training.loop import backward
from t2sda_hf.training.optim import learning_rate_factor, make_optimizer, set_learning_rate


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 6.0e-11),
        (49, 1.95766e-6),
        (99, 3.95026e-6),
        (749, 2.93990e-5),
        (1499, 5.77130e-5),
        (1500, 5.775e-5),
        (20_000, 3.0e-5),
        (39_999, 1.5e-9),
    ],
)
def test_rates_of_the_specification(step, rate):
    assert 6e-5 * learning_rate_factor(step, OptimConfig(warmup_steps=1500), 40_000) == pytest.approx(rate, rel=3e-6)


@pytest.mark.parametrize(
    ("max_steps", "warmup_steps", "warmup_ratio"), [(40_000, 1500, 1e-6), (100, 30, 0.1), (7, 0, 1.0)]
)
def test_every_step_equals_the_two_written_out_factors(max_steps, warmup_steps, warmup_ratio):
    config = OptimConfig(warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)
    for step in range(0, max_steps, max(max_steps // 500, 1)):
        expected = learning_rate(step, 1.0, max_steps, warmup_steps, warmup_ratio)
        assert learning_rate_factor(step, config, max_steps) == pytest.approx(expected, rel=1e-12)


def test_power_bends_the_decay():
    config = OptimConfig(warmup_steps=0, power=2.0)
    assert learning_rate_factor(50, config, 100) == pytest.approx(0.25)


def test_rates_rise_in_warm_up_and_fall_after():
    factors = [learning_rate_factor(step, OptimConfig(warmup_steps=1500), 40_000) for step in range(0, 40_000, 100)]
    peak = factors.index(max(factors))
    assert peak == 15
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[-1] < factors[0] + 0.01


@pytest.fixture
def student() -> nn.Module:
    return tiny_model()


def test_groups_are_those_of_the_specification(student):
    """Told here by the type of the module that owns a parameter and by the part it stands in."""
    config = OptimConfig()
    optimizer = make_optimizer(student.segformer, student, config)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)  # nobody twice
    assert set(found) == {id(p) for p in student.parameters()}  # nobody left out
    seen = set()
    for part_name, part in student.named_children():
        for module in part.modules():
            for parameter in module.parameters(recurse=False):
                if part_name == "segformer":
                    expected = (6e-5, 0.0 if isinstance(module, nn.LayerNorm) else 0.01)
                else:
                    expected = (pytest.approx(6e-4), 0.01)
                assert found[id(parameter)] == expected, (part_name, module)
                seen.add((part_name, type(module).__name__))
    assert {("segformer", "LayerNorm"), ("segformer", "Linear"), ("segformer", "Conv2d")} <= seen
    assert {("decode_head", "BatchNorm2d"), ("projector", "BatchNorm2d"), ("decode_head", "Conv2d")} <= seen


def test_biases_of_the_encoder_are_decayed(student):
    optimizer = make_optimizer(student.segformer, student, OptimConfig())
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    biases = [
        m.bias for m in student.segformer.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None
    ]
    assert biases
    assert {id(bias) for bias in biases} <= decayed


def test_settings_of_adamw(student):
    config = tiny_config("--optim={lr: 0.5, head_lr_multiplier: 3, weight_decay: 0.2}").optim
    optimizer = make_optimizer(student.segformer, student, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-8
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 1.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0, 0.2]


def test_rates_are_set_from_the_base_and_do_not_accumulate(student):
    optimizer = make_optimizer(student.segformer, student, OptimConfig())
    for factor in (0.5, 0.5, 0.1):
        set_learning_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([6e-6, 6e-6, 6e-5])


def test_a_factor_of_zero_moves_nothing_and_a_step_moves_the_student_alone(student):
    teacher = make_teacher(student)
    before = [p.detach().clone() for p in student.parameters()]
    optimizer = make_optimizer(student.segformer, student, OptimConfig())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    for factor, moved in ((0.0, False), (1.0, True)):
        set_learning_rate(optimizer, factor)
        optimizer.step()
        assert all(torch.equal(a, b) != moved for a, b in zip(before, student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_gradients_of_several_graphs_are_those_that_autograd_adds_up():
    """Bit by bit; a parameter that a graph leaves out keeps what it has, and one that none asks has none."""
    torch.manual_seed(0)
    student, weights = nn.ModuleDict({name: nn.Linear(5, 3) for name in ("both", "one", "none")}), LossWeights(pull=0.3)
    images = torch.randn(4, 5)

    def graphs() -> Iterator[dict[str, torch.Tensor]]:
        both, one = student["both"](images), student["one"](images)
        yield {"source": (both**2).sum() + one.sum(), "target": both.exp().sum()}
        yield {"pull": student["both"](images).sin().sum()}

    found = []
    for at_once in (True, False):
        student.zero_grad()
        for losses in graphs():
            if at_once:
                backward(losses, weights, student.parameters())
            else:
                sum(getattr(weights, name) * loss for name, loss in losses.items()).backward()
        found.append([parameter.grad for parameter in student.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert [gradient is None for gradient in found[0]] == [False] * 4 + [True] * 2
