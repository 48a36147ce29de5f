"""Attention, and its two explicit hooks (raphael/net/condition.py): absent, nothing is asked of them.

Present, every row is computed as without them, and then the rows that they act on once more, with them: a row that no
hook sees keeps its bytes.

Letters of the shape suffixes: B samples, H heads, P pixels (queries), N keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.net.condition import AttentionHooks, AttentionSite, Condition, HookCall, Step

Joined = Literal["mean_of_heads", "max_of_heads"]


@dataclass(frozen=True)
class ActiveHooks:
    """A condition's hooks for one forward pass."""

    hooks: AttentionHooks
    places: Tensor  # (R,) int64, on the device: rows of the batch that they act on
    rows: Tensor  # (R,) int64, on the CPU: which rows of the hooked condition those are
    step: Step | None
    conditional: Tensor  # (R,) bool, on the CPU: not guidance's null rows

    @classmethod
    def of(cls, condition: Condition, batch_size: int, device: torch.device) -> ActiveHooks | None:
        """None where there are no hooks, or none of the rows is theirs."""
        if condition.hooks is None:
            return None
        hooked = torch.arange(batch_size) if condition.hooked is None else condition.hooked
        places = (hooked >= 0).nonzero().flatten()
        if not len(places):
            return None
        marks = torch.ones(batch_size, dtype=torch.bool) if condition.conditional is None else condition.conditional
        return cls(condition.hooks, places.to(device), hooked[places], condition.step, marks[places])

    def add_bias(self, site: AttentionSite, scores: Tensor) -> Tensor:
        return scores if self.hooks.bias is None else scores + self.hooks.bias(self._call(site), scores)

    def edited(self, site: AttentionSite, probabilities: Tensor) -> Tensor:
        return probabilities if self.hooks.edit is None else self.hooks.edit(self._call(site), probabilities)

    def _call(self, site: AttentionSite) -> HookCall:
        sigma, progress = (self.step.sigma, self.step.progress) if self.step is not None else (None, None)
        return HookCall(site, self.rows, sigma, progress, self.conditional)


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
        hooks: ActiveHooks | None = None,  # of them `edit`
    ) -> Tensor:  # (B, P, D)
        B, P, D = h.shape
        q, k, v = self.qkv(h).view(B, P, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, P, D/H)
        if P > SMALL_MAP_PIXELS or h.device.type != "cpu":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self._map(q, k).to(v.dtype) @ v
        if hooks is not None and hooks.hooks.edit is not None:
            rows = hooks.places
            edited = hooks.edited(site, self._map(q[rows], k[rows])).to(v.dtype) @ v[rows]
            out = out.index_copy(0, rows, edited)
        return self.out(out.transpose(1, 2).reshape(B, P, D))

    @staticmethod
    def _map(q_BHPd: Tensor, k_BHPd: Tensor) -> Tensor:
        return torch.softmax(q_BHPd @ k_BHPd.mT * q_BHPd.shape[-1] ** -0.5, dim=-1)


