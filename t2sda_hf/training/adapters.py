"""What of an encoder is trained: all of it, nothing, or low-rank adapters beside its linear layers (LoRA, by peft).

A part that is not trained has no gradient, no moments of AdamW, no copy in the teacher and no place in a checkpoint.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import RunConfig
from ..models import T2SDAForSemanticSegmentation

ADAPTER = "lora_"  # how peft begins the names of what it adds


def limit_training(student: T2SDAForSemanticSegmentation, cfg: RunConfig) -> None:
    """Freeze the pretrained encoder of a student, in place, with adapters or without, as `train.encoder` says.

    A new adapter adds nothing: its second matrix is 0. The first is drawn by torch's seed.

    Raises:
        ValueError: if peft is missing, or no layer of the encoder has one of the names in lora.targets.
    """
    encoder: Any = student.pretrained_encoder
    if cfg.train.encoder == "full":
        return
    if cfg.train.encoder == "frozen":
        encoder.requires_grad_(False)
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "train.encoder lora needs peft: pip install 't2sda_hf[lora]', or set train.encoder to full or frozen."
        ) from error
    linear = sorted(name for name, module in encoder.named_modules() if isinstance(module, nn.Linear))
    targets: Any = list(cfg.lora.targets)
    if targets == ["all-linear"]:
        targets = linear
    else:  # peft is content with one that matches
        unknown = [one for one in targets if not any(name.split(".")[-1] == one for name in linear)]
        if unknown:
            known = sorted({name.split(".")[-1] for name in linear})
            raise ValueError(
                f"lora.targets {', '.join(unknown)} match no linear layer of {type(encoder).__name__}; its are called "
                f"{', '.join(known) or 'nothing: it has none'}. all-linear takes all of them."
            )
    if not linear or not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"train.encoder lora needs linear layers, and {type(encoder).__name__} has none: set it to full or frozen."
        )
    adapters = LoraConfig(
        r=cfg.lora.rank, lora_alpha=cfg.lora.alpha, lora_dropout=cfg.lora.dropout, target_modules=targets
    )
    inject_adapter_in_model(adapters, encoder)


def merged(network: T2SDAForSemanticSegmentation) -> T2SDAForSemanticSegmentation:
    """The network without adapters: what they add is in its weights. The network itself if it has none.

    The original keeps its own; weights that no adapter touches are shared with it.
    """
    if not any(ADAPTER in name for name, _ in network.named_parameters()):
        return network
    from peft.tuners.tuners_utils import BaseTunerLayer

    touched = [
        parameter
        for module in network.modules()
        if isinstance(module, BaseTunerLayer)
        for parameter in module.parameters()
    ]
    changed = {id(parameter) for parameter in touched}
    whole = deepcopy(network, {id(p): p for p in network.parameters() if id(p) not in changed})
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(whole.get_submodule(parent), last, module.get_base_layer())
    return whole


def frozen_names(student: nn.Module) -> frozenset[str]:
    """Names of the parameters that are not trained."""
    return frozenset(name for name, parameter in student.named_parameters() if not parameter.requires_grad)


def without(tensors: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    """The tensors that have none of these names."""
    return {name: tensor for name, tensor in tensors.items() if name not in names}
