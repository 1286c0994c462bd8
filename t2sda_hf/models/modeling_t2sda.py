"""Encoder, segmentation head and projector at one or two resolutions, as one transformers model (method 1)."""

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
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput

from .backbone import STRIDES, BackboneEncoder, padded
from .configuration_t2sda import T2SDAConfig
from .heads import AllMLPHead, DAFormerHead, DeepLabV2Head, LinearHead, upsample
from .multi_resolution import Box, context_images, cut, fuse, mean_of_crops, pad_to_grid, scaled, slide_boxes
from .projector import Projector
from .resnet import ResNetV1cEncoder

# Below this a Mix Transformer's last levels have nothing left to convolve, and a context is half of the image.
SMALLEST_OF_TWO_RESOLUTIONS = 64


@dataclass
class T2SDAOutput(ModelOutput):
    """What `T2SDAForSemanticSegmentation` returns. A field that was not asked for is None.

    Attributes:
        loss: scalar, with `labels`.
        logits: (B,num_labels,H/4,W/4), rounded up; H/8 with a DeepLab-V2 head on a ResNet. Of two resolutions, fused.
        embeddings: (B,D,H/4,W/4), with `project`; H/8 with a ResNet. Not normalised, channels_last. Of two
            resolutions, those of the context: half of that.
        hidden_states: the encoder's four maps (B,C_i,h_i,w_i) at strides 4, 8, 16, 32, each after its stage's norm;
            with a ResNet 4, 8, 8, 8; of a backbone those of the image padded to 32. Of two resolutions, those of the
            context.
        detail_logits: (B,num_labels,h,w) of the detail crop before fusion, with `detail_box`.
        detail_box: that box, (top, left, height, width) in pixels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    detail_logits: Tensor | None = None
    detail_box: Box | None = None


class T2SDAForSemanticSegmentation(PreTrainedModel):
    """Encoder h, head f and projector g of T2S-DA.

    The encoder is transformers' own `SegformerModel`, under the name it has in a plain SegFormer. So the files of
    SegFormer models load as they are, with `head="all_mlp"` their head too; only the projector is then new. With
    `encoder="resnet"` it is `ResNetV1cEncoder`, named `resnet`, and with a `backbone_config` any backbone of
    transformers in a `BackboneEncoder`, named `backbone`. `encoder` is the one there is.

    With `multi_resolution` (HRDA, method 1.5) the same encoder and head see the image at half size, the context, and
    crops of it at full size, the detail. A second head on the context's maps says for every class and place how far
    the detail is to be believed. Embeddings and hidden states are the context's.

    A new model is a function of torch's seed: the encoder as transformers draws it, convolutions before a batch norm
    (a ResNet's too) Kaiming-normal (fan out), linear layers and transposed convolutions as torch draws them,
    classifiers N(0, 0.01²) with bias 0.
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
        if config.encoder == "resnet":
            self.resnet = ResNetV1cEncoder(config.hidden_sizes, config.depths, config.num_channels)
        elif config.encoder == "backbone":
            self.backbone = BackboneEncoder(config)
            config.hidden_sizes = self.backbone.hidden_sizes
        else:
            self.segformer = SegformerModel(config)
            if config.encoder_ln_eps_fix:
                set_block_and_stage_norm_eps(self.segformer, config.layer_norm_eps)
        sizes, dropout = config.hidden_sizes, config.classifier_dropout_prob
        num_labels = config.num_labels
        self.decode_head: DAFormerHead | AllMLPHead | LinearHead | DeepLabV2Head
        if config.head == "deeplabv2":
            self.decode_head = DeepLabV2Head(sizes[-1], num_labels, config.head_dilations)
        elif config.head == "daformer":
            self.decode_head = DAFormerHead(
                sizes, config.decoder_hidden_size, num_labels, config.head_dilations, dropout
            )
        elif config.head == "linear":
            self.decode_head = LinearHead(sizes, num_labels, dropout)
        else:
            self.decode_head = AllMLPHead(sizes, config.decoder_hidden_size, num_labels, dropout)
        if config.multi_resolution:  # HRDA's attention head: DAFormer's with a 1x1 fusion, which is the all-MLP head
            self.scale_attention: AllMLPHead | DeepLabV2Head
            if config.head == "deeplabv2":
                self.scale_attention = DeepLabV2Head(sizes[-1], num_labels, config.head_dilations)
            else:
                self.scale_attention = AllMLPHead(sizes, config.decoder_hidden_size, num_labels, dropout)
        self.projector = Projector(
            sizes,
            config.projector_in_index,
            config.projector_hidden,
            config.projector_dim,
            config.projector_kernel,
            config.projector_final_relu,
        )
        self.post_init()

    @property
    def encoder(self) -> SegformerModel | ResNetV1cEncoder | BackboneEncoder:
        """The encoder, by the same name whatever its kind."""
        kinds = {"resnet": "resnet", "backbone": "backbone", "mit": "segformer"}
        return getattr(self, kinds[self.config.encoder])

    @property
    def pretrained_encoder(self) -> nn.Module:
        """What of the encoder a checkpoint of somebody else holds: all of it but the pyramid on a plain ViT."""
        return self.backbone.model if self.config.encoder == "backbone" else self.encoder

    def train(self, mode: bool = True) -> "T2SDAForSemanticSegmentation":
        """As in torch; an encoder that is frozen as a whole keeps to one function: no dropout, no batch statistics."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.pretrained_encoder.parameters()):
            self.pretrained_encoder.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Leaf by leaf come here: heads, projector, a ResNet, a pyramid. A SegFormer and a backbone are models of their
        # own and draw their weights.
        if isinstance(module, nn.ConvTranspose2d):
            bound = 1 / math.sqrt(module.in_channels)  # kernel and stride are one: each output sees one input
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Conv2d) and module.bias is None:
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
        encoder_unfit = [name for name in unfit if name.startswith(("segformer.", "resnet.", "backbone."))]
        if encoder_unfit:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights for {len(encoder_unfit)} tensors of the encoder: "
                f"{name_some(encoder_unfit)}. They would stay random. Give a SegFormer or T2S-DA checkpoint of the "
                f"sizes in its own config.json."
            )
        heads = ("decode_head.", "scale_attention.")
        head_missing = [name for name in missing if name.startswith(heads)]
        head_size = sum(name.startswith(heads) for name in model.state_dict())
        if head_missing and len(head_missing) < head_size:
            raise ValueError(
                f"{pretrained_model_name_or_path} has weights for {head_size - len(head_missing)} of the {head_size} "
                f"tensors of the {model.config.head} head, without {name_some(head_missing)}. Give the head it was "
                f"trained with (head=...), or build the model from its config and call load_pretrained_encoder."
            )
        # A tensor of a file starts at any address, and some processors' matrix products round by it. In memory of their
        # own the weights give the saved model's outputs bit by bit, and the file may change.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        return (model, info) if with_info else model

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        project: bool = False,
        segment: bool = True,
        detail_box: Box | None = None,
        at_context_scale: bool = False,
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
            detail_box: for two resolutions, the crop that the detail is taken from: (top, left, height, width), all
                multiples of `config.detail_grid`, inside the image (HRDA's training). None takes overlapping crops of
                the whole image (its pseudo-labels and test).
            at_context_scale: for two resolutions, `pixel_values` are already the context: they are not made smaller.
                Only without `segment`.
            output_hidden_states: also return the encoder's maps. Default: the config's.
            return_dict: False returns a tuple of the fields that are not None. Default: the config's.
            kwargs: handed to the encoder.

        Raises:
            ValueError: if `labels` come without `segment`, or are not one map per image; for `detail_box` or
                `at_context_scale` where they mean nothing, and for a box that is off the grid or the image.
        """
        if labels is not None and not segment:
            raise ValueError("labels need logits: leave out segment=False, or the labels.")
        if labels is not None and (labels.ndim != 3 or len(labels) != len(pixel_values)):
            raise ValueError(
                f"labels must be (B,H,W) class ids, one map per image; got {tuple(labels.shape)} for "
                f"{len(pixel_values)} images."
            )
        two = self.config.multi_resolution
        if (detail_box is not None and not (two and segment)) or (at_context_scale and (segment or not two)):
            raise ValueError(
                "detail_box needs multi_resolution=True in the config, and segment; at_context_scale needs the same "
                "config, and segment=False."
            )
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        if two and not at_context_scale:
            pixel_values = pad_to_grid(pixel_values, self.config.detail_grid, SMALLEST_OF_TWO_RESOLUTIONS)
        context = context_images(pixel_values) if two and not at_context_scale else pixel_values
        features = self._encode(context, **kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        levels = _as_autocast_has_them(features)
        logits = self._cropped(self.decode_head(levels), context) if segment else None
        detail_logits = None
        if two and logits is not None:
            attention = self._cropped(self.scale_attention(levels), context).sigmoid()
            detail_logits, box = self._detail(pixel_values, detail_box, **kwargs)
            logits = fuse(logits, detail_logits, attention, box)
            stride = self.config.logits_stride
            logits = logits[..., : -(-size[0] // stride), : -(-size[1] // stride)]  # without the padding
        # All at once: in a tuple, and by index, fields then stand in their own order, the loss first.
        output = T2SDAOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            embeddings=self._cropped(self.projector(levels), context, self._projector_stride) if project else None,
            hidden_states=features if output_hidden_states else None,
            detail_logits=None if detail_box is None else detail_logits,
            detail_box=detail_box,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _encode(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        return self.encoder(pixel_values, output_hidden_states=True, return_dict=True, **kwargs).hidden_states

    @property
    def _projector_stride(self) -> int:
        return STRIDES[self.config.projector_in_index[0]]

    def _cropped(self, maps: Tensor, images: Tensor, stride: int = STRIDES[0]) -> Tensor:
        """Without the cells that see only the padding of a backbone's images."""
        if self.config.encoder != "backbone":
            return maps
        height, width = images.shape[-2:]
        return maps[..., : padded(height, stride) // stride, : padded(width, stride) // stride]

    def _detail(self, pixel_values: Tensor, box: Box | None, **kwargs: Any) -> tuple[Tensor, Box | None]:
        """Logits of one crop, and its box in cells of them; without a box those of the whole image, from many crops."""
        config, size = self.config, (pixel_values.shape[-2], pixel_values.shape[-1])
        stride = config.logits_stride
        if box is not None:
            top, left, height, width = box
            inside = 0 <= top <= size[0] - height and 0 <= left <= size[1] - width and min(height, width) > 0
            if not inside or any(side % config.detail_grid for side in box):
                raise ValueError(
                    f"detail_box (top, left, height, width) must lie in the {size[0]}x{size[1]} image, all multiples "
                    f"of {config.detail_grid}; got {tuple(box)}."
                )
            return self._logits(cut(pixel_values, box), **kwargs), scaled(box, stride)
        boxes = slide_boxes(size, config.detail_crop_size)
        crops = torch.cat([cut(pixel_values, one) for one in boxes])  # crop after crop, each of all images
        at_once = config.detail_crops_at_once or len(crops)
        logits = torch.cat([self._logits(part, **kwargs) for part in crops.split(at_once)])
        cells = [scaled(one, stride) for one in boxes]
        return mean_of_crops(logits.chunk(len(boxes)), cells, (size[0] // stride, size[1] // stride)), None

    def _logits(self, images: Tensor, **kwargs: Any) -> Tensor:
        return self._cropped(self.decode_head(self._encode(images, **kwargs)), images)

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


def _as_autocast_has_them(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cast once: head and projector read the same maps, and autocast would cast them for each of the two."""
    device = features[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tuple(features)
    return tuple(level.to(torch.get_autocast_dtype(device)) for level in features)


def name_some(keys: Sequence[str]) -> str:
    """The first five of `keys`, and how many more there are."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more


T2SDAForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
# `pipeline` looks here for the names of the models it knows, and warns about others. Here, and not beside the Auto
# classes, so that it also holds for those who have only this file.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[T2SDAConfig.model_type] = T2SDAForSemanticSegmentation.__name__
