"""A SegFormer that runs in milliseconds, for every test of the model code, and the files of one."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

TINY: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 24, 32),
    "num_attention_heads": (1, 2, 3, 4),
    "decoder_hidden_size": 16,
    "num_labels": 5,
}

# Tensor names of transformers 5 -> those of transformers 4, which the SegFormer files on the Hub have.
HUB_NAMES = (
    (r"stages\.(\d)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
    (r"stages\.(\d)\.blocks\.(\d)\.", r"encoder.block.\1.\2."),
    (r"stages\.(\d)\.layer_norm\.", r"encoder.layer_norm.\1."),
    (r"attention\.sequence_reduction\.sequence_reduction", "attention.self.sr"),
    (r"attention\.sequence_reduction\.layer_norm", "attention.self.layer_norm"),
    (r"attention\.q_proj", "attention.self.query"),
    (r"attention\.k_proj", "attention.self.key"),
    (r"attention\.v_proj", "attention.self.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc(\d)", r"mlp.dense\1"),
    (r"layernorm_before", "layer_norm_1"),
    (r"layernorm_after", "layer_norm_2"),
    (r"decode_head\.linear_projections", "decode_head.linear_c"),
)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Fields of a tiny config; SegformerConfig and T2SDAConfig both take them."""
    return dict(TINY)


@pytest.fixture
def images() -> torch.Tensor:
    """Two images whose sides are divisible by nothing."""
    return torch.randn(2, 3, 70, 91, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Move every parameter and buffer by something of its own, so that a lost or a swapped one shows.

    In a new model all norms are alike, and all biases are zero.
    """

    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) - 0.5, alpha=0.2)
            else:
                assert name.endswith("num_batches_tracked")
                tensor.fill_(3)
        return module

    return fill


@pytest.fixture
def write_hub_files(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """Write a SegFormer as the Hub holds it: names of transformers 4, and a config.json with keys of that time."""

    def write(model: PreTrainedModel) -> Path:
        folder = tmp_path / "hub"
        folder.mkdir()
        tensors = {}
        for name, tensor in model.state_dict().items():
            for pattern, hub_name in HUB_NAMES:
                name = re.sub(pattern, hub_name, name)
            tensors[name] = tensor.clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = model.config.to_dict()
        del values["dtype"]
        values |= {
            "architectures": [type(model).__name__],
            "downsampling_rates": [1, 4, 8, 16],
            "image_size": 224,
            "torch_dtype": "float32",
            "transformers_version": "4.12.0.dev0",
        }
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return write
