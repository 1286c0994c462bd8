"""How to compute on a GPU: at which precision, without making constants, without waiting for small numbers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .errors import OutOfMemory


def allow_tf32(precision: str) -> None:
    """Let products and convolutions of float32 be TF32 on GPUs that have it, unless `train.precision` is float32."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def choose_algorithms(deterministic: bool) -> None:
    """Which algorithms a training uses on a GPU: those that are fastest for its crops, or those that repeat.

    Which one is fastest is measured, and may be another one in another process. What has no algorithm that repeats
    warns and runs (`torch.use_deterministic_algorithms`). The fused kernels of attention are such: in their place the
    products themselves repeat, and need more memory.
    """
    if torch.cuda.is_available():  # a CPU's kernel has the same switch, and repeats
        fused = torch.backends.cuda
        for enable in (fused.enable_flash_sdp, fused.enable_mem_efficient_sdp, fused.enable_cudnn_sdp):
            enable(not deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:  # cuBLAS reads it when its first product is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False


def make_accelerator(precision: str, **settings: Any) -> Accelerator:
    """The accelerator of this process. Every command that runs a network has it from here, so that all round alike.

    Args:
        precision: `train.precision`. With another than bf16 the launch decides whether networks compute in bfloat16.
        settings: of `Accelerator`.
    """
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else None, **settings)
    allow_tf32(precision)
    return accelerator


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
def advised(keys: str) -> Iterator[None]:
    """Make an error of torch that no memory is left an `OutOfMemory` that says what to do: `keys`, a sentence.

    Not one inside another: the innermost knows best.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(f"{str(error).splitlines()[0].rstrip('. ')}. {keys}") from error


def out_of_memory(error: RuntimeError) -> bool:
    """Whether no memory is left. torch has a type for that on a GPU, and only words on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in the type of what is multiplied, whatever `train.precision` says: TF32 keeps 10 bits of it.

    Not those of a backward, which comes later. No wait for the device.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with ExitStack() as without:
            for kind in ("cuda", "cpu"):
                if torch.is_autocast_enabled(kind):
                    without.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
