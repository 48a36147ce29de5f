"""The small parts of a diffusion U-Net: activation, time embedding, feed-forward, residual block, resampling."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """t (B,) timesteps, any real -> (B, dim): cos and sin of t at dim/2 frequencies from 1 down to 1/max_period."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exactly: on a CPU torch 2.15 computes it 2 to 4 times as fast as the tanh form."""
    return F.gelu(x)


def activate(x: Tensor, hidden: int) -> Tensor:
    """gelu(x) for x (..., hidden); value * gelu(gate) for x (..., 2 hidden) = (value, gate). -> (..., hidden)"""
    if x.shape[-1] == hidden:
        return gelu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


class TimeEmbedding(nn.Module):
    """E'(t): sinusoids, then two linear layers."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.channels = channels
        self.net = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, dim)
        return self.net(sinusoidal_embedding(t, self.channels).to(self.net[0].weight.dtype))


class FeedForward(nn.Module):
    """A plain feed-forward per pixel: W2 gelu(W1 h); with geglu W2 (W1 h * gelu(G h)) (arXiv 2002.05202).

    Exact GELU, as in the experts and in Stable Diffusion. hidden = dim * expansion;
    geglu has three matrices of that size, gelu two.
    """

    def __init__(self, dim: int, expansion: float, activation: Literal["gelu", "geglu"] = "gelu"):
        super().__init__()
        self.hidden = round(dim * expansion)
        self.wide = nn.Linear(dim, 2 * self.hidden if activation == "geglu" else self.hidden)
        self.narrow = nn.Linear(self.hidden, dim)

    def forward(self, h: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        return self.narrow(activate(self.wide(h), self.hidden))


class ResBlock(nn.Module):
    """x + conv(silu(norm( conv(silu(norm x)) + time ))), the last convolution zero at the start."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(
        self,
        x: Tensor,  # (B, C_in, h, w)
        time: Tensor,  # (B, time_dim)
    ) -> Tensor:  # (B, C_out, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h/2, w/2)
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
