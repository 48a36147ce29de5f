"""Layers over the frozen text tokens, trained with the U-Net (`unet.text_layers`). Not in the paper: its default is 0.

The frozen encoder of a CLIP is causal and was never asked which of two objects is left of the other. A few
bidirectional layers over its tokens, trained by the denoising loss, read what the images need (docs/learning.md).
Cross-attention, masks and gates see the refined tokens alone.

Letters of the shape suffixes: B samples, H heads, N tokens, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.net.attention import attend
from raphael.net.layers import FeedForward

EXPANSION = 4  # hidden width of the feed-forward / width of the tokens


class TextLayer(nn.Module):
    """x += attention(norm x); x += W2 gelu(W1 norm x): every token reads all real ones."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.norm_attention, self.norm_forward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.forward_layer = FeedForward(dim, EXPANSION)

    def forward(
        self,
        x_BNC: Tensor,
        mask_BN: Tensor | None,  # bool, True on real tokens; None: all
    ) -> Tensor:  # (B, N, C)
        B, N, C = x_BNC.shape
        qkv = self.qkv(self.norm_attention(x_BNC)).view(B, N, 3, self.num_heads, -1)
        q_BHNd, k_BHNd, v_BHNd = qkv.permute(2, 0, 3, 1, 4)
        out_BHNd = attend(q_BHNd, k_BHNd, v_BHNd, mask_BN)
        x_BNC = x_BNC + self.out(out_BHNd.transpose(1, 2).reshape(B, N, C))
        return x_BNC + self.forward_layer(self.norm_forward(x_BNC))


class TextRefiner(nn.Module):
    """(B, N, C) tokens of the frozen encoder -> (B, N, C) refined ones. Padding is read by no real token; what stands
    at its own places means nothing, as before. A sample without a real token has none to read."""

    def __init__(self, dim: int, head_dim: int, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(dim, head_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, context: Tensor, context_mask: Tensor | None) -> Tensor:
        x = context
        for layer in self.layers:
            x = layer(x, context_mask)
        return self.norm(x).to(context.dtype)


class AttentionPool(nn.Module):
    """A caption as one vector (B, D): the mean of its tokens asks all real ones (Imagen, arXiv 2205.11487, 2.3: text
    embeddings are attention-pooled and added to the timestep's embedding). A sample without a real token gets the bias.
    """

    def __init__(self, context_dim: int, head_dim: int, dim: int):
        super().__init__()
        self.num_heads = context_dim // head_dim
        self.norm = nn.LayerNorm(context_dim)
        self.q = nn.Linear(context_dim, context_dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * context_dim, bias=False)
        self.out = nn.Linear(context_dim, dim)

    def forward(
        self,
        x_BNC: Tensor,
        mask_BN: Tensor | None,  # bool, True on real tokens; None: all
    ) -> Tensor:  # (B, D)
        B, N, _ = x_BNC.shape
        if mask_BN is None:
            mask_BN = torch.ones(B, N, dtype=torch.bool, device=x_BNC.device)
        x_BNC = self.norm(x_BNC.masked_fill(~mask_BN[..., None], 0))
        weight_BN = mask_BN.to(x_BNC) / mask_BN.sum(1, keepdim=True).clamp(min=1)
        q_BH1d = self.q(torch.einsum("bn,bnc->bc", weight_BN, x_BNC)).view(B, 1, self.num_heads, -1).transpose(1, 2)
        k_BHNd, v_BHNd = self.kv(x_BNC).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out_BH1d = attend(q_BH1d, k_BHNd, v_BHNd, mask_BN)
        return self.out(out_BH1d.flatten(1))


class Positions(nn.Module):
    """Where on the map a pixel lies: a learned vector a place, added to what an attention reads (`unet.positions`).

    Convolutions know a place by the zero padding around the map alone. The table stands for maps of `side` x `side`;
    for others it is interpolated, so that images of any size can be trained and generated. It begins at zero.
    """

    def __init__(self, dim: int, side: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(side, side, dim))

    def forward(
        self,
        h: Tensor,  # (B, height * width, dim)
        height: int,
        width: int,
    ) -> Tensor:  # (B, height * width, dim)
        return h + self.of(height, width).to(h.dtype)

    def of(self, height: int, width: int) -> Tensor:
        """The vectors of a map of that size, (height * width, dim)."""
        table = self.table
        if tuple(table.shape[:2]) != (height, width):
            maps = table.permute(2, 0, 1).unsqueeze(0).float()
            maps = F.interpolate(maps, (height, width), mode="bicubic", align_corners=False)
            table = maps.squeeze(0).permute(1, 2, 0).to(table.dtype)
        return table.flatten(0, 1)
