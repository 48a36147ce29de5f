"""RAPHAEL's two mixtures of experts (arXiv 2305.18295, section 3.1) and the gate that both share.

    Space-MoE   out = 1/n_y * sum_i e_{route(y_i)}( h o M_hat_i )      every text token i picks an expert for its region
    Time-MoE    out = te_{t_router(t)}( h )                            every timestep picks an expert for the whole map

Letters of the shape suffixes: B samples, P pixels of the map, N text tokens, K experts, D width of the map,
F hidden width of an expert, C width of what a gate reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """GELU, by its tanh form: within 5e-4 of x Phi(x), and three times as fast on a CPU."""
    return F.gelu(x, approximate="tanh")


GateGradient = Literal["straight_through", "none"]


@dataclass
class Routing:
    """What a gate chose. T below is N (Space-MoE: one choice a token) or absent (Time-MoE: one choice a sample)."""

    expert: Tensor  # (B, T) or (B,) int64, the chosen expert
    probability: Tensor  # (B, T, K) or (B, K) float32, softmax of the gate without noise
    chosen: Tensor  # (B, T) or (B,) bool: False where the token is left out of the mean
    cover: Tensor | None = None  # (B,) float32, Space-MoE: experts needed per pixel, averaged over the map

    def load(self) -> Tensor:
        """(K,) float32: share of the choices that fell on each expert; sums to 1 (all zero if nothing was chosen)."""
        one_hot = F.one_hot(self.expert, self.probability.shape[-1]).float() * self.chosen.unsqueeze(-1)
        return one_hot.flatten(0, -2).sum(0) / self.chosen.sum().clamp(min=1)

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
    """

    def __init__(self, dim: int, num_experts: int, hidden: float, noise: float, gradient: GateGradient):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts: got {num_experts}, expected at least 1")
        width = max(1, round(dim * hidden))
        self.net = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, num_experts))
        self.num_experts = num_experts
        self.noise = noise
        self.gradient = gradient

    def forward(self, y: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y (..., C) -> expert (...) int64, probability (..., K) float32, weight (...) float32, value 1.

        noise: standard normal (..., K); drawn here when None in training, ignored in eval mode. It is an argument
        because noise drawn inside a recomputed (activation-checkpointed) block would differ between the two passes.
        """
        log_p = F.log_softmax(self.logits(y), dim=-1)
        probability = log_p.exp()
        score = probability.detach()
        if self.training and self.noise > 0:
            score = score + self.noise * (torch.randn_like(score) if noise is None else noise.to(score))
        expert = score.argmax(-1)
        if self.gradient == "none":
            return expert, probability.detach(), torch.ones_like(score[..., 0])
        chosen_log_p = log_p.gather(-1, expert.unsqueeze(-1)).squeeze(-1)
        return expert, probability, torch.exp(chosen_log_p - chosen_log_p.detach())

    def logits(self, y: Tensor) -> Tensor:
        """G(y) (..., C) -> (..., K), float32 or wider whatever the weights are stored in.

        In bf16 two experts' probabilities tie within 1/256, and the argmax would depend on the kernel.
        """
        first, act, last = self.net
        wide = torch.promote_types(torch.float32, first.weight.dtype)
        with torch.autocast(y.device.type, enabled=False):
            hidden = act(F.linear(y.to(wide), first.weight.to(wide), first.bias.to(wide)))
            return F.linear(hidden, last.weight.to(wide), last.bias.to(wide))


class ExpertBank(nn.Module):
    """K feed-forward nets e_k(h) = W2_k gelu(W1_k h + b1_k) + b2_k of one shape, their weights stacked along K."""

    def __init__(self, dim: int, num_experts: int, expansion: float):
        super().__init__()
        hidden = round(dim * expansion)
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.zeros(num_experts, dim))
        for weight in (self.w1, self.w2):  # as nn.Linear: uniform in +- 1/sqrt(fan_in)
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def expert(self, k: int, h: Tensor) -> Tensor:
        """e_k(h), h (..., D) -> (..., D)."""
        return F.linear(gelu(F.linear(h, self.w1[k], self.b1[k])), self.w2[k], self.b2[k])

    def at_zero(self) -> Tensor:
        """(K, D): e_k(0), what an expert adds where its token's mask is 0."""
        return torch.einsum("kf,kdf->kd", gelu(self.b1), self.w2) + self.b2

    def weighted_sum(self, h_BPD: Tensor, weight_BPK: Tensor) -> Tensor:
        """sum_k weight_k(p) e_k(h_p) -> (B, P, D), as two wide matrix products.

        The weight multiplies the hidden layer, so that the second product's accumulator does the sum over experts.
        An expert whose weight is zero everywhere gets a gradient of exactly zero, and no rank waits for it.
        """
        B, P, _ = h_BPD.shape
        K, hidden, dim = self.w1.shape
        a = gelu(F.linear(h_BPD, self.w1.reshape(K * hidden, dim), self.b1.reshape(-1)))  # (B, P, K F)
        a = (a.view(B, P, K, hidden) * weight_BPK.unsqueeze(-1).to(a)).view(B, P, K * hidden)
        out = F.linear(a, self.w2.permute(1, 0, 2).reshape(dim, K * hidden))  # (B, P, D)
        return out + (weight_BPK.to(out) @ self.b2.to(out))


class SpaceMoE(nn.Module):
    """Space-MoE (section 3.1): each text token sends the region it attends to through the expert its gate picks.

        M_hat_i(p) = 1 if M_i(p) >= alpha max_q M_i(q) else 0        (and 0 where M_i is 0 everywhere)
        out        = 1/n sum_i e_{route(y_i)}( h o M_hat_i )

    Computed exactly without a loop over tokens: an expert acts per pixel, so its value is e_k(h_p) inside the mask and
    e_k(0) outside. With c_k(p) = sum_{i: route(i)=k} M_hat_i(p) and n_k = #{i: route(i)=k},

        out(p) = 1/n sum_k [ c_k(p) e_k(h_p) + (n_k - c_k(p)) e_k(0) ]

    which costs K evaluations a pixel instead of n. Counts become sums of the gate's weights (value 1), which carry its
    gradient; masks are binary and carry none. The identity needs pointwise experts: no convolution, no GroupNorm.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_experts: int,
        expansion: float = 4,
        mask_threshold: float = 0.2,
        gate_hidden: float = 1.0,
        gate_noise: float = 0.0,
        gate_gradient: GateGradient = "straight_through",
    ):
        super().__init__()
        self.gate = Gate(context_dim, num_experts, gate_hidden, gate_noise, gate_gradient)
        self.experts = ExpertBank(dim, num_experts, expansion)
        self.mask_threshold = mask_threshold

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        context: Tensor,  # (B, N, C)
        attention: Tensor,  # (B, P, N) after softmax, averaged over heads
        context_mask: Tensor | None = None,  # (B, N) bool
        *,
        noise: Tensor | None = None,  # (B, N, K)
    ) -> tuple[Tensor, Routing]:
        """The MoE term alone (the residual stands outside), shape (B, P, D), and what was routed where.

        context_mask None: all N tokens count and the divisor is N, as in the paper; else the divisor is each sample's
        number of unmasked tokens. A token without attention anywhere has an empty mask and adds e_k(0).
        Raises ValueError on shapes that do not fit.
        """
        self._check(h, context, attention, context_mask)
        B, _, N = attention.shape
        real_BN = context_mask if context_mask is not None else attention.new_ones((B, N), dtype=torch.bool)
        expert_BN, probability_BNK, weight_BN = self.gate(context, noise)

        mask_BPN = region_mask(attention.detach(), self.mask_threshold)
        route_BNK = F.one_hot(expert_BN, self.gate.num_experts) * (weight_BN * real_BN).unsqueeze(-1)
        divisor_B11 = real_BN.sum(-1).clamp(min=1).view(B, 1, 1)
        inside_BPK = (mask_BPN.to(route_BNK) @ route_BNK) / divisor_B11  # c_k(p) / n
        total_B1K = route_BNK.sum(1, keepdim=True) / divisor_B11  # n_k / n

        out = self.experts.weighted_sum(h, inside_BPK)
        out = out + ((total_B1K - inside_BPK).to(out) @ self.experts.at_zero().to(out))
        cover_B = (inside_BPK.detach() > 0).sum(-1).float().mean(-1)
        return out, Routing(expert_BN, probability_BNK, real_BN, cover_B)

    def _check(self, h: Tensor, context: Tensor, attention: Tensor, context_mask: Tensor | None) -> None:
        want = (h.shape[0], h.shape[1], context.shape[1])
        if tuple(attention.shape) != want:
            raise ValueError(f"attention: got shape {tuple(attention.shape)}, expected (B, P, N) = {want}")
        if context_mask is not None and tuple(context_mask.shape) != tuple(context.shape[:2]):
            want = tuple(context.shape[:2])
            raise ValueError(f"context_mask: got shape {tuple(context_mask.shape)}, expected (B, N) = {want}")


def region_mask(attention: Tensor, threshold: float) -> Tensor:
    """M_hat (section 3.1): attention (B, P, N) -> (B, P, N) bool, where M >= threshold * max over pixels, and M > 0."""
    return (attention >= threshold * attention.amax(dim=1, keepdim=True)) & (attention > 0)


class TimeMoE(nn.Module):
    """Time-MoE (section 3.1): t_router(t) = argmax( softmax(G'(E'(t))) + eps ); one expert for the whole map."""

    def __init__(
        self,
        dim: int,
        time_dim: int,
        num_experts: int,
        expansion: float = 4,
        gate_hidden: float = 1.0,
        gate_noise: float = 0.0,
        gate_gradient: GateGradient = "straight_through",
    ):
        super().__init__()
        self.gate = Gate(time_dim, num_experts, gate_hidden, gate_noise, gate_gradient)
        self.experts = ExpertBank(dim, num_experts, expansion)

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        time_embedding: Tensor,  # (B, C)
        *,
        noise: Tensor | None = None,  # (B, K)
    ) -> tuple[Tensor, Routing]:
        """The MoE term alone, (B, P, D), and the routing. Raises ValueError on shapes that do not fit."""
        if time_embedding.shape[0] != h.shape[0]:
            raise ValueError(f"time_embedding: got {time_embedding.shape[0]} samples, expected {h.shape[0]}")
        expert_B, probability_BK, weight_B = self.gate(time_embedding, noise)
        order_B = expert_B.argsort(stable=True)
        counts = torch.bincount(expert_B, minlength=self.gate.num_experts).tolist()
        # an expert nobody chose sees an empty batch: its gradient is zero and present, so DDP never waits for it
        groups = [self.experts.expert(k, part) for k, part in enumerate(h[order_B].split(counts))]
        out = torch.cat(groups)[order_B.argsort()]
        everyone_B = torch.ones_like(expert_B, dtype=torch.bool)
        return out * weight_B.view(-1, 1, 1).to(out), Routing(expert_B, probability_BK, everyone_B)
