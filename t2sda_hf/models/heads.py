"""Segmentation heads on the four maps of an encoder. Two return logits at the size of the finest, one of the last."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upsample(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners=False: (B,C,h,w) -> (B,C,*size), in the memory format of `features`."""
    if features.shape[-2:] == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def conv1x1_of_concatenation(
    features: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """`conv1x1(concatenate(upsample(features)))` without ever building the concatenation.

    A 1x1 convolution mixes channels, bilinear upsampling mixes pixels, so they commute; and a convolution of a
    concatenation is the sum of the convolutions of its parts. So coarse levels are convolved at their own size, which
    is exact and takes about a tenth of the operations.

    Args:
        features: one or more maps (B,C_i,h_i,w_i); all are brought to the size of the first.
        weights: (E,C_i) each, the slices of the 1x1 convolution.
        bias: (E,) of the convolution.

    Returns:
        (B,E,h_0,w_0), channels_last, in which these convolutions are plain matrix products of pixels.
    """

    def convolve(level: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(level.contiguous(memory_format=torch.channels_last), weight[:, :, None, None], bias)

    total = convolve(features[0], weights[0], bias)
    for level, weight in zip(features[1:], weights[1:], strict=True):
        total.add_(upsample(convolve(level, weight), total.shape[-2:]))  # a new sum would cost more than the addition
    return total


def conv_block(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias that keeps the size, batch norm, and ReLU unless the caller has one for several."""
    padding = dilation * (kernel // 2)
    block = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )
    if relu:
        block.append(nn.ReLU(inplace=True))  # backward of the norm needs its input, not its output
    return block


class LevelProjection(nn.Module):
    """A linear layer on the channels of one level. `proj` is its name in the Hub's SegFormer files."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)


class AllMLPHead(nn.Module):
    """SegFormer's head (method 1.2): linear per level, concatenate, 1x1 conv-BN-ReLU, dropout, classifier.

    Parameters have the names and the channel order of the Hub's SegFormer files, so those load as they are. In that
    order `linear_fuse` reads the coarsest level first; DAFormer's copy reads the finest first, which is the same
    function with permuted weights. Dropout drops whole channels (Dropout2d), as in the original.

    No layer stands between the linear layers and `linear_fuse`, so `forward` multiplies the two first and then
    convolves every level at its own size. This is exact (`conv1x1_of_concatenation`) and a tenth of the work.

    Args:
        hidden_sizes: channels of the encoder's maps, finest first.
        channels: E.
        num_labels: outputs.
        dropout: probability of a channel to be dropped.
    """

    def __init__(self, hidden_sizes: Sequence[int], channels: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linear_c = nn.ModuleList(LevelProjection(size, channels) for size in hidden_sizes)
        self.linear_fuse = nn.Conv2d(channels * len(hidden_sizes), channels, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_labels, 1)

    def penultimate(self, features: Sequence[Tensor]) -> Tensor:
        """What the classifier reads, before dropout: (B,E,h_0,w_0) >= 0, channels_last."""
        levels = [level.proj for level in self.linear_c]
        fuse = self.linear_fuse.weight.flatten(1)
        parts = fuse.chunk(len(levels), dim=1)[::-1]
        weights = [part @ level.weight for part, level in zip(parts, levels, strict=True)]
        # Not `fuse @ bias`: MKL's matrix-vector product rounds differently when a tensor starts at an odd address, as
        # those of a mapped file do; `from_pretrained` copies them, other ways of loading may not.
        bias = (fuse * torch.cat([level.bias for level in levels[::-1]])).sum(1)
        return self.activation(self.batch_norm(conv1x1_of_concatenation(features, weights, bias)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B,C_i,h_i,w_i), finest first -> logits (B,num_labels,h_0,w_0)."""
        return self.classifier(self.dropout(self.penultimate(features)))


class LinearHead(nn.Module):
    """A batch norm per level and one 1x1 convolution on all levels: what the encoder itself knows of the classes.

    DINOv2's linear evaluation (arXiv 2304.07193, section 7.4) with more than the last map. No hidden layer, so little
    that could be adapted badly; a baseline to judge other heads by.

    Args:
        hidden_sizes: channels of the encoder's maps, finest first.
        num_labels: outputs.
        dropout: probability of a channel to be dropped.
    """

    def __init__(self, hidden_sizes: Sequence[int], num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.sizes = list(hidden_sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in hidden_sizes)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(sum(hidden_sizes), num_labels, 1)

    def penultimate(self, features: Sequence[Tensor]) -> Tensor:
        """What the classifier reads, before dropout: all levels at the size of the finest, (B,ΣC_i,h_0,w_0)."""
        size = features[0].shape[-2:]
        return torch.cat([upsample(norm(level), size) for norm, level in zip(self.norms, features, strict=True)], dim=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B,C_i,h_i,w_i), finest first -> logits (B,num_labels,h_0,w_0)."""
        levels = [self.dropout(norm(level)) for norm, level in zip(self.norms, features, strict=True)]
        weights = self.classifier.weight.flatten(1).split(self.sizes, dim=1)
        return conv1x1_of_concatenation(levels, weights, self.classifier.bias)


class DAFormerHead(nn.Module):
    """DAFormer's head (method 1.3): context of several dilations over the fused levels. The paper's f for MiT.

    Linear per level, upsample and concatenate; parallel branches, one per dilation, of which 1 is a 1x1 conv-BN-ReLU
    and the others are depthwise separable 3x3; concatenate, 3x3 conv-BN-ReLU ("bottleneck"), dropout, classifier.
    There is no image-pooling branch. With B5's widths, 256 channels and 19 outputs it has 3,712,275 parameters.

    Everything after the linear layers stays in the contiguous memory format: a dilated depthwise convolution is
    several times slower in channels_last on CPU.

    Args:
        hidden_sizes: channels of the encoder's maps, finest first.
        channels: of every level, branch and of the bottleneck.
        num_labels: outputs.
        dilations: one branch each.
        dropout: probability of a channel to be dropped.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        channels: int,
        num_labels: int,
        dilations: Sequence[int] = (1, 6, 12, 18),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(size, channels) for size in hidden_sizes)
        fused = channels * len(hidden_sizes)
        self.branches = nn.ModuleList(
            conv_block(fused, channels, kernel=1, relu=False)
            if dilation == 1
            else nn.Sequential(
                conv_block(fused, fused, kernel=3, dilation=dilation, groups=fused),
                conv_block(fused, channels, kernel=1, relu=False),
            )
            for dilation in dilations
        )
        self.activation = nn.ReLU(inplace=True)  # of all branches at once: autograd keeps one copy of them, not two
        self.bottleneck = conv_block(channels * len(dilations), channels, kernel=3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_labels, 1)

    def penultimate(self, features: Sequence[Tensor]) -> Tensor:
        """What the classifier reads, before dropout: (B,channels,h_0,w_0) >= 0 (the feature of method 6.3)."""
        size = features[0].shape[-2:]
        projected = [
            linear(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for linear, level in zip(self.levels, features, strict=True)
        ]
        fused = torch.cat([upsample(level, size) for level in projected], dim=1).contiguous()
        return self.bottleneck(self.activation(torch.cat([branch(fused) for branch in self.branches], dim=1)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B,C_i,h_i,w_i), finest first -> logits (B,num_labels,h_0,w_0)."""
        return self.classifier(self.dropout(self.penultimate(features)))


class DeepLabV2Head(nn.Module):
    """DeepLab-V2's head, as AdaptSegNet, DACS and DAFormer run it (method 1.4): a sum of dilated 3x3 convolutions.

    It reads the last map alone and is linear: no norm, no activation, no dropout. The paper of DeepLab-V2 has four
    branches (6, 12, 18, 24); the public code of its descendants returns after the second. With 2048 channels and 19
    outputs these two have 700,454 parameters.

    Args:
        in_channels: of the last map.
        num_labels: outputs.
        dilations: one branch each.
    """

    def __init__(self, in_channels: int, num_labels: int, dilations: Sequence[int] = (6, 12)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_labels, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )

    def penultimate(self, features: Sequence[Tensor]) -> Tensor:
        """What the classifiers read: the last map (the feature of method 6.3)."""
        return features[-1]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B,C_i,h_i,w_i) -> logits (B,num_labels,h,w) at the size of the last."""
        first, *others = (branch(self.penultimate(features)) for branch in self.branches)
        return sum(others, first)
