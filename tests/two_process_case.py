"""A joined batch of four images and the class statistics the objective makes of it, or of a share of it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from t2sda_hf.batch import UdaBatch
from t2sda_hf.config import RunConfig
from t2sda_hf.losses.pull import class_counts
from t2sda_hf.methods import ClassMemory, Networks, Step
from t2sda_hf.methods.pseudo_labels import PseudoLabels, dynamic_weights
from t2sda_hf.methods.pull import pull_against

NUM_CLASSES, DIM = 4, 6


def case() -> tuple[RunConfig, dict[str, Tensor]]:
    cfg = RunConfig(classes=("road", "sky", "car", "person"))
    cfg = replace(cfg, pull=replace(cfg.pull, num_queries=8, num_negatives=8), uda=replace(cfg.uda, ignore_bottom=0))
    random = torch.Generator().manual_seed(5)
    labels = torch.randint(0, NUM_CLASSES, (4, 32, 32), generator=random)
    labels[0][labels[0] == 3] = 255  # a class that the first process does not see at all
    labels[1][labels[1] == 3] = 0
    return cfg, {
        "y_s": labels,
        "y_t": torch.randint(0, NUM_CLASSES - 1, (4, 32, 32), generator=random),
        "confidence": torch.rand(4, 32, 32, generator=random),
        "keys_s": torch.randn(4, DIM, 8, 8, generator=random),
    }


def share_of(arrays: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    return {name: array.chunk(world)[rank] for name, array in arrays.items()}


def statistics(
    arrays: dict[str, Tensor], cfg: RunConfig, sum_over_processes: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    nothing, images = torch.nn.Identity(), torch.zeros(len(arrays["y_s"]), 3, 32, 32)
    networks, memory = Networks(nothing, nothing, None, lambda s, t, g: s), ClassMemory(NUM_CLASSES, DIM)
    random = torch.Generator().manual_seed(0)
    step = Step(UdaBatch(images, arrays["y_s"]), networks, cfg, memory, random, random, sum_over_processes, 0)
    y_t, confidence, everywhere = arrays["y_t"], arrays["confidence"], torch.ones_like(arrays["confidence"])
    weights = dynamic_weights(step, y_t, confidence, everywhere)
    pseudo_labels = PseudoLabels(torch.empty(0), y_t, confidence, everywhere, everywhere, weights)
    samples, prototypes, importance = pull_against(step, arrays["keys_s"], pseudo_labels)
    small = arrays["y_s"][:, ::4, ::4]
    return {
        "prototypes": prototypes,
        "importance": importance,
        "queries": samples.num_queries.float(),
        "shares": sum_over_processes(class_counts(small, NUM_CLASSES)),
    }
