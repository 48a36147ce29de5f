"""The shape of an Efficient U-Net (raphael/net/efficient)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raphael.base.config.unet import Count, PlainUNetConfig


@dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig(PlainUNetConfig):
    """Levels from the largest map to the smallest: `channels`, `res_blocks` and `strides` have one number for each.

    A level of stride 2 computes on a map of half the side of the level above it; the first is measured against x. The
    levels of `attention_levels` end in a transformer block, on the way down and on the way up.
    """

    res_blocks: tuple[int, ...]  # per level on the way down, and as many on the way up
    strides: tuple[int, ...]
    stem_channels: Count  # at the full size of x

    @property
    def num_blocks(self) -> int:
        return 2 * len(set(self.attention_levels))

    @property
    def multiple(self) -> int:
        return math.prod(self.strides)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("res_blocks", "strides"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name}: got {list(getattr(self, name))}, expected one number for each of the "
                    f"{len(self.channels)} levels of channels"
                )
        if set(self.strides) - {1, 2}:
            raise ValueError(f"strides: got {list(self.strides)}, expected 1 or 2 for each level")
        if min(self.res_blocks) < 1:
            raise ValueError(f"res_blocks: got {list(self.res_blocks)}, expected at least 1 for each level")
        if self.stem_channels % self.norm_groups:
            raise ValueError(
                f"stem_channels: got {self.stem_channels}, expected a multiple of norm_groups {self.norm_groups}"
            )
        for name, none in (("patch_px", 1), ("pooled_text", False), ("inpainting", False), ("size_px", 0)):
            if (got := getattr(self, name)) != none:
                raise ValueError(f"{name}: got {got}, expected {none}: an Efficient U-Net has no such input")
