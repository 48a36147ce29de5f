"""What a U-Net asks of its transformer blocks. Which block it has, its caller says: `UNet(config, PlainBlock)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raphael.net.attention import ActiveHooks
from raphael.net.memory import BlockText


@dataclass(frozen=True)
class BlockPlace:
    """Where in the U-Net a block stands."""

    dim: int  # width of the map
    time_dim: int  # width of the timestep's embedding
    index: int  # in the order of the forward pass
    level: int  # 0: the largest map


@dataclass(kw_only=True)
class BlockInput:
    """What every block reads besides its map."""

    time: Tensor  # (B, time_dim), the timestep alone
    embedding: Tensor  # (B, time_dim), what the res-blocks read: the timestep, with it caption, vector and level
    tokens: Tensor | None = None  # (B, N, context_dim)
    mask: Tensor | None = None  # (B, N) bool; None: all tokens count
    hooks: ActiveHooks | None = None
    collect: bool = False
    texts: list[BlockText] | None = None  # by block, where they are remembered


@dataclass(kw_only=True)
class BlockOutput:
    """What a block shows besides its map."""

    attention: Tensor | None = None  # (B, h*w, N) of the text, the heads joined; only when collected
    height: int
    width: int


class Block(nn.Module):
    """A transformer block on a map: (B, D, h, w), what it reads -> (B, D, h, w), what it shows."""

    recompute = False  # in training keep the block's input alone and compute the rest again in the backward

    def __init__(self, place: BlockPlace):
        super().__init__()
        self.index = place.index

    def forward(self, x: Tensor, given: BlockInput) -> tuple[Tensor, BlockOutput]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.attend, x, given, use_reentrant=False)
        return self.attend(x, given)

    def attend(self, x: Tensor, given: BlockInput) -> tuple[Tensor, BlockOutput]:
        raise NotImplementedError

    def read_text(self, tokens: Tensor) -> BlockText:
        """What the block makes of tokens (B, N, context_dim) whatever the image and the timestep are."""
        raise NotImplementedError

    def text_weights(self) -> list[Tensor]:
        """Parameters and buffers that `read_text` reads."""
        raise NotImplementedError


BlockFactory = Callable[[Any, BlockPlace], Block]  # the U-Net's config, the place -> the block: its class will do
