"""Any backbone of transformers as the encoder: its four levels, or those that a light pyramid makes of a plain ViT."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_t2sda import T2SDAConfig

STRIDES = (4, 8, 16, 32)  # of the four levels that heads and projector read
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixel values that come in: ImageNet's
# 14, 16 and 32 divide it, so a map of it has the stride that all maps of the network have.
_PROBE = 224
# What the code of a backbone ends with where it cannot take a config or a size.
_REFUSALS = (RuntimeError, ValueError, AssertionError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Levels:
    """What a small forward shows of a backbone.

    Attributes:
        out_indices: of `feature_maps` that are read, in transformers' numbers: 0 is what comes before the first stage.
        channels: of these maps.
        strides: of these maps, in pixels.
        only_size: (height, width) of the only images it takes; None if it takes any.
    """

    out_indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    only_size: tuple[int, int] | None

    @property
    def plain(self) -> bool:
        """Whether all maps have one size, as those of a ViT: then a pyramid is needed."""
        return len(set(self.strides)) == 1


def measure_levels(config: PreTrainedConfig, out_layers: Sequence[int] | None = None) -> Levels:
    """Find the maps to read, by a forward on torch's meta device, which computes shapes alone and no numbers.

    What a config says of channels is not believed: HGNetV2 declares 256 and delivers 128. Of a hierarchical backbone
    these are the last maps of stride 4, 8, 16 and 32; of a plain one the ends of its four quarters, as in BEiT.

    Args:
        config: of the backbone; not changed.
        out_layers: of a plain one other layers, four or one, counted from 1.

    Raises:
        ValueError: if it is no backbone, cannot be built or run, or its maps have other strides.
    """
    name = config.model_type
    stages = getattr(config, "stage_names", None)
    if not stages:
        raise ValueError(f"a {name!r} encoder gives no feature maps: transformers has no backbone of it.")
    config = deepcopy(config)
    config.out_indices = list(range(len(stages)))
    try:
        with torch.device("meta"):
            model = AutoBackbone.from_config(config).eval()
    except _REFUSALS as error:
        raise ValueError(
            f"transformers cannot build a {name!r} backbone from this config ({' '.join(str(error).split())[:200]})."
        ) from error
    own = getattr(config, "image_size", _PROBE)
    own = (own, own) if isinstance(own, int) else tuple(own)
    patch = getattr(config, "patch_size", 16)
    maps: Sequence[Tensor] | None = None
    reason = ""
    for size in ((_PROBE, _PROBE), own, (16 * patch, 16 * patch) if isinstance(patch, int) else own):
        maps, reason = _shapes(model, size)
        if maps and all(size[0] % one.shape[-2] == 0 for one in maps):
            break
    if not maps:
        raise ValueError(f"a {name!r} backbone of this config cannot see an image of {own[0]}x{own[1]}: {reason}")
    strides = [size[0] // one.shape[-2] for one in maps]
    only_size = size if _shapes(model, (size[0], 2 * size[1]))[0] is None else None
    found = {stride: index for index, stride in enumerate(strides)}  # the last map of each
    if len(found) == 1:
        chosen = tuple(out_layers or _quarters(len(stages) - 1))
        if len(chosen) not in (1, 4) or not all(1 <= layer < len(stages) for layer in chosen):
            raise ValueError(
                f"out_layers must be four layers from 1 to {len(stages) - 1}, or one of them; got {chosen}."
            )
        if maps[-1].shape[1] % 4:  # of a pyramid's finest level a quarter is left
            raise ValueError(f"a plain encoder's channels must be divisible by 4; {name!r} has {maps[-1].shape[1]}.")
    elif out_layers is not None:
        raise ValueError(
            f"out_layers are for encoders whose maps have one size; a {name!r} backbone has maps of strides "
            f"{sorted(found)}. Leave them out."
        )
    elif not set(STRIDES) <= found.keys():
        raise ValueError(
            f"heads read levels of strides {STRIDES}, and a {name!r} backbone has maps of strides {sorted(found)}. "
            "Take an encoder with four such stages, or a plain ViT."
        )
    else:
        chosen = tuple(found[stride] for stride in STRIDES)
    return Levels(
        chosen, tuple(maps[index].shape[1] for index in chosen), tuple(strides[index] for index in chosen), only_size
    )


def _quarters(layers: int) -> tuple[int, ...]:
    return tuple(layers * quarter // 4 for quarter in (1, 2, 3, 4)) if layers >= 4 else (layers,)


@torch.no_grad()
def _shapes(model: PreTrainedModel, size: tuple[int, int]) -> tuple[Sequence[Tensor] | None, str]:
    """Feature maps without content, or None and why not."""
    try:
        maps = model(torch.empty(1, getattr(model.config, "num_channels", 3), *size, device="meta")).feature_maps
    except _REFUSALS as error:
        return None, " ".join(str(error).split())[:200]
    shown = all(one.ndim == 4 and min(one.shape) > 0 for one in maps)
    return (maps, "") if shown else (None, "its feature maps are no maps")


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B,C,h,w)."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) -> the same."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """Levels of strides 4, 8, 16 and 32 out of the maps of a plain ViT, without a compiled operator.

    ViTDet's (arXiv 2203.16527, section 3): two transposed convolutions, one, none, and a maximum over 2x2 cells; each
    convolution halves the channels and has a LayerNorm over them. So the last two levels have no weights, and a
    distance to a frozen encoder measures the encoder alone. A patch of 14 makes levels of stride 3.5, 7 and 14: these
    are resampled bilinearly by exactly 14/16.

    Args:
        channels: of the maps, divisible by 4.
        patch: their stride in pixels.
    """

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        half, quarter = channels // 2, channels // 4
        self.hidden_sizes = (quarter, half, channels, channels)
        self.to4 = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            ChannelLayerNorm(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ChannelLayerNorm(quarter, eps=1e-6),
        )
        self.to8 = nn.Sequential(nn.ConvTranspose2d(channels, half, 2, stride=2), ChannelLayerNorm(half, eps=1e-6))

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        """Four maps, or one for all levels (B,C,h,w) -> four levels of images of `size`, two multiples of 32."""
        first, second, third, last = maps if len(maps) == 4 else (maps[0],) * 4
        levels = [
            self._resampled(level, size, stride)
            for level, stride in ((self.to4(first), 4), (self.to8(second), 8), (third, 16), (last, 16))
        ]
        return (*levels[:3], F.max_pool2d(levels[3], 2))

    def _resampled(self, level: Tensor, size: Sequence[int], stride: int) -> Tensor:
        if self.patch != 16:
            # By the factor, not by the sizes: a map of 37 patches covers 518 pixels, and 32.375 cells of 16.
            level = F.interpolate(level, scale_factor=self.patch / 16, mode="bilinear", align_corners=False)
        return level[..., : size[0] // stride, : size[1] // stride]


def padded(side: int, multiple: int) -> int:
    """The smallest multiple that is no smaller than `side`. Of positive numbers alone: ONNX rounds towards zero."""
    return (side + multiple - 1) // multiple * multiple


class BackboneEncoder(nn.Module):
    """A backbone of transformers that takes images of any size and gives levels of strides 4, 8, 16 and 32.

    Images are padded below and to the right with the mean colour, so that every level covers the same area, and no row
    is lost where a patch does not divide the image. Pixel values come in with ImageNet's statistics, as everywhere in
    this package; where an encoder was trained with others they are brought to them here.

    Attributes:
        model: the backbone.
        pyramid: see `Pyramid`; None for a hierarchical backbone.
        hidden_sizes: channels of the four levels.

    Args:
        config: `backbone_config`, `out_layers`, `image_mean` and `image_std` are read.

    Raises:
        ValueError: see `measure_levels`.
    """

    def __init__(self, config: T2SDAConfig) -> None:
        super().__init__()
        levels = measure_levels(config.backbone_config, config.out_layers)
        config.backbone_config.out_indices = list(dict.fromkeys(sorted(levels.out_indices)))
        self.model: PreTrainedModel = AutoBackbone.from_config(config.backbone_config)
        self.only_size, self.name = levels.only_size, config.backbone_config.model_type
        self.pyramid = Pyramid(levels.channels[-1], levels.strides[-1]) if levels.plain else None
        self.hidden_sizes = levels.channels if self.pyramid is None else self.pyramid.hidden_sizes
        self.shift = tuple(
            (mean - own) / std for mean, own, std in zip(IMAGE_MEAN, config.image_mean, config.image_std, strict=True)
        )
        self.scale = tuple(std / own for std, own in zip(IMAGE_STD, config.image_std, strict=True))

    def refuse_size(self, height: int, width: int) -> None:
        """Raise ValueError for images of a size that the backbone does not take."""
        if self.only_size is not None and (padded(height, 32), padded(width, 32)) != self.only_size:
            only = "x".join(map(str, self.only_size))
            raise ValueError(
                f"a {self.name!r} encoder of this config takes images of {only} alone (its windows are laid out for "
                f"that), and got {height}x{width}. Set data.crop_size and, with evaluation.mode slide, "
                "evaluation.window to it, or take another encoder."
            )

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Images (B,3,H,W), normalised by ImageNet -> four levels (B,C_i,h/s_i,w/s_i); h and w are H and W, rounded up
        to 32.

        Args:
            kwargs: those of transformers' encoders. They change nothing: all levels are always returned.

        Raises:
            ValueError: for a size that the backbone refuses.
        """
        self.refuse_size(*pixel_values.shape[-2:])
        height, width = (padded(side, 32) for side in pixel_values.shape[-2:])
        patch = 1 if self.pyramid is None else self.pyramid.patch
        below, right = (padded(side, patch) for side in (height, width))
        if torch.compiler.is_exporting() or (below, right) != tuple(pixel_values.shape[-2:]):
            pixel_values = F.pad(pixel_values, (0, right - pixel_values.shape[-1], 0, below - pixel_values.shape[-2]))
        if self.scale != (1.0, 1.0, 1.0) or any(self.shift):
            colours = zip(pixel_values.unbind(1), self.scale, self.shift, strict=True)
            pixel_values = torch.stack([colour * scale + shift for colour, scale, shift in colours], dim=1)
        maps = tuple(self.model(pixel_values).feature_maps)
        levels = maps if self.pyramid is None else self.pyramid(maps, (height, width))
        return BaseModelOutput(last_hidden_state=levels[-1], hidden_states=levels)
