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


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder from the image to the head: what transformers calls a ...Layer in a list of such.

    Of lists in lists the innermost count. A ResNet has its bottlenecks in sequences instead.
    """

    def inside(container: type[nn.Module], *endings: str) -> list[nn.Module]:
        return [
            child
            for module in encoder.modules()
            if isinstance(module, container)
            for child in module.children()
            if type(child).__name__.endswith(endings)
        ]

    found = inside(nn.ModuleList, "Layer")
    holders = {id(module) for module in found for part in module.modules() if part is not module and part in found}
    innermost = [module for module in found if id(module) not in holders]
    if innermost:
        return innermost
    found = inside(nn.Sequential, "Layer", "Bottleneck")
    parts = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in parts]


def layer_scales(encoder: nn.Module, decay: float) -> dict[int, float]:
    """By id of each parameter of the encoder its share of the learning rate (BEiT, arXiv 2106.08254).

    decay^(N + 1 - i) for block i of N from 1, what comes before the first block has i = 0, what comes after the last
    N + 1; parameters between two blocks learn as the one before.

    Raises:
        ValueError: if no blocks are found.
    """
    if decay == 1:
        return {id(parameter): 1.0 for parameter in encoder.parameters()}
    blocks = blocks_of(encoder)
    if not blocks:
        raise ValueError(f"optim.layer_decay must be 1 for {type(encoder).__name__}, in which no blocks were found.")
    number = {id(p): index for index, block in enumerate(blocks, 1) for p in block.parameters()}
    scales, last = dict[int, float](), 0
    for parameter in encoder.parameters():
        last = number.get(id(parameter), len(blocks) + 1 if last == len(blocks) else last)
        scales[id(parameter)] = decay ** (len(blocks) + 1 - last)
    return scales


def make_optimizer(encoder: nn.Module, student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in three groups: encoder weights, encoder norms (no decay), everything else at ten times the rate.

    Groups are told by module, never by name. Biases are decayed and so are the head's batch norms, as in DAFormer.
    With a layer decay there are as many groups of the encoder as it has rates. What is not trained is in none.

    Args:
        encoder: part of the student.
        student: head and projector are what it has beside the encoder.

    Raises:
        ValueError: see `layer_scales`.
    """
    norms = {
        id(parameter)
        for module in encoder.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    inside = {id(parameter) for parameter in encoder.parameters()}
    rest = [p for p in student.parameters() if id(p) not in inside and p.requires_grad]
    scales = layer_scales(encoder, config.layer_decay)
    groups = []
    for scale in sorted(set(scales.values())):
        own = [p for p in encoder.parameters() if p.requires_grad and scales[id(p)] == scale]
        rate = config.lr * scale
        groups += [
            {"params": [p for p in own if id(p) not in norms], "lr": rate},
            {"params": [p for p in own if id(p) in norms], "lr": rate, "weight_decay": 0.0},
        ]
    groups.append({"params": rest, "lr": config.lr * config.head_lr_multiplier})
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate = its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
