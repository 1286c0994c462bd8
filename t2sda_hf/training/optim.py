"""AdamW, its parameter groups and the learning rate as a closed form of the step (paper section 4.1; method 4)."""

import torch
from torch import nn

from ..config import OptimConfig


def learning_rate_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Share of the base rate at `step` (from 0): warm-up *times* decay, as in mmcv, not one after the other.

    decay = (1 - step/max_steps)^power; before `warmup_steps` it is multiplied by
    1 - (1 - step/warmup_steps)·(1 - warmup_ratio). With the paper's values and base 6e-5 the rate is 6e-11 at step 0,
    5.7713e-5 at 1499, 5.775e-5 at 1500 and 3e-5 at 20,000.
    """
    factor = (1 - step / max_steps) ** config.power
    if step < config.warmup_steps:
        factor *= 1 - (1 - step / config.warmup_steps) * (1 - config.warmup_ratio)
    return factor


def peak_factor(config: OptimConfig, max_steps: int) -> float:
    """The largest `learning_rate_factor` of a run, at one of a thousand of its steps."""
    steps = range(0, max_steps, max(max_steps // 1000, 1))
    return max(learning_rate_factor(step, config, max_steps) for step in steps)


def make_optimizer(encoder: nn.Module, student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in three groups: encoder weights, encoder norms (no decay), everything else at ten times the rate.

    Groups are told by module, never by name. Biases are decayed and so are the head's batch norms, as in DAFormer.

    Args:
        encoder: part of the student.
        student: head and projector are what it has beside the encoder.
    """
    norms = {
        id(parameter)
        for module in encoder.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    inside = {id(parameter) for parameter in encoder.parameters()}
    rest = [p for p in student.parameters() if id(p) not in inside]
    groups = [
        {"params": [p for p in encoder.parameters() if id(p) not in norms], "lr": config.lr},
        {"params": [p for p in encoder.parameters() if id(p) in norms], "lr": config.lr, "weight_decay": 0.0},
        {"params": rest, "lr": config.lr * config.head_lr_multiplier},
    ]
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate = its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
