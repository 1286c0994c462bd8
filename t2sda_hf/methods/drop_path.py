"""Stochastic depth of SegFormer's encoder (DropPath, arXiv 1603.09382): all that a forward drops is drawn at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SegformerModel
from transformers.models.segformer.modeling_segformer import SegformerDropPath, SegformerLayer


class DrawnPaths(nn.Module):
    """What is kept of the branches of an encoder, drawn for a forward before its first block."""

    keep: Tensor

    def __init__(self, keep: list[float]) -> None:
        """`keep`: probability of every branch, in the order in which they come."""
        super().__init__()
        self.register_buffer("keep", torch.tensor(keep)[:, None], persistent=False)
        self.divisors: Iterator[Tensor] = iter(())  # (B,1,1) of each: infinity drops the branch of an image

    def draw(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook. In float32 on a CPU these are the numbers that transformers' modules draw one by one."""
        if encoder.training:
            images: Tensor = args[0] if args else kwargs["pixel_values"]
            kept = (torch.rand(len(self.keep), len(images), device=images.device) + self.keep).floor()
            self.divisors = iter((self.keep / kept)[..., None, None].unbind())


class _Divided(torch.autograd.Function):
    """Divides in float32. The gradient of a bfloat16 branch is rounded as it is divided, not by a kernel of its own."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, divisor: Tensor) -> Tensor:
        ctx.save_for_backward(divisor)
        ctx.dtype = branch.dtype
        return branch / divisor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (divisor,) = gradients, ctx.saved_tensors
        return torch.div(gradient, divisor, out=torch.empty_like(gradient, dtype=ctx.dtype)), None


class DropPath(nn.Module):
    """A branch (B,N,C) of an image is dropped, or it is divided by the probability with which it is kept."""

    def __init__(self, drawn: DrawnPaths) -> None:
        super().__init__()
        self._drawn = (drawn,)  # the encoder's, not a part of the block

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training:
            return hidden_states
        divisor = next(self._drawn[0].divisors, None)
        if divisor is None:
            raise RuntimeError(
                "more branches than were drawn for: activation checkpointing must be on before the networks are made."
            )
        if hidden_states.dtype == divisor.dtype or torch.compiler.is_compiling():
            return hidden_states / divisor
        divided: Tensor = _Divided.apply(hidden_states, divisor)
        return divided


def drop_paths_at_once(model: nn.Module) -> None:
    """Let the SegFormer encoder of a model that is trained draw for all of its branches before the first.

    A branch is one division then, where transformers' module takes five kernels; in float32 with the same bits. Not
    for an encoder with activation checkpointing, which draws again in the backward, block by block.
    """
    for encoder in model.modules():
        if not isinstance(encoder, SegformerModel) or encoder.is_activation_checkpointing:
            continue
        blocks = [module for module in encoder.modules() if isinstance(module, SegformerLayer)]
        dropping = [block for block in blocks if isinstance(block.drop_path, SegformerDropPath)]
        if not dropping:
            continue
        # A block drops twice: what it attended to, and what its feed-forward layers made of it.
        drawn = DrawnPaths([1 - block.drop_path.drop_prob for block in dropping for _ in range(2)])
        encoder.drawn_paths = drawn
        encoder.register_forward_pre_hook(drawn.draw, with_kwargs=True)
        for block in dropping:
            block.drop_path = DropPath(drawn).train(block.training)
