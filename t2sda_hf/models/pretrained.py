"""Start an encoder from the weights of a checkpoint, or not at all: never half, never silently."""

import re
from collections.abc import Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, SegformerConfig, SegformerModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES
from transformers.utils import cached_file, logging

from .configuration_t2sda import T2SDAConfig
from .modeling_t2sda import T2SDAForSemanticSegmentation, name_some

logger = logging.get_logger(__name__)

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
            open-mmlab's or timm's names, with or without a prefix; a T2S-DA model too. For a backbone a Hub id
            ("facebook/dinov2-large") or a folder of the same kind of encoder, with or without heads.
        hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, ... of transformers' `from_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint, it is of another kind, its encoder has other sizes, its weights
            cannot be read, or any tensor of the encoder is not in them. The model is unchanged then.
    """
    if model.config.encoder == "backbone":
        model.backbone.model.load_state_dict(_backbone_tensors(model, name_or_path, hub_kwargs))
    elif model.config.encoder == "resnet":
        model.resnet.load_state_dict(_resnet_tensors(model, name_or_path, hub_kwargs))
    else:
        model.segformer.load_state_dict(_mit_tensors(model, name_or_path, hub_kwargs))


def encoder_fields(name_or_path: str | PathLike[str], **hub_kwargs: Any) -> dict[str, Any]:
    """The fields of `T2SDAConfig` that describe the encoder of a checkpoint, and no weights.

    Args:
        name_or_path: a Hub id or a folder: of a SegFormer, a T2S-DA model, or anything that transformers knows as a
            backbone.
        hub_kwargs: as in `load_pretrained_encoder`.

    Raises:
        ValueError: if there is no such checkpoint, or its encoder is none that gives feature maps.
    """
    values = _config_values(name_or_path, hub_kwargs)
    model_type = values.get("model_type")
    if model_type == SegformerConfig.model_type:
        return {name: values[name] for name in ENCODER_FIELDS if name in values}
    if model_type == T2SDAConfig.model_type:
        kind = "backbone_config" if values.get("backbone_config") else "encoder"
        named = (
            (kind, "out_layers", "image_mean", "image_std") if kind == "backbone_config" else (kind, *ENCODER_FIELDS)
        )
        return {name: values[name] for name in named if name in values}
    if model_type == "timm_wrapper" or "architecture" in values:
        raise ValueError(
            f"{name_or_path} is a model of timm, whose backbones need torchvision, which is not used here. Take the "
            "encoder in transformers' own form, or for a ResNet v1c set model.size to resnet50c or resnet101c."
        )
    if model_type not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        known = ", ".join(name for name in MODEL_FOR_BACKBONE_MAPPING_NAMES if name != "timm_backbone")
        raise ValueError(
            f"{name_or_path} is a {model_type!r} model, which gives no feature maps: transformers has no backbone of "
            f"it. Take one of {known}, or a SegFormer."
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    except (OSError, ValueError, *MEANINGLESS) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"the config.json of {name_or_path} holds a value that means nothing ({said}).") from error
    return {"backbone_config": config} | _statistics(name_or_path, hub_kwargs)


def _statistics(name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation of the pixels that an encoder was trained with; {} if no image processor lies beside it."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_kwargs)
    except OSError:
        logger.warning_once(f"{name_or_path} has no preprocessor_config.json: its pixels are taken to be ImageNet's")
        return {}
    if not processor.get("do_normalize", True):
        return {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    return {name: tuple(processor[name]) for name in ("image_mean", "image_std") if processor.get(name)}


def _config_values(name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says.

    Raises:
        ValueError: if there is none.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)
    except OSError as error:
        raise ValueError(
            f"no checkpoint at {str(name_or_path)!r}: it is neither a folder with a config.json nor a model that the "
            f"Hub gave us. Check the spelling and, for a Hub id, the connection; of a gated one accept the licence on "
            f"its page and run `hf auth login`. ({error})"
        ) from error
    return values


def _backbone_tensors(
    model: T2SDAForSemanticSegmentation, name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    values = _config_values(name_or_path, hub_kwargs)
    own = model.backbone.model
    if values.get("model_type") == T2SDAConfig.model_type:
        return _own_tensors(own, name_or_path, hub_kwargs)
    if values.get("model_type") != own.config.model_type:
        raise ValueError(
            f"{name_or_path} is a {values.get('model_type')!r} model, the encoder here is a {own.config.model_type!r}. "
            "Build the model for this checkpoint (encoder_fields), or give one of that kind."
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # as for a Mix Transformer
    try:
        # Not AutoBackbone.from_pretrained, which asks the Hub whether a folder exists there.
        loaded: Any = type(own).from_pretrained(
            name_or_path,
            config=deepcopy(own.config),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub_kwargs,
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{name_or_path} has a config.json, but no weights that can be read. Fetch the files again, or set "
            f"model.random_start true to take the sizes alone. ({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    encoder, info = loaded
    tensors: dict[str, Tensor] = encoder.state_dict()
    added, dropped = _by_design(own)
    prefix = f"{own.base_model_prefix}."
    strangers = [name.removeprefix(prefix) for name in sorted(info["unexpected_keys"])]
    inside = {name.split(".")[0] for name in dropped | tensors.keys()}  # heads stand beside the encoder, not in it
    _require_whole(
        name_or_path,
        len(tensors),
        missing=sorted(name for name in info["missing_keys"] if name.removeprefix(prefix) not in added),
        misshapen=sorted(str(key) for key in info["mismatched_keys"]),
        unknown=[name for name in strangers if name.split(".")[0] in inside and name not in dropped],
        advice="Use a checkpoint that fits its own config.json; checkpoints of other code must be converted first.",
    )
    return tensors


def _own_tensors(
    own: PreTrainedModel, name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Of a T2S-DA model on the same backbone."""
    try:
        other = T2SDAForSemanticSegmentation.from_pretrained(name_or_path, **hub_kwargs)
    except UNREADABLE as error:
        raise ValueError(f"the weights of {name_or_path} cannot be read ({type(error).__name__}: {error}).") from error
    tensors: dict[str, Tensor] = other.pretrained_encoder.state_dict()
    wanted = own.state_dict()
    _require_whole(
        name_or_path,
        len(wanted),
        missing=sorted(wanted.keys() - tensors.keys()),
        misshapen=sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape),
        unknown=sorted(tensors.keys() - wanted.keys()),
        advice="Build the model for this checkpoint (encoder_fields).",
    )
    return tensors


