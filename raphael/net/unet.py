"""The denoiser: Stable Diffusion's U-Net shape. What its transformer blocks are, its caller says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raphael.base.config.unet import UNetConfig
from raphael.net.attention import ActiveHooks
from raphael.net.block import Block, BlockFactory, BlockInput, BlockOutput, BlockPlace
from raphael.net.condition import Condition
from raphael.net.inputs import LevelEmbedding, check_control, check_inputs, told_vector, vector_input, zeroed
from raphael.net.layers import Downsample, ResBlock, TimeEmbedding, Upsample
from raphael.net.memory import TextMemory
from raphael.net.text_layers import AttentionPool, TextRefiner


@dataclass
class UNetOutput:
    prediction: Tensor  # (B, C, h, w): eps or v, as the diffusion config says
    blocks: list[BlockOutput] = field(default_factory=list)  # in the order of the forward pass


class UNet(nn.Module):
    """conv in; per level res-blocks (+ transformer blocks) and a downsample; middle; the mirror with skips; out.

    block: makes the transformer block of a place from (config, place), as the class `PlainBlock` does. A config of a
    subclass of UNetConfig is the block's; the network reads the fields of UNetConfig alone.
    """

    def __init__(self, config: UNetConfig, block: BlockFactory):
        super().__init__()
        self.config = config
        self.num_blocks = 0
        self._memory: TextMemory | None = None
        channels, time_dim = config.channels, 4 * config.channels[0]
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        layers = config.text_layers
        self.text_refiner = TextRefiner(config.context_dim, config.head_dim, layers) if layers else None
        if config.pooled_text:
            self.text_embedding = nn.Linear(2 * config.context_dim, time_dim)
        pixels = config.patch_px**2
        self.conv_in = nn.Conv2d(config.latent_channels * pixels, channels[0], 3, padding=1)

        self.down, skips, width = nn.ModuleList(), [channels[0]], channels[0]
        for level, level_width in enumerate(channels):
            for _ in range(config.res_blocks):
                self.down.append(self._unit(block, width, level_width, level))
                width = level_width
                skips.append(width)
            if level < len(channels) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle_in = ResBlock(width, width, time_dim, config.norm_groups)
        self.middle = self._block(block, width, len(channels) - 1)
        self.middle_out = ResBlock(width, width, time_dim, config.norm_groups)

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(channels))):
            for _ in range(config.res_blocks + 1):
                self.up.append(self._unit(block, width + skips.pop(), level_width, level))
                width = level_width
            if level > 0:
                self.up.append(Upsample(width))
        assert not skips

        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.conv_out = zeroed(nn.Conv2d(width, config.predicted_channels * pixels, 3, padding=1))
        # last, so that the same seed gives the rest the same weights with and without them
        picture = config.picture_channels * pixels
        self.picture_in = zeroed(nn.Conv2d(picture, channels[0], 3, padding=1, bias=False)) if picture else None
        self.vector_in = vector_input(config, time_dim)
        self.level_in = LevelEmbedding(channels[0], time_dim) if config.level_embedding else None
        pool = config.context_dim, config.head_dim, time_dim
        self.text_pool = AttentionPool(*pool) if config.text_pool else None

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,) timesteps, 0 to T-1, any real
        condition: Condition,
        *,
        collect: bool = False,
    ) -> UNetOutput:
        """Predict eps or v. collect keeps the attention maps of the text.

        Raises ValueError on a map the U-Net cannot halve often enough, or a condition that it does not read. A NaN in a
        sample's map, timestep or counted tokens makes that sample's prediction NaN, and no other's.
        """
        self._check(x, t, condition)
        return self._run(x, condition, BlockInput(**self._read(x, t, condition), collect=collect))

    def _read(self, x: Tensor, t: Tensor, condition: Condition) -> dict[str, object]:
        """Of BlockInput, what every U-Net knows."""
        tokens, mask, texts = condition.tokens, condition.mask, None
        if tokens is not None:
            tokens = tokens.to(x.dtype)
            if self._memory is not None and not self.training and not torch.is_grad_enabled():
                tokens, texts = self._memory.read(self.transformer_blocks(), tokens, mask, self.text_refiner)
            elif self.text_refiner is not None:
                tokens = self.text_refiner(tokens, mask)
        time = embedding = self.time_embedding(t)
        if self.config.pooled_text:
            embedding = embedding + self._pooled(tokens, mask)
        if self.text_pool is not None:
            embedding = embedding + self.text_pool(tokens, mask)
        if (vector := told_vector(self.config, x, condition, self.vector_in)) is not None:
            embedding = embedding + self.vector_in(vector)
        if condition.level is not None:
            embedding = embedding + self.level_in(condition.level)
        hooks = ActiveHooks.of(condition, len(x), x.device)
        return {"time": time, "embedding": embedding, "tokens": tokens, "mask": mask, "hooks": hooks, "texts": texts}

    def _run(self, x: Tensor, condition: Condition, given: BlockInput) -> UNetOutput:
        blocks: list[BlockOutput] = []
        patch = self.config.patch_px
        h = self.conv_in(_patched(x, patch))
        if condition.picture is not None:
            h = h + self.picture_in(_patched(condition.picture.to(x.dtype), patch))
        control = condition.control
        skips = [h]
        for module in self.down:
            h = self._run_unit(module, h, given, blocks)
            skips.append(h)
        if control is not None:
            skips = [skip + residual.to(skip) for skip, residual in zip(skips, control[:-1], strict=True)]
        h = self.middle_in(h, given.embedding)
        h, block = self.middle(h, given)
        blocks.append(block)
        h = self.middle_out(h, given.embedding)
        if control is not None:
            h = h + control[-1].to(h)
        for module in self.up:
            if not isinstance(module, Upsample):
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._run_unit(module, h, given, blocks)
        out = self.conv_out(nn.functional.silu(self.norm_out(h)))
        return UNetOutput(out if patch == 1 else nn.functional.pixel_shuffle(out, patch), blocks)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[TextMemory]:
        """Inside, without gradients and in eval mode, what blocks make of the texts is computed once. Whoever enters
        begins with nothing remembered, whatever wrote the weights since; inside no optimizer steps: a fused one writes
        without a trace (`weights_version`)."""
        outer, self._memory = self._memory, TextMemory()
        try:
            yield self._memory
        finally:
            self._memory = outer

    def transformer_blocks(self) -> list[Block]:
        """All blocks in the order of the forward pass."""
        found = [module for module in self.modules() if isinstance(module, Block)]
        return sorted(found, key=lambda block: block.index)

    def refined(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the blocks read of the encoder's tokens (B, N, context_dim): themselves, or what `text_layers` make of
        them."""
        return tokens if self.text_refiner is None else self.text_refiner(tokens, mask)

    def attention_maps_px(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of every block's map for an x of that size, in the order of the forward pass."""
        last = len(self.config.channels) - 1
        height, width = height // self.config.patch_px, width // self.config.patch_px
        down = [level for level in range(last + 1) if level in self.config.attention_levels]
        levels = [level for level in down for _ in range(self.config.res_blocks)] + [last]
        levels += [level for level in reversed(down) for _ in range(self.config.res_blocks + 1)]
        return [(height >> level, width >> level) for level in levels]

    def control_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(channels, height, width) of each residual of `Condition.control` for an x of that size."""
        channels, last = self.config.channels, len(self.config.channels) - 1
        height, width = height // self.config.patch_px, width // self.config.patch_px
        shapes = [(channels[0], height, width)]
        for level, wide in enumerate(channels):
            shapes += [(wide, height >> level, width >> level)] * self.config.res_blocks
            if level < last:
                shapes.append((wide, height >> level + 1, width >> level + 1))
        return [*shapes, (channels[-1], height >> last, width >> last)]

    def _unit(self, block: BlockFactory, in_width: int, width: int, level: int) -> nn.ModuleList:
        unit = nn.ModuleList([ResBlock(in_width, width, 4 * self.config.channels[0], self.config.norm_groups)])
        if level in self.config.attention_levels:
            unit.append(self._block(block, width, level))
        return unit

    def _block(self, block: BlockFactory, width: int, level: int) -> Block:
        made = block(self.config, BlockPlace(width, 4 * self.config.channels[0], self.num_blocks, level))
        self.num_blocks += 1
        return made

    @staticmethod
    def _run_unit(module: nn.Module, h: Tensor, given: BlockInput, blocks: list[BlockOutput]) -> Tensor:
        if not isinstance(module, nn.ModuleList):
            return module(h)
        h = module[0](h, given.embedding)
        for block in module[1:]:
            h, output = block(h, given)
            blocks.append(output)
        return h

    def _pooled(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The mean token and the last real one, which in a causal encoder has read the whole caption."""
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        count = mask.sum(1).clamp(min=1)
        mean = torch.einsum("bn,bnc->bc", mask.to(tokens) / count.unsqueeze(1), tokens)
        last = tokens[torch.arange(len(tokens), device=tokens.device), count - 1]
        return self.text_embedding(torch.cat([mean, last], dim=-1))

    def _check(self, x: Tensor, t: Tensor, condition: Condition) -> None:
        check_inputs(self.config, x, t, condition)
        if condition.control is not None:
            check_control(condition.control, self.control_shapes(*x.shape[2:]), len(x))


def _patched(x: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, C patch^2, h / patch, w / patch)."""
    return x if patch == 1 else nn.functional.pixel_unshuffle(x, patch)
