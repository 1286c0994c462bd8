"""SegFormer's attention for a training on a GPU: many queries look at few keys, and the backward must fill the GPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, SegformerModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IN_GROUPS = "sdpa_in_groups"
# Of the float32 backward behind torch's scaled_dot_product_attention: a block works for so many keys of one head of one
# image, and goes through all queries one after the other. Those of bfloat16 have no fewer keys, so no more blocks.
_KEYS_PER_BLOCK = 64
_FEWEST_QUERIES = 256  # of a group: below that a block has little to do
_LEAST_GAIN = 4  # times as many blocks; what copies of keys and values take must be worth it


def attend_in_groups(model: nn.Module) -> None:
    """Let the SegFormer encoder of a model that is trained spread its queries over a GPU.

    At stride 4 of a 512 x 512 crop 16,384 queries look at 256 keys: 4 blocks for an image with one head, and an H100
    has room for 132. There the backward of attention took 27 of the 81 ms of kernels in a T2S-DA update of B0, and 28
    of 68 ms in an update of transformers' SegFormer-B5 (TF32). An encoder with other attention than `sdpa` keeps it.
    """
    for encoder in model.modules():
        if isinstance(encoder, SegformerModel) and encoder.config._attn_implementation == "sdpa":
            encoder.set_attn_implementation(IN_GROUPS)


def sdpa_in_groups(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, in groups of queries where a backward on a GPU gains by it.

    Args:
        query: (B,h,N,d).
        key, value: (B,h,M,d).

    Returns:
        (B,N,h,d) and, in place of attention weights, None.
    """
    groups = 1
    if query.is_cuda and query.requires_grad and attention_mask is None:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        groups = number_of_groups(query.shape[0] * query.shape[1], query.shape[2], key.shape[2], processors)
    if groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return grouped(module, query, key, value, groups, **kwargs)


def grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, groups: int, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa` of groups of neighbouring queries, as if each was an image of its own with the same keys and values.

    No query looks at another, so the outputs are the same; gradients of keys and values are sums over the groups, in
    bfloat16 rounded once more. Four more kernels.
    """
    images, heads, queries, size = query.shape
    apart = query.transpose(1, 2).reshape(images * groups, queries // groups, heads, size).transpose(1, 2)
    key, value = (part.repeat_interleave(groups, dim=0, output_size=images * groups) for part in (key, value))
    found, _ = sdpa_attention_forward(module, apart, key, value, None, **kwargs)
    return found.reshape(images, queries, heads, -1), None


def number_of_groups(maps: int, queries: int, keys: int, processors: int) -> int:
    """Into how many groups of equal size the queries go: a power of two; 1 where fewer than four would be gained.

    Args:
        maps: images times heads.
        queries, keys: of each.
        processors: multiprocessors of the GPU. Blocks of one wave, so no more than these.
    """
    blocks = maps * -(-keys // _KEYS_PER_BLOCK)
    groups = 1
    while blocks * 2 * groups <= processors and queries % (2 * groups) == 0 and queries >= 2 * groups * _FEWEST_QUERIES:
        groups *= 2
    return groups if groups >= _LEAST_GAIN else 1


AttentionInterface.register(IN_GROUPS, sdpa_in_groups)
