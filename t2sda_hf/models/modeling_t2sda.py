"""SegFormer with a segmentation head and a projector, as one transformers model (method 1.1 to 1.3 and 1.6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, SegformerLayer, SegformerModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_t2sda import T2SDAConfig
from .heads import AllMLPHead, DAFormerHead, upsample
from .projector import Projector


@dataclass
class T2SDAOutput(ModelOutput):
    """What `T2SDAForSemanticSegmentation` returns. A field that was not asked for is None.

    Attributes:
        loss: scalar, with `labels`.
        logits: (B,num_labels,H/4,W/4), rounded up.
        embeddings: (B,D,H/4,W/4), with `project`. Not normalised, channels_last.
        hidden_states: the encoder's four maps (B,C_i,h_i,w_i) at strides 4, 8, 16, 32, each after its stage's norm.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class T2SDAForSemanticSegmentation(PreTrainedModel):
    """Encoder h, head f and projector g of T2S-DA.

    The encoder is transformers' own `SegformerModel`, under the name it has in a plain SegFormer. So the files of
    SegFormer models load as they are, with `head="all_mlp"` their head too; only the projector is then new.

    A new model is a function of torch's seed: the encoder as transformers draws it, convolutions before a batch norm
    Kaiming-normal (fan out), linear layers as torch draws them, the classifier N(0, 0.01²) with bias 0.
    """

    config_class = T2SDAConfig
    base_model_prefix = "segformer"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    # The loss is a mean over this batch; without this `Trainer` would take **kwargs as a promise to scale it itself.
    accepts_loss_kwargs = False
    _no_split_modules = ["SegformerStage"]  # noqa: RUF012 (transformers' contract)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: T2SDAConfig) -> None:
        super().__init__(config)
        self.segformer = SegformerModel(config)
        if config.encoder_ln_eps_fix:
            set_block_and_stage_norm_eps(self.segformer, config.layer_norm_eps)
        sizes, dropout = config.hidden_sizes, config.classifier_dropout_prob
        num_labels = config.num_labels
        self.decode_head: DAFormerHead | AllMLPHead
        if config.head == "daformer":
            self.decode_head = DAFormerHead(
                sizes, config.decoder_hidden_size, num_labels, config.head_dilations, dropout
            )
        else:
            self.decode_head = AllMLPHead(sizes, config.decoder_hidden_size, num_labels, dropout)
        self.projector = Projector(
            sizes,
            config.projector_in_index,
            config.projector_hidden,
            config.projector_dim,
            config.projector_kernel,
            config.projector_final_relu,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only head and projector come here, leaf by leaf: the encoder is a model of its own and draws its weights.
        if isinstance(module, nn.Conv2d) and module.bias is None:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | PathLike[str], *model_args: Any, **kwargs: Any
    ) -> "T2SDAForSemanticSegmentation":
        """As in transformers, but an encoder or a head that loads only in part is an error, not a line in a log.

        Raises:
            ValueError: if anything of the encoder is missing in the files, or has another shape there (also with
                `ignore_mismatched_sizes`, which is for heads); or if some, but not all, of the head is missing.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        unfit = sorted(info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]})
        encoder_unfit = [name for name in unfit if name.startswith("segformer.")]
        if encoder_unfit:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights for {len(encoder_unfit)} tensors of the encoder: "
                f"{name_some(encoder_unfit)}. They would stay random. Give a SegFormer or T2S-DA checkpoint of the "
                f"sizes in its own config.json."
            )
        head_missing = [name for name in missing if name.startswith("decode_head.")]
        head_size = len(model.decode_head.state_dict())
        if head_missing and len(head_missing) < head_size:
            raise ValueError(
                f"{pretrained_model_name_or_path} has weights for {head_size - len(head_missing)} of the {head_size} "
                f"tensors of the {model.config.head} head, without {name_some(head_missing)}. Give the head it was "
                f"trained with (head=...), or build the model from its config and call load_pretrained_encoder."
            )
        return (model, info) if with_info else model

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        project: bool = False,
        segment: bool = True,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> T2SDAOutput | tuple[Tensor, ...]:
        """Run the encoder once, and on its maps the parts that are asked for.

        Args:
            pixel_values: (B,3,H,W) normalised images. H and W need not be divisible by anything, but at least 32.
            labels: (B,Hl,Wl) class ids, `config.semantic_loss_ignore_index` (255) ignored. Logits are upsampled to
                (Hl,Wl); the loss is the mean cross-entropy over the pixels that are not ignored, 0 if there are none.
            project: also return embeddings.
            segment: False spares the head where only embeddings or hidden states are wanted.
            output_hidden_states: also return the encoder's maps. Default: the config's.
            return_dict: False returns a tuple of the fields that are not None. Default: the config's.
            kwargs: handed to the encoder.

        Raises:
            ValueError: if `labels` come without `segment`, or are not one map per image.
        """
        if labels is not None and not segment:
            raise ValueError("labels need logits: leave out segment=False, or the labels.")
        if labels is not None and (labels.ndim != 3 or len(labels) != len(pixel_values)):
            raise ValueError(
                f"labels must be (B,H,W) class ids, one map per image; got {tuple(labels.shape)} for "
                f"{len(pixel_values)} images."
            )
        features = self.segformer(pixel_values, output_hidden_states=True, return_dict=True, **kwargs).hidden_states
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        logits = self.decode_head(features) if segment else None
        # All at once: in a tuple, and by index, fields then stand in their own order, the loss first.
        output = T2SDAOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            embeddings=self.projector(features) if project else None,
            hidden_states=features if output_hidden_states else None,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        ignore_index = self.config.semantic_loss_ignore_index
        logits = upsample(logits, labels.shape[-2:]).float()
        total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
        return total / (labels != ignore_index).sum().clamp(min=1)


def set_block_and_stage_norm_eps(encoder: SegformerModel, eps: float) -> None:
    """Set eps of the norms that the original MiT builds with 1e-6: two per block, one per stage (method 1.1).

    Those of patch embeddings and of the spatial reduction keep 1e-5. Norms are found by where they stand, since
    their names changed between transformers 4 and 5: a direct child of a block, or of a module that holds blocks.
    """
    for module in encoder.modules():
        if any(isinstance(part, SegformerLayer) for part in module.modules()):
            for child in module.children():
                if isinstance(child, nn.LayerNorm):
                    child.eps = eps


def name_some(keys: Sequence[str]) -> str:
    """The first five of `keys`, and how many more there are."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more


T2SDAForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
