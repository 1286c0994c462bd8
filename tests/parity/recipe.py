"""Weights, images and labels out of a name, equal in every version of every library: what both sides were run on.

Everything is drawn by NumPy's PCG64 seeded with the CRC-32 of the name, uniformly, and only scaled afterwards.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
CLASSES_SHOWN = (0, 2, 5, 6, 8, 11, 13, 17, 255)  # of Cityscapes; some things (of the feature distance), some not


def uniform(name: str, shape: Sequence[int]) -> Tensor:
    """float32 in [-1, 1)."""
    return torch.from_numpy(np.random.default_rng(crc32(name.encode())).random(tuple(shape)) * 2 - 1).float()


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """A tensor of a network, by its name there: matrices keep the variance of what they multiply, norms are near 1."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    drawn = uniform(name, shape)
    if len(shape) > 1:
        return drawn * math.sqrt(3 / math.prod(shape[1:]))
    if name.endswith("running_var"):
        return 1 + 0.5 * drawn
    return 1 + 0.5 * drawn if name.endswith("weight") else 0.2 * drawn


def image(name: str, shape: Sequence[int]) -> Tensor:
    """(B,3,H,W) in [0,1): blocks of 8 x 8 pixels of one colour, and noise."""
    batch, channels, height, width = shape
    blocks = uniform(f"{name} blocks", (batch, channels, -(-height // 8), -(-width // 8)))
    colors = blocks.repeat_interleave(8, -2).repeat_interleave(8, -1)[..., :height, :width]
    return 0.5 + 0.4 * colors + 0.0999 * uniform(f"{name} noise", shape)


def labels(name: str, shape: Sequence[int], block: int = 32) -> Tensor:
    """(B,H,W) int64: blocks of one class of CLASSES_SHOWN, and a stripe of another in each."""
    batch, height, width = shape
    cells = uniform(f"{name} cells", (batch, height // block, width // block))
    index = ((cells + 1) / 2 * len(CLASSES_SHOWN)).long()
    shown = torch.tensor(CLASSES_SHOWN)[index].repeat_interleave(block, -2).repeat_interleave(block, -1)
    shown[:, ::block] = 10
    return shown


def sample(values: Tensor, count: int = 128) -> Tensor:
    """At most `count` numbers of a tensor, evenly spread, as float32; an odd stride, so that no axis is favoured."""
    stride = max(1, values.numel() // count) | 1
    return values.detach().flatten()[::stride].float().contiguous()


def networks() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each of their networks, from tensors.txt: "parent leaf,leaf:8x8 leaf:8"."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in (HERE / "tensors.txt").read_text(encoding="utf-8").splitlines():
        first, *groups = line.split()
        if first == "#":
            tensors = found[groups[0]] = {}
            continue
        for group in groups:
            leaves, _, sides = group.partition(":")
            shape = tuple(int(side) for side in sides.split("x") if side)
            tensors |= {f"{first}.{leaf}": shape for leaf in leaves.split(",")}
    return found


def checkpoint(case: str, prefixes: Sequence[str] = ("model.",)) -> dict[str, Tensor]:
    """The state_dict that one of their training scripts saves for the network `case`."""
    return {
        prefix + name: weight(prefix + name, shape) for prefix in prefixes for name, shape in networks()[case].items()
    }
