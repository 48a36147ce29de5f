"""The blocks of the Efficient U-Net (arXiv 2205.11487, appendix B and figures A.27 to A.29).

Its rules, each of which a test records: a level downsamples before its convolutions and upsamples after them, so that
they all run on the small map; the depth lies at the small maps; a skip is added with the factor 1 / sqrt(2), which
keeps the variance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.net.block import BlockInput, BlockOutput

SKIP_SCALE = 2**-0.5


def joined(h: Tensor, skip: Tensor) -> Tensor:
    """(h + skip) / sqrt(2), of variance 1 where both have it and are independent."""
    return (h + skip) * SKIP_SCALE


class ResNetBlock(nn.Module):
    """conv1x1(x) + (group norm, swish, conv 3x3) twice (figure A.27). The last convolution begins at zero and the skip
    as the identity, so that a block of no change of width begins as one."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        nn.init.dirac_(self.skip.weight)
        nn.init.zeros_(self.skip.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, h, w) -> (B, C_out, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PixelShuffle(nn.Module):
    """(B, C_in, h, w) -> (B, C_out, 2h, 2w): a 1 x 1 convolution on the small map, whose channels become 2 x 2
    pixels.

    The four pixels of a place begin with one kernel, so that it begins as nearest-neighbour enlarging, without a
    checkerboard (arXiv 1707.02937).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 1)
        with torch.no_grad():
            for tensor in (self.conv.weight, self.conv.bias):
                tensor.copy_(tensor[::4].repeat_interleave(4, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class Level(nn.Module):
    """What a level computes on its map, down or up: the embedding once, the ResNet blocks, the attention where it has
    one (figures A.28 and A.29)."""

    def __init__(self, width: int, num_blocks: int, time_dim: int, norm_groups: int, attention: nn.Module | None):
        super().__init__()
        self.combine = nn.Linear(time_dim, width)
        self.blocks = nn.ModuleList(ResNetBlock(width, width, norm_groups) for _ in range(num_blocks))
        self.attention = attention

    def forward(self, h: Tensor, given: BlockInput) -> tuple[Tensor, list[BlockOutput]]:
        h = h + self.combine(F.silu(given.embedding))[:, :, None, None]
        for block in self.blocks:
            h = block(h)
        if self.attention is None:
            return h, []
        h, output = self.attention(h, given)
        return h, [output]


class DownBlock(nn.Module):
    """(B, C_in, s h, s w) -> (B, C, h, w): the strided convolution first (figure A.28)."""

    def __init__(self, in_channels: int, stride: int, level: Level):
        super().__init__()
        self.down = nn.Conv2d(in_channels, level.combine.out_features, 3, stride=stride, padding=1)
        self.level = level

    def forward(self, h: Tensor, given: BlockInput) -> tuple[Tensor, list[BlockOutput]]:
        return self.level(self.down(h), given)


class UpBlock(nn.Module):
    """(B, C, h, w) and the skip of its level -> (B, C_out, s h, s w): the enlarging last (figure A.29).

    skip: None at the smallest map, where the way up begins with what the way down ended with.
    """

    def __init__(self, out_channels: int, stride: int, level: Level):
        super().__init__()
        self.level = level
        width = level.combine.out_features
        self.up = PixelShuffle(width, out_channels) if stride == 2 else nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, h: Tensor, skip: Tensor | None, given: BlockInput) -> tuple[Tensor, list[BlockOutput]]:
        h, outputs = self.level(h if skip is None else joined(h, skip), given)
        return self.up(h), outputs