class JointAttention(nn.Module):
    """Self-attention whose keys and values are the map's and, behind them, the text's: one softmax over both (ADM's
    attention as Imagen's base has it, arXiv 2205.11487, 2.3). No hook acts on it: its map is neither kind's.
    """

    def __init__(self, dim: int, context_dim: int, head_dim: int):
        super().__init__()
        self.num_heads = dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        context: Tensor,  # (B, N, C)
        context_mask: Tensor | None,  # (B, N) bool, False: no attention to this token
        hooks: ActiveHooks | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,  # of `context`, where the caller has them from before
    ) -> Tensor:  # (B, P, D)
        if hooks is not None:
            raise ValueError("hooks: got some, expected none: with joined_text a map is of pixels and words at once")
        B, P, D = h.shape
        q, k, v = self.qkv(h).view(B, P, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, P, D/H)
        k_BHNd, v_BHNd = self.keys_values(context) if keys_values is None else keys_values
        mask = None
        if context_mask is not None:
            mask = torch.cat([context_mask.new_ones(B, P), context_mask], dim=1)
        out = attend(q, torch.cat([k, k_BHNd.to(k)], dim=2), torch.cat([v, v_BHNd.to(v)], dim=2), mask)
        return self.out(out.transpose(1, 2).reshape(B, P, D))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a context (B, N, C), each (B, H, N, D/H)."""
        B, N, _ = context.shape
        keys, values = self.kv(context).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return keys, values


class CrossAttention(nn.Module):
    """M = softmax(Q K^T / sqrt(d)), out = M V; Q from the map, K and V from the text (RAPHAEL, section 2).

    The map M is returned, its heads' mean, or their maximum (joined): Space-MoE cuts its regions from it, the edge
    head learns on it. Where nobody reads it (need_map False) it is not formed, nor kept for the backward pass.
    """

    def __init__(self, dim: int, context_dim: int, head_dim: int, joined: Joined = "mean_of_heads"):
        super().__init__()
        self.num_heads, self.joined = dim // head_dim, joined
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        context: Tensor,  # (B, N, C)
        context_mask: Tensor | None,  # (B, N) bool, False: no attention to this token
        site: AttentionSite,
        hooks: ActiveHooks | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,  # of `context`, where the caller has them from before
        need_map: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # (B, P, D), M (B, P, N)
        """A sample whose tokens are all masked attends to nothing: its M is 0 everywhere, its out the bias."""
        B, P, D = h.shape
        q_BHPd = self.q(h).view(B, P, self.num_heads, -1).transpose(1, 2)
        k_BHNd, v_BHNd = self.keys_values(context) if keys_values is None else keys_values
        map_BHPN = None
        if need_map:
            map_BHPN, v_BHNd = _cross_map(q_BHPd, k_BHNd, context_mask), _counted(v_BHNd, context_mask)
            out = map_BHPN.to(v_BHNd) @ v_BHNd
        else:
            out = attend(q_BHPd, k_BHNd, v_BHNd, context_mask)
        if hooks is not None:
            rows = hooks.places
            mask = None if context_mask is None else context_mask[rows]
            edited = _cross_map(q_BHPd[rows], k_BHNd[rows], mask, lambda scores: hooks.add_bias(site, scores))
            edited = hooks.edited(site, edited)
            values = _counted(v_BHNd[rows], mask)
            out = out.index_copy(0, rows, (edited.to(values) @ values).to(out))
            map_BHPN = None if map_BHPN is None else map_BHPN.index_copy(0, rows, edited.to(map_BHPN))
        out = self.out(out.transpose(1, 2).reshape(B, P, D))
        if map_BHPN is None:
            return out, None
        map_BPN = map_BHPN.mean(1) if self.joined == "mean_of_heads" else map_BHPN.amax(1)
        return out, map_BPN if context_mask is None else map_BPN.masked_fill(~context_mask[:, None, :], 0)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a context (B, N, C), each (B, H, N, D/H)."""
        B, N, _ = context.shape
        keys, values = self.kv(context).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return keys, values


def _cross_map(
    q_BHPd: Tensor,
    k_BHNd: Tensor,
    context_mask: Tensor | None,  # (B, N)
    biased: Callable[[Tensor], Tensor] | None = None,  # of scores (B, H, P, N)
) -> Tensor:  # (B, H, P, N) float32
    scores_BHPN = q_BHPd @ k_BHNd.mT * q_BHPd.shape[-1] ** -0.5
    if biased is not None:
        scores_BHPN = biased(scores_BHPN)
    if context_mask is not None:
        # the lowest finite number: a row of -inf would be NaN where a sample has no token at all
        lowest = torch.finfo(scores_BHPN.dtype).min
        scores_BHPN = scores_BHPN.masked_fill(~context_mask[:, None, None, :], lowest)
    return torch.softmax(scores_BHPN.float(), dim=-1)


def _counted(v_BHNd: Tensor, context_mask: Tensor | None) -> Tensor:
    """0 at masked tokens, whatever they hold."""
    return v_BHNd if context_mask is None else v_BHNd.masked_fill(~context_mask[:, None, :, None], 0)


def attend(q_BHPd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, context_mask: Tensor | None) -> Tensor:
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