def _by_design(own: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Tensors that a backbone has and the model it is made of has not, norms of its maps, which start as the identity;
    and those that it drops: the norm after the last stage, and what pools."""
    with torch.device("meta"):
        whole = AutoModel.from_config(deepcopy(own.config)).state_dict().keys()
    ours = {name.removeprefix(f"{own.base_model_prefix}.") for name in own.state_dict()}
    added = {name for name in ours - whole if "norm" in name.split(".")[0]}
    return added, set(whole) - ours


def _mit_tensors(
    model: T2SDAForSemanticSegmentation, name_or_path: str | PathLike[str], hub_kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    values = _config_values(name_or_path, hub_kwargs)
    model_type = values.get("model_type")
    if model_type not in (SegformerConfig.model_type, T2SDAConfig.model_type):
        problem = (
            f"is a {model_type!r} model, which has no Mix Transformer encoder"
            if model_type
            else "has no config.json that names its model_type"
        )
        raise ValueError(
            f"{name_or_path} {problem}. Give a SegFormer or T2S-DA checkpoint, for example 'nvidia/mit-b5', or set "
            "model.size to auto for the encoder that it is."
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
    name_or_path: str | PathLike[str],
    num_tensors: int,
    missing: list[str],
    misshapen: list[str],
    advice: str,
    unknown: Sequence[str] = (),
) -> None:
    parts = [
        f"{len(keys)} {what} ({name_some(keys)})"
        for keys, what in ((missing, "missing"), (misshapen, "of another shape"), (unknown, "that it has no place for"))
        if keys
    ]
    if parts:
        raise ValueError(
            f"{name_or_path} does not hold the whole encoder: of {num_tensors} tensors, {' and '.join(parts)}. They "
            f"would stay random. {advice}"
        )
