"""The gate that both mixtures share, and what it chose (RAPHAEL, arXiv 2305.18295, section 3.1).

Letters of the shape suffixes: B samples, N text tokens, K experts, C width of what a gate reads.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GateGradient = Literal["straight_through", "none"]


@dataclass
class Routing:
    """What a gate chose. T below is N (Space-MoE: one choice a token) or absent (Time-MoE: one choice a sample)."""

    expert: Tensor  # (B, T) or (B,) int64, the chosen expert
    probability: Tensor  # (B, T, K) or (B, K) float32, softmax of the gate without noise and without balance bias
    chosen: Tensor  # (B, T) or (B,) bool: False where the token is left out of the mean
    cover: Tensor | None = None  # (B,) float32, Space-MoE: experts needed per pixel, averaged over the map

    def load(self) -> Tensor:
        """(K,) float32: share of the choices that fell on each expert; sums to 1 (all zero if nothing was chosen)."""
        return self.counts() / self.chosen.sum().clamp(min=1)

    def counts(self) -> Tensor:
        """(K,) float32: number of the choices that fell on each expert."""
        one_hot = F.one_hot(self.expert, self.probability.shape[-1]).float() * self.chosen.unsqueeze(-1)
        return one_hot.flatten(0, -2).sum(0)

    def entropy(self) -> Tensor:
        """(B,) float32, mean over a sample's tokens of -sum_k p_k log p_k / log K: 1 undecided, 0 certain."""
        num_experts = self.probability.shape[-1]
        if num_experts == 1:
            return self.probability.new_zeros(len(self.probability))
        entropy = torch.special.entr(self.probability).sum(-1) / math.log(num_experts)
        if entropy.dim() == 1:
            return entropy
        weight = self.chosen.float() / self.chosen.sum(-1, keepdim=True).clamp(min=1)
        return (weight * entropy).sum(-1)

    def balance_loss(self) -> Tensor:
        """(B,) Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4) K * sum_k f_k P_k of each sample's tokens.

        Per sample and not per batch, so that it does not depend on how a batch is split. 1 when balanced, K at worst.
        """
        assert self.expert.dim() == 2, "the loss is over a sample's tokens"
        weight = self.chosen.float() / self.chosen.sum(-1, keepdim=True).clamp(min=1)
        one_hot = F.one_hot(self.expert, self.probability.shape[-1]).float()
        frequency = torch.einsum("bn,bnk->bk", weight, one_hot)
        mean_probability = torch.einsum("bn,bnk->bk", weight, self.probability)
        return self.probability.shape[-1] * (frequency * mean_probability).sum(-1)


class Gate(nn.Module):
    """route(y) = argmax( softmax(G(y)) + eps ), G a feed-forward net with GELU; eps only in training (section 3.1).

    The argmax of the paper gives G no gradient. With gate_gradient="straight_through" every chosen contribution is
    multiplied by `weight` = exp(log_p - sg(log_p)), log_p the noiseless log-probability of the chosen expert and sg
    "stop gradient": exactly 1 in the forward, so the output is the paper's; in the backward it gives G the gradient
    d log_p. "none" is the paper to the letter: G keeps its initial values.

    balance_bias (K,), a buffer saved with the weights, is added to the probabilities for the choice alone (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2). It is zero, and stays so, unless a training moves it (`rebalance`).
    """

    balance_bias: Tensor

    def __init__(self, dim: int, num_experts: int, hidden: float, noise: float, gradient: GateGradient):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts: got {num_experts}, expected at least 1")
        if dim < 1 or not hidden > 0:
            raise ValueError(f"gate: got width {dim} and gate_hidden {hidden}, expected both above 0")
        if not noise >= 0:
            raise ValueError(f"gate_noise: got {noise}, expected at least 0")
        if gradient not in get_args(GateGradient):
            raise ValueError(f"gate_gradient: got {gradient!r}, expected one of {', '.join(get_args(GateGradient))}")
        width = max(1, round(dim * hidden))
        self.net = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, num_experts))
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.dim = dim
        self.num_experts = num_experts
        self.noise = noise
        self.gradient = gradient

    def forward(self, y: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y (..., C) -> expert (...) int64, probability (..., K) float32, weight (...) float32, value 1.

        noise: standard normal (..., K); drawn here when None in training, ignored in eval mode. It is an argument
        because noise drawn inside a recomputed (activation-checkpointed) block would differ between the two passes.
        A NaN in y gives the weight NaN, in either mode of the gradient: it is not swallowed by the argmax.
        """
        if noise is not None and noise.shape != (*y.shape[:-1], self.num_experts):
            raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(*y.shape[:-1], self.num_experts)}")
        log_p = F.log_softmax(self.logits(y), dim=-1)
        probability = log_p.exp()
        score = probability.detach() + self.balance_bias
        if self.training and self.noise > 0:
            score = score + self.noise * (torch.randn_like(score) if noise is None else noise.to(score))
        expert = score.argmax(-1)
        chosen_log_p = log_p.gather(-1, expert.unsqueeze(-1)).squeeze(-1)
        if self.gradient == "none":
            return expert, probability.detach(), 1 + 0 * chosen_log_p.detach()
        return expert, probability, torch.exp(chosen_log_p - chosen_log_p.detach())

    def route(self, y: Tensor) -> Tensor:
        """y (..., C) -> (...) int64: the expert chosen without noise, what eval mode does."""
        return (F.log_softmax(self.logits(y), dim=-1).exp() + self.balance_bias).argmax(-1)

    def logits(self, y: Tensor) -> Tensor:
        """G(y) (..., C) -> (..., K), float32 or wider whatever the weights are stored in.

        In bf16 two experts' probabilities tie within 1/256, and the argmax would depend on the kernel.
        """
        first, act, last = self.net
        wide = torch.promote_types(torch.float32, first.weight.dtype)
        apart = torch.autocast(y.device.type, enabled=False) if not y.is_meta else contextlib.nullcontext()
        with apart:  # from autocast, which the meta device does not know
            hidden = act(F.linear(y.to(wide), first.weight.to(wide), first.bias.to(wide)))
            return F.linear(hidden, last.weight.to(wide), last.bias.to(wide))

    @torch.no_grad()
    def rebalance(self, counts: Tensor, rate: float) -> None:
        """b_k += rate * sign(mean load - load_k): experts with too many choices get a lower bias, no gradient involved.

        counts (K,): choices of the whole batch, over all workers.
        """
        self.balance_bias += rate * torch.sign(counts.mean() - counts).to(self.balance_bias)
