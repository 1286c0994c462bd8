"""Randomness as a function of (seed, step, slot): nothing random survives a step, so nothing random is saved."""

import numpy as np
import torch
from torch import Generator

_STEP_STREAM = 2  # tells these numbers from those of the data
_INIT_STREAM = 3


def _derive(*path: int) -> int:
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def seed_initial_weights(seed: int) -> None:
    """Seed torch's global generator for building the networks."""
    torch.manual_seed(_derive(seed, _INIT_STREAM))


def seed_step(seed: int, step: int, slot: int, device: torch.device) -> tuple[Generator, Generator]:
    """Two generators for what the objective draws in one micro-batch, of the CPU and of the device of the networks.

    Also seeds dropout and drop path.

    Args:
        seed: of the run.
        step: index of the running update.
        slot: process_index · micro_batches + micro-batch, so that two processes draw what two micro-batches draw.
    """
    torch.manual_seed(_derive(seed, _STEP_STREAM, step, slot, 0))  # the global one: dropout and drop path
    own = device if device.type in ("cuda", "mps", "xpu") else "cpu"
    drawn = (_derive(seed, _STEP_STREAM, step, slot, stream) for stream in (1, 2))
    return Generator().manual_seed(next(drawn)), Generator(own).manual_seed(next(drawn))
