"""The Efficient U-Net: for its inputs a UNet (raphael/net/unet.py), inside another network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.config.efficient import EfficientUNetConfig
from raphael.net.attention import ActiveHooks
from raphael.net.block import Block, BlockFactory, BlockInput, BlockPlace
from raphael.net.condition import Condition
from raphael.net.efficient.blocks import DownBlock, Level, UpBlock, joined
from raphael.net.inputs import LevelEmbedding, check_inputs, zeroed
from raphael.net.layers import TimeEmbedding
from raphael.net.text_layers import AttentionPool, TextRefiner
from raphael.net.unet import UNetOutput


class EfficientUNet(nn.Module):
    """conv in; a DownBlock a level; an UpBlock a level, with the skips of the others; out (figure A.30).

    block: makes the transformer block of a place from (config, place), as the class `PlainBlock` does. What is told:
    the timestep, the text's tokens and their pooled vector, a low-resolution picture at the size of x
    (`picture_channels`) and the level of its augmentation (`level_embedding`).
    """

    def __init__(self, config: EfficientUNetConfig, block: BlockFactory):
        super().__init__()
        self.config = config
        self.num_blocks = 0
        stem, channels, groups = config.stem_channels, config.channels, config.norm_groups
        time_dim, last = 4 * channels[0], len(channels) - 1
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        self.conv_in = nn.Conv2d(config.latent_channels, stem, 3, padding=1)

        def level(at: int) -> Level:
            attention = self._block(block, at, time_dim) if at in config.attention_levels else None
            return Level(channels[at], config.res_blocks[at], time_dim, groups, attention)

        above = (stem, *channels)  # width of the map that a level comes from, and goes back to
        self.down = nn.ModuleList(DownBlock(above[at], config.strides[at], level(at)) for at in range(last + 1))
        self.up = nn.ModuleList(UpBlock(above[at], config.strides[at], level(at)) for at in reversed(range(last + 1)))
        self.norm_out = nn.GroupNorm(groups, stem)
        self.conv_out = zeroed(nn.Conv2d(stem, config.predicted_channels, 3, padding=1))
        picture, vector, context = config.picture_channels, config.vector_dim, (config.context_dim, config.head_dim)
        self.picture_in = nn.Conv2d(picture, stem, 3, padding=1, bias=False) if picture else None
        self.vector_in = zeroed(nn.Linear(vector, time_dim, bias=False)) if vector else None
        self.level_in = LevelEmbedding(channels[0], time_dim) if config.level_embedding else None
        self.text_pool = AttentionPool(*context, time_dim) if config.text_pool else None
        self.text_refiner = TextRefiner(*context, config.text_layers) if config.text_layers else None

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,) timesteps, 0 to T-1, any real
        condition: Condition,
        *,
        collect: bool = False,
    ) -> UNetOutput:
        """Predict what the diffusion config says. collect keeps the attention maps of the text.

        Raises ValueError on a map that cannot be halved often enough, or a condition that it does not read.
        """
        self._check(x, t, condition)
        given = self._read(x, t, condition, collect)
        h = self.conv_in(x)
        if condition.picture is not None:
            h = h + self.picture_in(condition.picture.to(x.dtype))
        skips, shown = [h], []
        for module in self.down:
            h, blocks = module(h, given)
            skips.append(h)
            shown += blocks
        skips[-1] = None  # the way up begins with it
        for module in self.up:
            h, blocks = module(h, skips.pop(), given)
            shown += blocks
        h = joined(h, skips.pop())
        return UNetOutput(self.conv_out(F.silu(self.norm_out(h))), shown)

    def transformer_blocks(self) -> list[Block]:
        """All blocks in the order of the forward pass."""
        found = [module for module in self.modules() if isinstance(module, Block)]
        return sorted(found, key=lambda block: block.index)

    def _read(self, x: Tensor, t: Tensor, condition: Condition, collect: bool) -> BlockInput:
        tokens, mask = condition.tokens, condition.mask
        if tokens is not None:
            tokens = tokens.to(x.dtype)
            if self.text_refiner is not None:
                tokens = self.text_refiner(tokens, mask)
        time = embedding = self.time_embedding(t)
        if self.text_pool is not None:
            embedding = embedding + self.text_pool(tokens, mask)
        if condition.vector is not None:
            embedding = embedding + self.vector_in(condition.vector.to(self.vector_in.weight.dtype))
        if condition.level is not None:
            embedding = embedding + self.level_in(condition.level)
        hooks = ActiveHooks.of(condition, len(x), x.device)
        return BlockInput(time=time, embedding=embedding, tokens=tokens, mask=mask, hooks=hooks, collect=collect)

    def _block(self, block: BlockFactory, level: int, time_dim: int) -> Block:
        made = block(self.config, BlockPlace(self.config.channels[level], time_dim, self.num_blocks, level))
        self.num_blocks += 1
        return made

    def _check(self, x: Tensor, t: Tensor, condition: Condition) -> None:
        check_inputs(self.config, x, t, condition)
        if condition.control is not None:
            raise ValueError("control: got residuals, expected none: an Efficient U-Net has no place for them")
