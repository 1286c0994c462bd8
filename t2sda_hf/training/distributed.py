"""Several processes, one model: the student is not wrapped, its gradients are averaged once per step.

One backward per loss term frees each graph before the next is built; a DDP wrapper cannot do that, and needs every
parameter in every graph. So the average is ours.

Launched with FSDP2, the networks are sharded instead: of every parameter, its gradient, its AdamW moments and its
teacher's copy a process keeps one piece. torch's `fully_shard` puts a block together where it is used and averages its
gradient after each backward. All else is elementwise on the pieces, or asks here for whole tensors.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.environment import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.models.segformer.modeling_segformer import SegformerLayer

from ..models.resnet import Bottleneck

SIGN_OF_LIFE = 0.5  # seconds between two of the main process while it is busy
BUCKET_ELEMENTS = 16_000_000  # 64 MB of float32 in flight


def broadcast_from_main(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Give every process the values that these tensors have on process 0. Collective."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.data, src=0)


def shards(accelerator: Accelerator) -> bool:
    """Whether the networks of this run are sharded: as accelerate was launched, also where it drops FSDP itself (CPU).

    Raises:
        ValueError: for a kind of FSDP that is not built.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            "accelerate was given fsdp_version 1; set fsdp_version: 2, or launch with --accelerate_config fsdp2."
        )
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "add processes"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set model.activation_checkpointing"),
    ):
        if parse_flag_from_env(name):
            raise ValueError(f"accelerate was given {name.lower()}, which is not built here: {instead} instead.")
    return accelerator.num_processes > 1


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Leave on this process one piece of every parameter, in place; buffers stay whole. Collective."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    named = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in network.modules():
        if isinstance(module, SegformerLayer | Bottleneck) or type(module).__name__ in named - {"SegformerStage"}:
            fully_shard(module, mesh=mesh)
    # By default the outermost part would stay whole after a forward, and so after those of the teacher.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; any other as it is. Collective if it is sharded."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def whole_network(network: nn.Module, like: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy of a sharded network that is whole on every process; any other network as it is. Collective.

    Args:
        network: sharded or not.
        like: the same network before it was sharded, with any weights; not changed.
        accelerator: of this process.
    """
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return network
    copied = deepcopy(like).to(accelerator.device)
    own = copied.state_dict()  # of the same memory
    for name, tensor in network.state_dict().items():  # one at a time
        own[name].copy_(whole_tensor(tensor))
    return copied


def take_from_main(tensor: Tensor, given: Tensor | None, accelerator: Accelerator) -> None:
    """Put a whole tensor that only the main process has (`given`) into `tensor` of every process. Collective."""
    if isinstance(tensor, DTensor):
        if given is None:
            given = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.copy_(distribute_tensor(given.to(accelerator.device), tensor.device_mesh, tensor.placements))
        return
    if given is not None:
        tensor.copy_(given)
    broadcast_from_main([tensor], accelerator)


def decided_by_main(decide: Callable[[], Any], accelerator: Accelerator, *refusals: type[Exception]) -> Any:
    """What `decide` returns or raises on the main process, on every process. Collective; the others do not call it.

    Args:
        decide: returns something small.
        accelerator: of this process.
        refusals: errors that are handed on; any other ends only the main process.
    """
    decided: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            decided[0] = decide()
        except refusals as error:
            decided[1] = error
    result, refusal = broadcast_object_list(decided) if accelerator.num_processes > 1 else decided
    if refusal is not None:
        raise refusal
    return result


def done_by_main(do: Callable[[], Any], accelerator: Accelerator, *refusals: type[Exception]) -> Any:
    """`decided_by_main` of what may take longer than processes wait for each other. Collective.

    It is done in a thread, and the others hear of the main process meanwhile: they end if it dies or falls silent.
    """
    if accelerator.num_processes == 1:
        return decided_by_main(do, accelerator, *refusals)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(do) if accelerator.is_main_process else None
        while True:
            if running is not None:
                wait([running], timeout=SIGN_OF_LIFE)
            if largest(int(running is not None and running.done()), accelerator):
                break
    return decided_by_main(running.result if running is not None else _nothing, accelerator, *refusals)


def _nothing() -> None:
    pass


def largest(value: int, accelerator: Accelerator) -> int:
    """The largest `value` of all processes. Collective; the host waits for other hosts, not for its device."""
    if accelerator.num_processes == 1:
        return value
    on_host = "gloo" in accelerator.state.backend
    shared = torch.tensor(value, device=torch.device("cpu") if on_host else accelerator.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def all_finite(numbers: Sequence[Tensor], accelerator: Accelerator) -> bool:
    """Whether all these numbers, () each, are finite on every process. Collective; one wait for the device.

    Hosts meet before each waits for its device: in NCCL a process would wait for one that died until its watchdog ends
    it, without an error. gloo raises one (`lost_contact`).
    """
    # too wide for a sum of float32 to overflow
    total = torch.stack(list(numbers)).sum(dtype=torch.float64)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(total)  # inf - inf is not finite either
        if total.device.type != "cpu":
            largest(0, accelerator)
    return math.isfinite(total)


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that another process died or does not answer. gloo has no type for it."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def average_gradients(
    trained: Sequence[nn.Parameter], statistics: Sequence[Tensor], accelerator: Accelerator, micro_batches: int
) -> None:
    """Replace every gradient by its mean over micro-batches and processes. Collective: every process, every step.

    A missing gradient counts as 0 and exists afterwards, so all processes step the same parameters. The running
    `statistics` of batch norm are averaged along, which keeps the students of all processes equal. Gradients of a
    sharded student were averaged in the backward.
    """
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    if micro_batches > 1:
        torch._foreach_div_(gradients, float(micro_batches))
    if accelerator.num_processes > 1:
        for bucket in _buckets([*(g for g in gradients if not isinstance(g, DTensor)), *statistics]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            torch.distributed.all_reduce(flat)
            flat /= accelerator.num_processes
            for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(mean.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
