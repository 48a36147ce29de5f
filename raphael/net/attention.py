"""Attention with its two explicit hooks: `bias` (an added score, paint-with-words) and `edit` (map -> map,
prompt-to-prompt, recording). Both None on the fast path.

Letters of the shape suffixes: B samples, H heads, P pixels (queries), N keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSite:
    """Where in the network an attention map arises."""

    kind: Literal["self", "cross"]
    block: int  # transformer blocks are counted in the order of the forward pass
    height: int
    width: int


MaskSource = Literal["mean_of_heads", "max_of_heads"]
AttentionBias = Callable[[AttentionSite, Tensor], Tensor]  # scores (B, H, P, N) -> what is added to them
AttentionEdit = Callable[[AttentionSite, Tensor], Tensor]  # probabilities (B, H, P, N) -> probabilities


# On a CPU torch's fused kernel takes 5 x as long as the plain products for small maps (bf16, backward, 64 pixels)
SMALL_MAP_PIXELS = 256


class SelfAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        site: AttentionSite,
        edit: AttentionEdit | None = None,
    ) -> Tensor:  # (B, P, D)
        B, P, D = h.shape
        q, k, v = self.qkv(h).view(B, P, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, P, D/H)
        if edit is None and (P > SMALL_MAP_PIXELS or h.device.type != "cpu"):
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            probabilities = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
            out = (probabilities if edit is None else edit(site, probabilities)).to(v.dtype) @ v
        return self.out(out.transpose(1, 2).reshape(B, P, D))


class CrossAttention(nn.Module):
    """M = softmax(Q K^T / sqrt(d)), out = M V; Q from the map, K and V from the text (RAPHAEL, section 2).

    The map M is returned, its heads' mean, or their maximum (mask_source): Space-MoE cuts its regions from it, the edge
    head learns on it. Where nobody reads it (need_map False) it is not formed, nor kept for the backward pass, unless
    a hook asks for scores.
    """

    def __init__(self, dim: int, context_dim: int, head_dim: int, mask_source: MaskSource = "mean_of_heads"):
        super().__init__()
        self.num_heads, self.mask_source = dim // head_dim, mask_source
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        context: Tensor,  # (B, N, C)
        context_mask: Tensor | None,  # (B, N) bool, False: no attention to this token
        site: AttentionSite,
        bias: AttentionBias | None = None,
        edit: AttentionEdit | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,  # of `context`, where the caller has them from before
        need_map: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # (B, P, D), M (B, P, N)
        """A sample whose tokens are all masked attends to nothing: its M is 0 everywhere, its out the bias."""
        B, P, D = h.shape
        q_BHPd = self.q(h).view(B, P, self.num_heads, -1).transpose(1, 2)
        k_BHNd, v_BHNd = self.keys_values(context) if keys_values is None else keys_values
        if not need_map and bias is None and edit is None:
            out = _attend(q_BHPd, k_BHNd, v_BHNd, context_mask)
            return self.out(out.transpose(1, 2).reshape(B, P, D)), None
        scores_BHPN = q_BHPd @ k_BHNd.mT * q_BHPd.shape[-1] ** -0.5
        if bias is not None:
            scores_BHPN = scores_BHPN + bias(site, scores_BHPN)
        if context_mask is not None:
            # the lowest finite number: a row of -inf would be NaN where a sample has no token at all
            lowest = torch.finfo(scores_BHPN.dtype).min
            scores_BHPN = scores_BHPN.masked_fill(~context_mask[:, None, None, :], lowest)
            v_BHNd = v_BHNd.masked_fill(~context_mask[:, None, :, None], 0)
        map_BHPN = torch.softmax(scores_BHPN.float(), dim=-1)
        if edit is not None:
            map_BHPN = edit(site, map_BHPN)
        out = (map_BHPN.to(v_BHNd) @ v_BHNd).transpose(1, 2).reshape(B, P, D)
        map_BPN = map_BHPN.mean(1) if self.mask_source == "mean_of_heads" else map_BHPN.amax(1)
        return self.out(out), map_BPN if context_mask is None else map_BPN.masked_fill(~context_mask[:, None, :], 0)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a context (B, N, C), each (B, H, N, D/H)."""
        B, N, _ = context.shape
        keys, values = self.kv(context).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return keys, values


def _attend(q_BHPd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, context_mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v -> (B, H, P, d) over the tokens of the mask (B, N); 0 where it leaves none."""
    score_B11N = None
    if context_mask is not None:
        out_of_it = ~context_mask[:, None, :, None]  # 0, so that what a masked token holds (NaN too) does not matter
        k_BHNd, v_BHNd = k_BHNd.masked_fill(out_of_it, 0), v_BHNd.masked_fill(out_of_it, 0)
        lowest = torch.finfo(q_BHPd.dtype).min
        score_B11N = torch.zeros_like(context_mask, dtype=q_BHPd.dtype).masked_fill(~context_mask, lowest)
        score_B11N = score_B11N[:, None, None, :]
    if torch.is_grad_enabled() and q_BHPd.device.type == "cpu":
        # over 77 tokens the backward pass of torch's fused kernel takes 1.5 to 3 x as long as these products (bf16)
        scores = (q_BHPd * q_BHPd.shape[-1] ** -0.5) @ k_BHNd.mT
        return torch.softmax(scores if score_B11N is None else scores + score_B11N, dim=-1) @ v_BHNd
    return F.scaled_dot_product_attention(q_BHPd, k_BHNd, v_BHNd, attn_mask=score_B11N)
