"""Several processes, one model: the student is not wrapped, its gradients are averaged once per step.

One backward per loss term frees each graph before the next is built; a DDP wrapper cannot do that, and needs every
parameter in every graph. So the average is ours.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BUCKET_ELEMENTS = 16_000_000  # 64 MB of float32 in flight


def broadcast_from_main(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Give every process the values that these tensors have on process 0. Collective."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.data, src=0)


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


def largest(value: int, accelerator: Accelerator) -> int:
    """The largest `value` of all processes. Collective."""
    if accelerator.num_processes == 1:
        return value
    shared = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that another process died or does not answer. gloo has no type for it."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def average_gradients(student: nn.Module, accelerator: Accelerator, micro_batches: int) -> None:
    """Replace every gradient by its mean over micro-batches and processes. Collective: every process, every step.

    A missing gradient counts as 0 and exists afterwards, so all processes step the same parameters. The running
    statistics of batch norm are averaged along, which keeps the students of all processes equal.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if micro_batches > 1:
        torch._foreach_div_(gradients, float(micro_batches))
    if accelerator.num_processes > 1:
        statistics = [
            buffer
            for module in student.modules()
            if isinstance(module, _BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        for bucket in _buckets(gradients + statistics):
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
