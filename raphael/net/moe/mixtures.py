"""RAPHAEL's two mixtures of experts (arXiv 2305.18295, section 3.1) and the gate that both share.

    Space-MoE   out = 1/n_y * sum_i e_{route(y_i)}( h o M_hat_i )      every text token i picks an expert for its region
    Time-MoE    out = te_{t_router(t)}( h )                            every timestep picks an expert for the whole map

Letters of the shape suffixes: B samples, P pixels of the map, N text tokens, K experts, D width of the map,
F hidden width of an expert, C width of what a gate reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.net.layers import gelu
from raphael.net.moe.experts import Activation, ExpertBank, ExpertsPlan, feed_forward
from raphael.net.moe.gate import Gate, GateGradient, Routing

__all__ = ["Gate", "GateGradient", "ExpertBank", "Routing", "SpaceMoE", "TimeMoE", "gelu", "region_mask"]

Choice = tuple[Tensor, Tensor, Tensor]  # what a gate returns: expert, probability, weight


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

    activation: Activation = "gelu"  # of the experts

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
        if not 0 <= mask_threshold <= 1:
            raise ValueError(f"mask_threshold: got {mask_threshold}, expected 0 to 1, a share of the largest attention")
        self.gate = Gate(context_dim, num_experts, gate_hidden, gate_noise, gate_gradient)
        self.experts = ExpertBank(dim, num_experts, expansion, self.activation)
        self.mask_threshold = mask_threshold
        self.plan: ExpertsPlan = "auto"  # how experts are computed (raphael/net/moe/experts.py); never what comes out

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        context: Tensor,  # (B, N, C)
        attention: Tensor,  # (B, P, N) after softmax, averaged over heads
        context_mask: Tensor | None = None,  # (B, N) bool
        *,
        noise: Tensor | None = None,  # (B, N, K)
        choice: Choice | None = None,  # self.gate(context), where the caller has it from an earlier step
    ) -> tuple[Tensor, Routing]:
        """The MoE term alone (the residual stands outside), shape (B, P, D), and what was routed where.

        context_mask None: all N tokens count and the divisor is N, as in the paper; else the divisor is each sample's
        number of unmasked tokens (a sample without any gets a term of 0). A token without attention anywhere has an
        empty mask and adds e_k(0), or nothing where context_mask leaves it out. An expert nobody chose gets a gradient
        of zero. eval() means no gate noise.

        A NaN is never hidden: one in h makes its pixel NaN, one in the attention or the encoding of a token that counts
        makes its sample NaN. What a masked token holds does not matter. Raises ValueError on shapes that do not fit.
        """
        self._check(h, context, attention, context_mask)
        B, _, N = attention.shape
        real_BN = context_mask if context_mask is not None else attention.new_ones((B, N), dtype=torch.bool)
        expert_BN, probability_BNK, weight_BN = self.gate(context, noise) if choice is None else choice
        weight_BN = weight_BN.masked_fill(~real_BN, 0)

        attention = attention.detach()
        if context_mask is not None:
            attention = attention.masked_fill(~context_mask.unsqueeze(1), 0)
        peak_B1N = attention.amax(dim=1, keepdim=True)
        weight_BN = weight_BN + 0 * peak_B1N.squeeze(1).to(weight_BN)  # NaN where a token's attention is
        mask_BPN = region_mask(attention, self.mask_threshold, peak_B1N)
        route_BNK = F.one_hot(expert_BN, self.gate.num_experts) * weight_BN.unsqueeze(-1)
        divisor_B11 = real_BN.sum(-1).clamp(min=1).view(B, 1, 1)
        inside_BPK = (mask_BPN.to(route_BNK) @ route_BNK) / divisor_B11  # c_k(p) / n
        total_B1K = route_BNK.sum(1, keepdim=True) / divisor_B11  # n_k / n

        out = self.experts.weighted_sum(h, inside_BPK, total_B1K - inside_BPK, self.plan)
        cover_B = (inside_BPK.detach() > 0).sum(-1).float().mean(-1)
        return out, Routing(expert_BN, probability_BNK, real_BN, cover_B)

    def _check(self, h: Tensor, context: Tensor, attention: Tensor, context_mask: Tensor | None) -> None:
        dim = self.experts.w1.shape[-1]
        if h.dim() != 3 or h.shape[-1] != dim:
            raise ValueError(f"h: got shape {tuple(h.shape)}, expected (B, P, D) = (B, P, {dim})")
        if context.dim() != 3 or context.shape[0] != h.shape[0] or context.shape[-1] != self.gate.dim:
            want = (h.shape[0], "N", self.gate.dim)
            raise ValueError(
                f"context: got shape {tuple(context.shape)}, expected (B, N, C) = ({want[0]}, N, {want[2]})"
            )
        want = (h.shape[0], h.shape[1], context.shape[1])
        if tuple(attention.shape) != want:
            raise ValueError(f"attention: got shape {tuple(attention.shape)}, expected (B, P, N) = {want}")
        check_context_mask(context_mask, context)


def check_context_mask(context_mask: Tensor | None, context: Tensor) -> None:
    """Raises ValueError unless the mask is None, or bool and (B, N) for a context (B, N, C)."""
    if context_mask is None:
        return
    want = tuple(context.shape[:2])
    if tuple(context_mask.shape) != want:
        raise ValueError(f"context_mask: got shape {tuple(context_mask.shape)}, expected (B, N) = {want}")
    if context_mask.dtype != torch.bool:
        raise ValueError(f"context_mask: got {context_mask.dtype}, expected torch.bool, True on tokens that count")


def region_mask(attention: Tensor, threshold: float, peak: Tensor | None = None) -> Tensor:
    """M_hat (section 3.1): attention (B, P, N) -> (B, P, N) bool, where M >= threshold * max over pixels, and M > 0.

    peak (B, 1, N): the maximum over pixels, where the caller has it.
    """
    peak = attention.amax(dim=1, keepdim=True) if peak is None else peak
    return (attention >= threshold * peak) & (attention > 0)


class TimeMoE(nn.Module):
    """Time-MoE (section 3.1): t_router(t) = argmax( softmax(G'(E'(t))) + eps ); one expert for the whole map."""

    activation: Activation = "gelu"  # of the experts

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
        self.experts = ExpertBank(dim, num_experts, expansion, self.activation)

    def forward(
        self,
        h: Tensor,  # (B, P, D)
        time_embedding: Tensor,  # (B, C)
        *,
        noise: Tensor | None = None,  # (B, K)
    ) -> tuple[Tensor, Routing]:
        """The MoE term alone, (B, P, D), and the routing. Raises ValueError on shapes that do not fit.

        An expert nobody chose gets a gradient of zero. A NaN in h makes its pixel NaN, one in a
        time embedding its sample.
        """
        dim = self.experts.w1.shape[-1]
        if h.dim() != 3 or h.shape[-1] != dim:
            raise ValueError(f"h: got shape {tuple(h.shape)}, expected (B, P, D) = (B, P, {dim})")
        want = (h.shape[0], self.gate.dim)
        if tuple(time_embedding.shape) != want:
            raise ValueError(f"time_embedding: got shape {tuple(time_embedding.shape)}, expected (B, C) = {want}")
        expert_B, probability_BK, weight_B = self.gate(time_embedding, noise)
        out = self._one_each(h, expert_B)
        everyone_B = torch.ones_like(expert_B, dtype=torch.bool)
        return out * weight_B.view(-1, 1, 1).to(out), Routing(expert_B, probability_BK, everyone_B)

    def _one_each(self, h: Tensor, expert_B: Tensor) -> Tensor:
        """te_{expert_b}(h_b): samples sorted by expert, one pass for each that was chosen."""
        experts = self.experts.experts()
        if h.is_meta:  # no values, only shapes and costs: any expert will do
            return feed_forward(h, experts[0])
        counts = torch.bincount(expert_B, minlength=self.gate.num_experts).tolist()
        used = [k for k, count in enumerate(counts) if count]
        if len(used) == 1:  # in sampling always: the whole batch shares t
            return feed_forward(h, experts[used[0]])
        order_B = expert_B.argsort(stable=True)
        parts = h[order_B].split([counts[k] for k in used])
        groups = [feed_forward(part, experts[k]) for part, k in zip(parts, used, strict=True)]
        return torch.cat(groups)[order_B.argsort()] if groups else torch.zeros_like(h)


class GatedSpaceMoE(SpaceMoE):
    """With experts as Stable Diffusion's feed-forward is: geglu."""

    activation = "geglu"


class GatedTimeMoE(TimeMoE):
    """With experts as Stable Diffusion's feed-forward is: geglu."""

    activation = "geglu"
