"""One tiny config for each family of backbones that transformers has, and the folder of a checkpoint of one."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from transformers import (
    AutoModel,
    BeitConfig,
    BitConfig,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    FocalNetConfig,
    HieraConfig,
    PreTrainedConfig,
    PvtV2Config,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
    VitDetConfig,
)

from t2sda_hf.config import RunConfig

_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_WINDOWS: dict[str, Any] = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
_PLAIN: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}

HIERARCHICAL: dict[str, PreTrainedConfig] = {
    "swin": SwinConfig(**_WINDOWS, window_size=4),
    "swinv2": Swinv2Config(**_WINDOWS, window_size=4),
    "convnext": ConvNextConfig(**_STAGES),
    "convnextv2": ConvNextV2Config(**_STAGES),
    "dinov3_convnext": DINOv3ConvNextConfig(**_STAGES),
    "focalnet": FocalNetConfig(
        image_size=64,
        embed_dim=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        focal_levels=[1, 1, 1, 1],
        focal_windows=[3, 3, 3, 3],
    ),
    "pvt_v2": PvtV2Config(**_STAGES, num_attention_heads=[1, 1, 2, 2]),
    "bit": BitConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], num_groups=2),
    "resnet": ResNetConfig(**_STAGES, embedding_size=8),
}
PLAIN: dict[str, PreTrainedConfig] = {
    "dinov2": Dinov2Config(**_PLAIN, image_size=56, patch_size=14),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**_PLAIN, image_size=56, patch_size=14),
    "dinov3_vit": DINOv3ViTConfig(**_PLAIN, intermediate_size=32, patch_size=16, num_register_tokens=4),
    "beit": BeitConfig(**_PLAIN, intermediate_size=32, image_size=64, use_relative_position_bias=True),
    "vitdet": VitDetConfig(**_PLAIN, image_size=64, pretrain_image_size=64, window_block_indices=[0, 2], window_size=2),
}
ONE_SIZE: dict[str, PreTrainedConfig] = {
    "hiera": HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], mlp_ratio=2.0),
}
ANY_SIZE = HIERARCHICAL | PLAIN
FAMILIES = ANY_SIZE | ONE_SIZE


def write_encoder(family: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a family with weights of its own, as transformers saves the encoder alone."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():  # norms are alike in new models, and biases zero
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    return folder


def automatic(folder: Path, *overrides: str) -> RunConfig:
    """A tiny run on the encoder in a folder."""
    none = (f"--model.{name}=null" for name in ("depths", "hidden_sizes", "num_attention_heads"))
    return tiny_config("--model.size=auto", f"--model.pretrained={folder}", *none, *overrides)
