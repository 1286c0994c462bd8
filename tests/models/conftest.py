"""A SegFormer that runs in milliseconds, for every test of the model code."""

from typing import Any

import pytest
import torch

TINY: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 24, 32),
    "num_attention_heads": (1, 2, 3, 4),
    "decoder_hidden_size": 16,
    "num_labels": 5,
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Fields of a tiny config; SegformerConfig and T2SDAConfig both take them."""
    return dict(TINY)


@pytest.fixture
def images() -> torch.Tensor:
    """Two images whose sides are divisible by nothing."""
    return torch.randn(2, 3, 70, 91, generator=torch.Generator().manual_seed(0))
