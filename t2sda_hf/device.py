"""What a step must not do on a GPU: make constants, wait for small numbers, round products that must be exact."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Small numbers that the host drew, on `device`, without a wait."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float | bool, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that never change, on `device`. Kept, because making them waits for it. Nobody writes into them."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=32)
def integers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0, 1, ..., count - 1, kept like a `constant`."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=dtype, device=device)


def per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """(1,3,1,1), a constant for each channel, where the images are."""
    return constant(tuple(values), images.device).view(1, 3, 1, 1)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in float32, whatever `train.precision` says: TF32 keeps 10 bits of what it multiplies."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
