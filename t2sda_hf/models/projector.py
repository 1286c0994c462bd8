"""The projector g: encoder maps to the embeddings that the pull loss compares."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .heads import conv1x1_of_concatenation, conv_block, upsample


class Projector(nn.Module):
    """Two conv-BN-ReLU blocks on the concatenated encoder levels (paper section 3.1; method 1.6).

    The paper says "two Conv-BN-ReLU blocks" and "the feature provided by the encoder", no kernel, width or level.
    The defaults are SePiCo's: 1x1, 256 channels, all four levels at stride 4; 328,704 parameters with B5's widths.

    Args:
        hidden_sizes: channels of all encoder maps, finest first.
        in_index: the levels to read, ascending. All are resized to the first of them.
        hidden: channels between the blocks.
        dim: D, channels of the embeddings.
        kernel: 1 or 3. With 1 the first convolution runs per level, before upsampling: exact, and cheaper by far.
        final_relu: False ends with the second batch norm, so embeddings may be negative.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        in_index: Sequence[int] = (0, 1, 2, 3),
        hidden: int = 256,
        dim: int = 256,
        kernel: int = 1,
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        self.in_index = tuple(in_index)
        self.in_channels = [hidden_sizes[index] for index in in_index]
        self.block1 = conv_block(sum(self.in_channels), hidden, kernel)
        self.block2 = conv_block(hidden, dim, kernel)
        if not final_relu:
            self.block2[2] = nn.Identity()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """All encoder maps (B,C_i,h_i,w_i) -> embeddings (B,D,h,w) at the size of level `in_index[0]`.

        Not normalised: the pull loss samples pixels first and normalises only those. channels_last, so that one
        pixel's embedding is one run of memory; sampling from the contiguous format takes three times as long.
        """
        levels = [features[index] for index in self.in_index]
        conv, batch_norm, relu = self.block1
        if conv.kernel_size == (1, 1):
            hidden = conv1x1_of_concatenation(levels, conv.weight.flatten(1).split(self.in_channels, dim=1))
        else:
            size = levels[0].shape[-2:]
            concatenated = torch.cat([upsample(level, size) for level in levels], dim=1)
            hidden = conv(concatenated.contiguous(memory_format=torch.channels_last))
        embeddings = self.block2(relu(batch_norm(hidden)))
        return embeddings.contiguous(memory_format=torch.channels_last)
