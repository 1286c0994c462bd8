"""ResNet "v1c" with dilated last stages: the CNN encoder of the paper's DeepLab-V2 rows (method 1.4)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

STRIDES = (1, 2, 1, 1)  # of the stages, after a stem of stride 4: the output has stride 8
DILATIONS = (1, 1, 2, 4)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each with batch norm, beside a shortcut; the 3x3 one has stride and dilation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h/stride,w/stride), rounded up, >= 0."""
        hidden = self.relu(self.bn1(self.conv1(maps)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        return self.relu(self.bn3(self.conv3(hidden)) + self.downsample(maps))


class ResNetV1cEncoder(nn.Module):
    """Four stages of bottlenecks behind a stem of three 3x3 convolutions; maps at strides 4, 8, 8 and 8.

    Tensors have the names of open-mmlab's `resnet101_v1c` files, which are torchvision's but for the stem. The first
    block of a dilated stage takes the dilation of the stage before ("contracted", as in mmsegmentation): every other
    pixel of such a stage is exactly what the same weights give with a stride. Batch norm is trained, not frozen.

    Args:
        hidden_sizes: channels after each stage, (256, 512, 1024, 2048) in the published nets. A bottleneck is a quarter
            as wide; the stem has an eighth, an eighth and a quarter of the first.
        depths: blocks of each stage, (3, 4, 23, 3) for ResNet-101.
        num_channels: of the images.
    """

    def __init__(self, hidden_sizes: Sequence[int], depths: Sequence[int], num_channels: int = 3) -> None:
        super().__init__()
        width = hidden_sizes[0] // 4
        layers: list[nn.Module] = []
        for inside, outside, stride in (
            (num_channels, width // 2, 2),
            (width // 2, width // 2, 1),
            (width // 2, width, 1),
        ):
            layers += [nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = (width, *hidden_sizes[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                Bottleneck(inside, outside, stride, max(dilation // 2, 1)),
                *(Bottleneck(outside, outside, 1, dilation) for _ in range(depth - 1)),
            )
            for inside, outside, depth, stride, dilation in zip(
                inputs, hidden_sizes, depths, STRIDES, DILATIONS, strict=True
            )
        )

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Images (B,3,H,W), normalised -> the maps of the four stages (B,C_i,h_i,w_i), sides rounded up.

        Args:
            kwargs: those of transformers' encoders. They change nothing: all maps are always returned.
        """
        maps = self.maxpool(self.stem(pixel_values))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = layer(maps)
            stages.append(maps)
        return BaseModelOutput(last_hidden_state=maps, hidden_states=tuple(stages))
