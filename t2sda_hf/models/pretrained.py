"""Start an encoder from the weights of a checkpoint, or not at all: never half, never silently."""

import re
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, SegformerConfig, SegformerModel
from transformers.utils import cached_file, logging

from .configuration_t2sda import T2SDAConfig
from .modeling_t2sda import T2SDAForSemanticSegmentation, name_some

# Fields that decide the names and shapes of the encoder's tensors, or how they are used.
ENCODER_FIELDS = (
    "num_channels",
    "depths",
    "hidden_sizes",
    "num_attention_heads",
    "sr_ratios",
    "patch_sizes",
    "strides",
    "mlp_ratios",
    "hidden_act",
)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Without a file, with the text that Git LFS leaves in its place, and with one that was cut off, of either format.
UNREADABLE = (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError)
# What transformers ends with where a config.json has a value of another kind than it needs.
MEANINGLESS = (StrictDataclassError, TypeError, AttributeError, LookupError, ArithmeticError)

# timm's names of the deep stem -> open-mmlab's; all other names are the same in both, and torchvision's.
TIMM_STEM = {r"conv1\.(?=\d)": "stem.", r"bn1\.": "stem.7."}
IN_EVERY_RESNET = "layer1.0.conv1.weight"


def load_pretrained_encoder(
    model: T2SDAForSemanticSegmentation, name_or_path: str | PathLike[str], **hub_kwargs: Any
) -> None:
    """Copy the encoder of a checkpoint into `model.encoder`. Head and projector stay as they are.

    Only weights are taken: drop path, dropout and the norms' eps stay those of the model's own config.

    Args:
        model: receives the weights, on its own device and in its own dtype.
        name_or_path: for a Mix Transformer a Hub id ("nvidia/mit-b5") or a folder, of a SegFormer classifier, a
            SegFormer segmenter, a bare SegFormer encoder, or a T2S-DA model. For a ResNet v1c a Hub id
            ("timm/resnet101c.gluon_in1k"), a folder or a file (.safetensors, or of torch.save), whose tensors have
            open-mmlab's or timm's names, with or without a prefix; a T2S-DA model too.
        hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, ... of transformers' `from_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint, it is of another kind, its encoder has other sizes, its weights
            cannot be read, or any tensor of the encoder is not in them. The model is unchanged then.
    """
    if model.config.encoder == "resnet":
        model.resnet.load_state_dict(_resnet_tensors(model, name_or_path, hub_kwargs))
    else:
        model.segformer.load_state_dict(_mit_tensors(model, name_or_path, hub_kwargs))


def _mit_tensors(
    model: T2SDAForSemanticSegmentation, name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)
    except OSError as error:
        raise ValueError(
            f"no checkpoint at {str(name_or_path)!r}: it is neither a folder with a config.json nor a model that the "
            f"Hub gave us. Check the spelling and, for a Hub id, the connection. ({error})"
        ) from error
    model_type = values.get("model_type")
    if model_type not in (SegformerConfig.model_type, T2SDAConfig.model_type):
        problem = (
            f"is a {model_type!r} model, which has no Mix Transformer encoder"
            if model_type
            else "has no config.json that names its model_type"
        )
        raise ValueError(
            f"{name_or_path} {problem}. Give a SegFormer or T2S-DA checkpoint, for example 'nvidia/mit-b5'."
        )
    if values.get("encoder", "mit") != "mit":
        raise ValueError(
            f"{name_or_path} is a T2S-DA model with a {values['encoder']} encoder, the model here has a Mix "
            f"Transformer. Build the model with that encoder, or give a SegFormer, for example 'nvidia/mit-b5'."
        )
    try:
        config = SegformerConfig.from_dict(values)
    except (ValueError, *MEANINGLESS) as error:
        raise ValueError(
            f"the config.json of {name_or_path} holds a value that means nothing ({' '.join(str(error).split())})."
        ) from error
    theirs, ours = (
        {name: list(value) if isinstance(value, tuple) else value for name, value in c.to_dict().items()}
        for c in (config, model.config)
    )
    different = [name for name in ENCODER_FIELDS if theirs[name] != ours[name]]
    if different:
        raise ValueError(
            f"the encoder of {name_or_path} differs from the model's: "
            + "; ".join(f"{name} {theirs[name]}, the model has {ours[name]}" for name in different)
            + ". Build the model for this checkpoint (T2SDAConfig.from_size, or T2SDAConfig.from_pretrained on it), or "
            "give a checkpoint of the model's size."
        )
    # A checkpoint has a head that is not wanted here, and transformers would warn of each of its tensors. What is
    # missing raises below.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = SegformerModel.from_pretrained(
            name_or_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **hub_kwargs
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{name_or_path} has a config.json, but no weights that can be read. Fetch the files again. "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    encoder, info = loaded
    tensors: dict[str, Tensor] = encoder.state_dict()
    _require_whole(
        name_or_path,
        len(tensors),
        missing=sorted(info["missing_keys"]),
        misshapen=sorted(str(key) for key in info["mismatched_keys"]),
        advice="Use a checkpoint that transformers' SegformerModel loads without a missing key; checkpoints of other "
        "code must be converted first.",
    )
    return tensors


