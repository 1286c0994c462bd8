"""Start an encoder from the weights of any SegFormer checkpoint, or not at all: never half, never silently."""

from os import PathLike
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, SegformerConfig, SegformerModel
from transformers.utils import logging

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


def load_pretrained_encoder(
    model: T2SDAForSemanticSegmentation, name_or_path: str | PathLike[str], **hub_kwargs: Any
) -> None:
    """Copy the encoder of a checkpoint into `model.segformer`. Head and projector stay as they are.

    Only weights are taken: drop path, dropout and the norms' eps stay those of the model's own config.

    Args:
        model: receives the weights, on its own device and in its own dtype.
        name_or_path: a Hub id ("nvidia/mit-b5") or a folder, of a SegFormer classifier, a SegFormer segmenter, a bare
            SegFormer encoder, or a T2S-DA model.
        hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, ... of transformers' `from_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint, it is no SegFormer, its encoder has other sizes, its weights cannot
            be read, or any tensor of the encoder is not in them. The model is unchanged then.
    """
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
    config = SegformerConfig.from_dict(values)
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
    # Without a file, with the text that Git LFS leaves in its place, and with one that was cut off, of either format.
    except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"{name_or_path} has a config.json, but no weights that can be read. Fetch the files again. "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    encoder, info = loaded
    lost = sorted(info["missing_keys"])
    wrong = sorted(str(key) for key in info["mismatched_keys"])
    if lost or wrong:
        parts = [
            f"{len(keys)} {what} ({name_some(keys)})"
            for keys, what in ((lost, "missing"), (wrong, "of another shape"))
            if keys
        ]
        raise ValueError(
            f"{name_or_path} does not hold the whole encoder: of {len(encoder.state_dict())} tensors, "
            f"{' and '.join(parts)}. They would stay random. Use a checkpoint that transformers' SegformerModel loads "
            f"without a missing key; checkpoints of other code must be converted first."
        )
    model.segformer.load_state_dict(encoder.state_dict())
