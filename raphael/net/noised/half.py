"""Half a U-Net: the way down and the middle, then attention pooling. It reads a noised image and its timestep.

The classifier of guided-diffusion (Dhariwal and Nichol, arXiv 2105.05233, section 4) and the image tower
of a noised CLIP (GLIDE, arXiv 2112.10741, section 2.4; there a vision transformer that is told t).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.config.guide import HalfUNetConfig
from raphael.net.attention import attend
from raphael.net.block import BlockInput, BlockPlace
from raphael.net.layers import Downsample, ResBlock, TimeEmbedding
from raphael.net.plain import PlainBlock


class AttentionPool(nn.Module):
    """One vector of a map: its mean asks, the mean and all places answer (CLIP, arXiv 2103.00020, section 2.3).

    Each place has a learned vector, on a map of side x side; for another size these are interpolated.
    """

    def __init__(self, dim: int, out_dim: int, head_dim: int, side: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.places = nn.Parameter(torch.randn(dim, side, side) * dim**-0.5)
        self.mean_place = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, out_dim)

    def forward(self, h: Tensor) -> Tensor:  # (B, D, h, w) -> (B, out_dim)
        B, D, height, width = h.shape
        places = self.places
        if places.shape[1:] != (height, width):
            places = F.interpolate(places[None], (height, width), mode="bilinear", align_corners=False)[0]
        mean = (h.mean((2, 3)) + self.mean_place)[:, None]  # (B, 1, D)
        tokens = torch.cat([mean, (h + places).flatten(2).mT], dim=1)  # (B, 1 + h w, D)
        q = self.q(mean).view(B, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).view(B, -1, 2, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, None).transpose(1, 2).reshape(B, D))


class HalfUNet(nn.Module):
    """conv in; per level res-blocks (+ transformer blocks) and a downsample; middle; norm; attention pooling."""

    def __init__(self, config: HalfUNetConfig):
        super().__init__()
        self.config = config
        channels, time_dim = config.channels, 4 * config.channels[0]
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        self.conv_in = nn.Conv2d(config.latent_channels * config.patch_px**2, channels[0], 3, padding=1)
        self.down, width, index = nn.ModuleList(), channels[0], 0
        for level, level_width in enumerate(channels):
            for _ in range(config.res_blocks):
                self.down.append(ResBlock(width, level_width, time_dim, config.norm_groups))
                width = level_width
                if level in config.attention_levels:
                    self.down.append(PlainBlock(config, BlockPlace(width, time_dim, index, level)))
                    index += 1
            if level < len(channels) - 1:
                self.down.append(Downsample(width))
        self.middle_in = ResBlock(width, width, time_dim, config.norm_groups)
        self.middle = PlainBlock(config, BlockPlace(width, time_dim, index, len(channels) - 1))
        self.middle_out = ResBlock(width, width, time_dim, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.pool = AttentionPool(width, config.embedding_dim, config.head_width(width), config.pool_side)

    def forward(
        self,
        x: Tensor,  # (B, C, h, w), x_t of variance 1
        t: Tensor,  # (B,) timesteps, 0 to T-1, any real
    ) -> Tensor:  # (B, embedding_dim)
        """Raises ValueError on another shape. A NaN in a sample makes that sample's vector NaN, and no other's."""
        self._check(x, t)
        time = self.time_embedding(t)
        given = BlockInput(time=time, embedding=time)
        patch = self.config.patch_px
        h = self.conv_in(x if patch == 1 else F.pixel_unshuffle(x, patch))
        for module in [*self.down, self.middle_in, self.middle, self.middle_out]:
            if isinstance(module, ResBlock):
                h = module(h, time)
            else:
                h = module(h) if isinstance(module, Downsample) else module(h, given)[0]
        return self.pool(F.silu(self.norm_out(h)))

    def _check(self, x: Tensor, t: Tensor) -> None:
        channels, factor = self.config.latent_channels, self.config.multiple
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            want = f"(B, {channels}, h, w) with h and w multiples of {factor}"
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {want}")
        if tuple(t.shape) != (len(x),):
            raise ValueError(f"t: got shape {tuple(t.shape)}, expected (B,) = ({len(x)},)")