def _resnet_tensors(
    model: T2SDAForSemanticSegmentation, name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    in_file = _read_tensors(name_or_path, hub_kwargs)
    prefixes = [name.removesuffix(IN_EVERY_RESNET) for name in in_file if name.endswith(IN_EVERY_RESNET)]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} of them ({', '.join(prefixes)})" if prefixes else "none"
        raise ValueError(
            f"{name_or_path} must hold one ResNet with bottlenecks, found by its tensor '...{IN_EVERY_RESNET}'; there "
            f"is {found}. Give a ResNet v1c, for example 'timm/resnet101c.gluon_in1k' or open-mmlab's resnet101_v1c."
        )
    given: dict[str, Tensor] = {}
    for name, tensor in in_file.items():
        if name.startswith(prefixes[0]):
            name = name.removeprefix(prefixes[0])
            for pattern, ours in TIMM_STEM.items():
                name = re.sub(f"^{pattern}", ours, name)
            given[name] = tensor
    if "conv1.weight" in given:
        raise ValueError(
            f"{name_or_path} is a ResNet whose stem is one {given['conv1.weight'].shape[-1]}x"
            f"{given['conv1.weight'].shape[-1]} convolution (torchvision's); the v1c stem is three 3x3 ones, and its "
            f"weights would stay random. Give a ResNet v1c, for example 'timm/resnet101c.gluon_in1k'."
        )
    own = model.resnet.state_dict()
    deeper = sorted(name for name in given.keys() - own.keys() if name.startswith("layer"))
    if deeper:
        raise ValueError(
            f"the ResNet in {name_or_path} is deeper than the model's {tuple(model.config.depths)}: it also has "
            f"{name_some(deeper)}. Build the model for it (depths of T2SDAConfig), or give one of the model's depth."
        )
    # Files from before PyTorch 0.4.1 have no counter of batches; nothing reads it here.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    _require_whole(
        name_or_path,
        len(needed),
        missing=sorted(needed - given.keys()),
        misshapen=sorted(name for name in needed & given.keys() if given[name].shape != own[name].shape),
        advice="Build the model for this checkpoint (T2SDAConfig.from_size), or give a whole ResNet v1c of its size.",
    )
    return {name: given.get(name, tensor) for name, tensor in own.items()}


def _read_tensors(name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a weight file, of the one in a folder, or of the one of a Hub model."""
    path, name = Path(name_or_path), str(name_or_path)
    preferred, other = WEIGHT_FILES
    if path.is_dir():
        file = next((str(path / one) for one in WEIGHT_FILES if (path / one).is_file()), None)
        if file is None:
            raise ValueError(
                f"{name} has none of the weight files {preferred}, {other}. Give a folder with one of them, or the "
                f"file itself."
            )
    elif path.is_file():
        file = name
    else:
        try:
            file = cached_file(name, preferred, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            file = file or cached_file(name, other, **hub_kwargs)
        except OSError as error:
            raise ValueError(
                f"no weights at {name!r}: it is neither a file, nor a folder, nor a model that the Hub gave us with "
                f"{preferred} or {other}. Check the spelling and, for a Hub id, the connection. ({error})"
            ) from error
    assert file is not None  # the second look raises
    try:
        content: Any = (
            load_file(file)
            if file.endswith(".safetensors")
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{file} holds no weights that can be read. Fetch the file again. ({type(error).__name__}: {error})"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _require_whole(
    name_or_path: str | PathLike[str], num_tensors: int, missing: list[str], misshapen: list[str], advice: str
) -> None:
    parts = [
        f"{len(keys)} {what} ({name_some(keys)})"
        for keys, what in ((missing, "missing"), (misshapen, "of another shape"))
        if keys
    ]
    if parts:
        raise ValueError(
            f"{name_or_path} does not hold the whole encoder: of {num_tensors} tensors, {' and '.join(parts)}. They "
            f"would stay random. {advice}"
        )
