"""Configuration of T2S-DA networks: SegFormer's own fields, and those of other encoders, of heads and projector."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, SegformerConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

# The six Mix Transformers (method 1.1; Xie et al. 2021, table 6).
MIT_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "mit_b0": {"depths": (2, 2, 2, 2), "hidden_sizes": (32, 64, 160, 256)},
    "mit_b1": {"depths": (2, 2, 2, 2), "hidden_sizes": (64, 128, 320, 512)},
    "mit_b2": {"depths": (3, 4, 6, 3), "hidden_sizes": (64, 128, 320, 512)},
    "mit_b3": {"depths": (3, 4, 18, 3), "hidden_sizes": (64, 128, 320, 512)},
    "mit_b4": {"depths": (3, 8, 27, 3), "hidden_sizes": (64, 128, 320, 512)},
    "mit_b5": {"depths": (3, 6, 40, 3), "hidden_sizes": (64, 128, 320, 512)},
}
# Dilated ResNets with a deep stem (method 1.4).
RESNET_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet50c": {"depths": (3, 4, 6, 3), "hidden_sizes": (256, 512, 1024, 2048)},
    "resnet101c": {"depths": (3, 4, 23, 3), "hidden_sizes": (256, 512, 1024, 2048)},
}
ENCODERS = ("mit", "resnet", "backbone")
# Beyond all that there is, and little enough to be built: of names, of blocks of a stage, of channels.
MOST_NAMES, MOST_BLOCKS, MOST_CHANNELS = 10_000, 256, 4096
HEADS = ("daformer", "all_mlp", "linear", "deeplabv2")


class T2SDAConfig(SegformerConfig):
    """Sizes of encoder, head and projector. Every field of `SegformerConfig` keeps its name and meaning.

    A plain SegFormer's `config.json` loads into this class. It then describes that SegFormer's head too, so `head`
    is "all_mlp" there unless it is given.

    Attributes:
        encoder: "mit" (Mix Transformer, method 1.1), "resnet" (ResNet v1c of stride 8, method 1.4) or "backbone" (any
            that transformers has as an AutoBackbone). Of SegFormer's fields the second reads `depths`, `hidden_sizes`
            and `num_channels`; the third reads none, and sets `hidden_sizes` to what the network is found to have.
        backbone_config: of the backbone, a config or its dict; given, `encoder` is "backbone".
        out_layers: layers of a plain ViT that are read, four or one, counted from 1; None takes the ends of its four
            quarters. Hierarchical backbones have their levels.
        image_mean, image_std: of the pixels that the backbone was trained with. Images come in with ImageNet's in any
            case, and are brought to these by the model.
        head: "daformer" (method 1.3, the paper's), "all_mlp" (SegFormer's own, method 1.2), "linear" (one 1x1
            convolution on the levels) or "deeplabv2" (method 1.4, not on a backbone).
        decoder_hidden_size: channels of the head: E of the all-MLP head, 256 in the DAFormer head.
        classifier_dropout_prob: whole channels are dropped with this probability before the classifier.
        head_dilations: of the branches of the DAFormer head (1, 6, 12, 18; 1 is a 1x1 convolution, all others are
            separable 3x3) or of the DeepLab-V2 head (6, 12). None takes these.
        projector_dim: D, channels of the embeddings.
        projector_hidden: channels between the projector's two blocks.
        projector_kernel: 1 or 3, of both blocks.
        projector_in_index: encoder levels that the projector reads, ascending, 0 is the finest. The first one gives
            the embeddings their size.
        projector_final_relu: whether the second block ends in a ReLU, which makes embeddings non-negative.
        encoder_ln_eps_fix: use `layer_norm_eps` (1e-6) in the norms of blocks and stages, as the original MiT does.
            transformers builds them with 1e-5 whatever the config says (method 1.1).
        multi_resolution: HRDA (method 1.5): the network sees a context at half size and detail crops at full size.
        detail_crop_size: (height, width) of the crops, in pixels of the full image.
        detail_crops_at_once: at most so many crops (images times crops) run together; None runs all. It limits
            memory. In eval mode it changes nothing; a teacher, whose batch norm uses the statistics of what it sees
            at once, then sees fewer crops.

    Raises:
        ValueError: if a value is outside what is stated here.
    """

    model_type = "t2sda"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="resnet", optional=True)}  # noqa: RUF012

    encoder: str = "mit"
    backbone_config: dict | PreTrainedConfig | None = None
    out_layers: list[int] | tuple[int, ...] | None = None
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    head: str = "daformer"
    head_dilations: list[int] | tuple[int, ...] | None = None
    projector_dim: int = 256
    projector_hidden: int = 256
    projector_kernel: int = 1
    projector_in_index: list[int] | tuple[int, ...] = (0, 1, 2, 3)
    projector_final_relu: bool = True
    encoder_ln_eps_fix: bool = True
    multi_resolution: bool = False
    detail_crop_size: list[int] | tuple[int, ...] = (512, 512)
    detail_crops_at_once: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        names = self.id2label or {}
        if max(len(names), int(kwargs.get("num_labels") or 0)) > MOST_NAMES:  # before anything is made of them
            raise ValueError(f"a network may have at most {MOST_NAMES} classes; id2label has {len(names)}.")
        if {str(label_id) for label_id in names} != {str(label_id) for label_id in range(len(names))}:
            raise ValueError(
                f"id2label must name every id from 0 to {len(names) - 1}, without a gap; got {name_ids(names)}."
            )
        if self.backbone_config is not None:
            self.encoder = "backbone"
            given = self.backbone_config
            kind = given.get("model_type") if isinstance(given, dict) else given.model_type
            if kind not in MODEL_FOR_BACKBONE_MAPPING_NAMES or kind == "timm_backbone":
                raise ValueError(
                    f"backbone_config must be of a backbone that transformers has itself; got {kind!r}. Take one of "
                    f"{', '.join(name for name in MODEL_FOR_BACKBONE_MAPPING_NAMES if name != 'timm_backbone')}."
                )
        super().__post_init__(**kwargs)
        # JSON knows no tuples: without this a reloaded config would differ from the one that was saved.
        if self.head_dilations is None:
            self.head_dilations = (6, 12) if self.head == "deeplabv2" else (1, 6, 12, 18)
        self.head_dilations = tuple(self.head_dilations)
        self.projector_in_index = tuple(self.projector_in_index)
        self.detail_crop_size = tuple(self.detail_crop_size)
        self.out_layers = None if self.out_layers is None else tuple(self.out_layers)
        self.image_mean, self.image_std = tuple(self.image_mean), tuple(self.image_std)
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}; got {self.encoder!r}.")
        if self.encoder == "backbone":
            self._check_backbone()
        if self.encoder == "resnet" and any(size % 8 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes of a ResNet must be multiples of 8; got {tuple(self.hidden_sizes)}.")
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}; got {self.head!r}.")
        if self.projector_kernel not in (1, 3):
            raise ValueError(f"projector_kernel must be 1 or 3; got {self.projector_kernel}.")
        if not self.head_dilations or min(self.head_dilations) < 1:
            raise ValueError(f"head_dilations must be one or more integers from 1; got {self.head_dilations}.")
        stages, limits = self.num_encoder_blocks, {"depths": MOST_BLOCKS, "hidden_sizes": MOST_CHANNELS}
        for name, most in (limits | {"num_attention_heads": MOST_CHANNELS}).items():
            of_stages = tuple(getattr(self, name))
            if len(of_stages) != stages or not all(1 <= number <= most for number in of_stages):
                raise ValueError(f"{name} must be {stages} numbers from 1 to {most}; got {of_stages}.")
        heads = tuple(self.num_attention_heads)
        if self.encoder == "mit" and any(c % n for c, n in zip(self.hidden_sizes, heads, strict=True)):
            raise ValueError(
                f"hidden_sizes must be multiples of num_attention_heads {heads}; got {tuple(self.hidden_sizes)}."
            )
        levels = range(stages)
        if not self.projector_in_index or self.projector_in_index != tuple(
            level for level in levels if level in self.projector_in_index
        ):
            raise ValueError(
                f"projector_in_index must name one or more of the encoder levels {tuple(levels)} in ascending order, "
                f"each once; got {self.projector_in_index}."
            )
        for name, channels in (
            ("decoder_hidden_size", self.decoder_hidden_size),
            ("projector_dim", self.projector_dim),
            ("projector_hidden", self.projector_hidden),
        ):
            if not 1 <= channels <= MOST_CHANNELS:
                raise ValueError(f"{name} must be from 1 to {MOST_CHANNELS}; got {channels}.")
        if not self.reshape_last_stage:
            raise ValueError("reshape_last_stage must be True: the heads read maps, not tokens.")
        crop, grid = self.detail_crop_size, self.detail_grid
        if self.multi_resolution and (len(crop) != 2 or min(crop) < 32 or any(side % grid for side in crop)):
            raise ValueError(
                f"detail_crop_size must be two multiples of {grid} (twice the logits' stride), at least 32, so that "
                f"the crop lies on the grid of the context; got {crop}."
            )
        if self.detail_crops_at_once is not None and self.detail_crops_at_once < 1:
            raise ValueError(f"detail_crops_at_once must be at least 1, or None; got {self.detail_crops_at_once}.")

    def _check_backbone(self) -> None:
        if self.backbone_config is None:
            raise ValueError('encoder "backbone" needs a backbone_config.')
        if self.head == "deeplabv2":
            raise ValueError(
                "the deeplabv2 head reads one map of a Mix Transformer or a ResNet v1c; on a backbone take daformer, "
                "all_mlp or linear."
            )
        layers = self.out_layers
        if layers is not None and (len(layers) not in (1, 4) or sorted(set(layers)) != list(layers) or min(layers) < 1):
            raise ValueError(f"out_layers must be one or four layers in ascending order, from 1; got {layers}.")
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(values) != 3 or not all(0 < abs(value) < 1e3 for value in values) or min(self.image_std) <= 0:
                raise ValueError(f"{name} must be 3 numbers, one for each colour; got {values}.")

    @property
    def logits_stride(self) -> int:
        """Pixels per cell of the logits: 4, with the DeepLab-V2 head that of the encoder's last map."""
        if self.head != "deeplabv2":
            return 4
        return 8 if self.encoder == "resnet" else 32

    @property
    def detail_grid(self) -> int:
        """Pixels of the full image per cell of the context's logits: sides and offsets of crops divide by it."""
        return 2 * self.logits_stride

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "T2SDAConfig":
        """Build from a dict in the form of `config.json`; `kwargs` win over it and are checked like it."""
        config_dict = dict(config_dict)
        if config_dict.get("model_type") == SegformerConfig.model_type:
            config_dict.setdefault("head", "all_mlp")
        config_dict["model_type"] = cls.model_type
        # transformers would set these after construction, where nothing checks them.
        own_names = {field.name for field in fields(cls)} - {field.name for field in fields(SegformerConfig)}
        for name in own_names & kwargs.keys():
            config_dict[name] = kwargs.pop(name)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "T2SDAConfig":
        """The config of an encoder by name, without any download.

        Args:
            size: "mit_b0" ... "mit_b5", "resnet50c" or "resnet101c".
            overrides: any field. `decoder_hidden_size` is 256, but 768 for the all-MLP head on B2 to B5 (method 1.2).
                With a ResNet the head is DeepLab-V2's, and the projector reads the last stage (method 1.4, 1.6).

        Raises:
            ValueError: for another name.
        """
        if size in RESNET_SIZES:
            resnet: dict[str, Any] = {"encoder": "resnet", "head": "deeplabv2", "projector_in_index": (3,)}
            return cls(**(resnet | RESNET_SIZES[size] | overrides))
        if size not in MIT_SIZES:
            raise ValueError(f"size must be one of {', '.join([*RESNET_SIZES, *MIT_SIZES])}; got {size!r}.")
        values: dict[str, Any] = dict(MIT_SIZES[size])
        if overrides.get("head") == "all_mlp" and size not in ("mit_b0", "mit_b1"):
            values["decoder_hidden_size"] = 768
        return cls(**(values | overrides))


def name_ids(names: Iterable[Any]) -> str:
    """The first ids, in order."""
    found = sorted(map(str, names), key=lambda text: (len(text), text))
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


T2SDAConfig.register_for_auto_class()
