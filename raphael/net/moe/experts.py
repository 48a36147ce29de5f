"""K feed-forward experts of one shape, and two ways to compute their weighted sum.

    sum_k inside_k(p) e_k(h_p) + outside_k(p) e_k(0),      e_k(h) = W2_k act(W1_k h + b1_k) + b2_k

act is gelu, the paper's, or geglu, Stable Diffusion's (arXiv 2002.05202): W1 h is then twice as wide as W2 reads, one
half the value and the other its gate, v * gelu(g).

fused     two wide matrix products over all pixels and all experts, the weights folded on the hidden layer: few
          kernels, nothing waits for the device. Cost: K evaluations a pixel.
covered   a loop over the experts, each on the pixels where its weight is not zero (gather, FFN, scatter). Cost: as many
          evaluations as the pixels need, the least that is possible for experts one knows nothing of, and less memory.
          In training its gradients are written by hand (raphael/net/moe/covered.py).

Letters of the shape suffixes: B samples, P pixels of the map, K experts, D width of the map, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.net.layers import activate
from raphael.net.memory import autocast_state, weights_version

ExpertsPlan = Literal["auto", "fused", "covered"]
Activation = Literal["gelu", "geglu"]


class ExpertBank(nn.Module):
    """K feed-forward nets e_k(h) = W2_k act(W1_k h + b1_k) + b2_k of one shape, their weights stacked along K."""

    decayed = ("w1", "w2")  # matrices that mix features: they have weight decay (raphael/train/optim/optimizer.py)

    def __init__(self, dim: int, num_experts: int, expansion: float, activation: Activation = "gelu"):
        super().__init__()
        hidden = round(dim * expansion)
        rows = 2 * hidden if activation == "geglu" else hidden
        if dim < 1 or num_experts < 1 or hidden < 1:
            raise ValueError(
                f"experts: got dim {dim}, num_experts {num_experts}, expansion {expansion}; expected at least 1 expert "
                "of width and hidden width (dim * expansion) at least 1"
            )
        self.w1 = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.b1 = nn.Parameter(torch.zeros(num_experts, rows))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.zeros(num_experts, dim))
        self._kept: list[Any] | None = None  # version, `experts()`, `_wide()`, `at_zero()`; None: nothing is kept
        for weight in (self.w1, self.w2):  # as nn.Linear: uniform in +- 1/sqrt(fan_in)
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def experts(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(W1, b1, W2, b2) of every expert, for `feed_forward`.

        Unbound together: one gradient of the stack is put together once, with zeros for an expert that was not used
        (so that no rank waits for it), where w1[k] would allocate a stack of zeros for every k.
        """
        return self._keep(0, lambda: list(zip(*(w.unbind() for w in self._cast()), strict=True)))

    def remember(self, keep: bool) -> None:
        """From here on (keep) or no longer: what the weights alone decide is made once and not at every step, namely
        the weights as autocast casts them and `_fused` lays them out, and e_k(0). What was made before is forgotten.

        Autocast keeps casts of leaves, and a slice of a stack is none. Bytes: half the bank's again in bfloat16.
        """
        self._kept = [None] * 4 if keep else None

    def _cast(self) -> tuple[Tensor, ...]:
        weights = (self.w1, self.b1, self.w2, self.b2)
        on = autocast_state(self.w1.device.type) if self._keeps() else None
        return weights if on is None or self.w1.dtype == torch.float64 else tuple(w.to(on[1]) for w in weights)

    def _wide(self) -> tuple[Tensor, ...]:
        """W1 (K F, D), b1 (K F), W2 (D, K F), b2 (K, D): the experts side by side; F of W1 doubled with geglu."""
        w1, b1, w2, b2 = self._cast()
        return w1.flatten(0, 1), b1.flatten(), w2.permute(1, 0, 2).flatten(1), b2

    def _keeps(self) -> bool:
        return self._kept is not None and not torch.is_grad_enabled() and not self.w1.is_meta

    def _keep(self, place: int, make: Callable[[], Any]) -> Any:
        if not self._keeps():
            return make()
        version = weights_version(self.parameters())
        version = version and (version, autocast_state(self.w1.device.type))
        if version is None or self._kept[0] != version:
            self._kept = [version, None, None, None]
        if self._kept[1 + place] is None or version is None:
            self._kept[1 + place] = make()
        return self._kept[1 + place]

    def at_zero(self) -> Tensor:
        """(K, D): e_k(0), what an expert adds where its token's mask is 0. It reads all of W2: hence `remember`."""
        return self._keep(2, self._compute_at_zero)

    def _compute_at_zero(self) -> Tensor:
        return torch.einsum("kf,kdf->kd", activate(self.b1, self.w2.shape[2]), self.w2) + self.b2

    def _apply(self, fn, recurse: bool = True):
        self._kept = self._kept and [None] * 4  # weights move: another place may be one that was seen before
        return super()._apply(fn, recurse)

    def weighted_sum(
        self, h_BPD: Tensor, inside_BPK: Tensor, outside_BPK: Tensor, plan: ExpertsPlan = "auto"
    ) -> Tensor:
        """sum_k inside_k(p) e_k(h_p) + outside_k(p) e_k(0) -> (B, P, D) by the named plan, or by the one that suits the
        shape and device.

        An expert whose weights are zero everywhere gets a gradient of exactly zero, and no rank waits for it.
        """
        if plan not in get_args(ExpertsPlan):
            raise ValueError(f"plan: got {plan!r}, expected one of {', '.join(get_args(ExpertsPlan))}")
        if plan == "auto":
            plan = choose_plan(h_BPD, self.w1.shape[1])
        if plan == "covered" and torch.is_grad_enabled():  # rows of the whole batch at once
            # not at the top: torch._dynamo comes with it, seconds that sampling does without
            from raphael.net.moe.covered import covered_sum

            rows = (tensor.flatten(0, 1) for tensor in (h_BPD, inside_BPK, outside_BPK))
            return covered_sum(*rows, (self.w1, self.b1, self.w2, self.b2)).view_as(h_BPD)
        out = self._fused(h_BPD, inside_BPK) if plan == "fused" else self._covered(h_BPD, inside_BPK)
        return out + (outside_BPK.to(out) @ self.at_zero().to(out))

    def _fused(self, h_BPD: Tensor, weight_BPK: Tensor) -> Tensor:
        """The weight multiplies the hidden layer, so the second product's accumulator does the sum over experts."""
        B, P, _ = h_BPD.shape
        K, _, hidden = self.w2.shape
        w1, b1, w2, b2 = self._keep(1, self._wide)
        a = activate(F.linear(h_BPD, w1, b1).view(B, P, K, -1), hidden)  # (B, P, K, F)
        a = (a * weight_BPK.unsqueeze(-1).to(a)).view(B, P, K * hidden)
        out = F.linear(a, w2)  # (B, P, D)
        return out + (weight_BPK.to(out) @ b2.to(out))

    def _covered(self, h_BPD: Tensor, weight_BPK: Tensor) -> Tensor:
        """For sampling: rows of one sample at a time, so that an image does not depend on its neighbours in the batch
        (a product's rounding may depend on its number of rows)."""
        experts = self.experts()
        samples = [self._covered_sample(experts, h, w) for h, w in zip(h_BPD, weight_BPK, strict=True)]
        return torch.stack(samples)

    def _covered_sample(self, experts: list[tuple[Tensor, ...]], h_PD: Tensor, weight_PK: Tensor) -> Tensor:
        out = None
        for k, needed in enumerate((weight_PK != 0).T):
            pixels = needed.nonzero().squeeze(1)
            if not len(pixels):
                continue
            everywhere = len(pixels) == len(h_PD)
            term = feed_forward(h_PD if everywhere else h_PD[pixels], experts[k])
            weight = weight_PK[:, k] if everywhere else weight_PK[pixels, k]
            term = term * weight.unsqueeze(1).to(term)
            if out is None:
                out = term if everywhere else term.new_zeros(h_PD.shape).index_add_(0, pixels, term)
            else:
                out = out + term if everywhere else out.index_add_(0, pixels, term)
        out = torch.zeros_like(h_PD) if out is None else out
        # 0 * h is 0, but NaN where h is NaN or infinite: as in the fused plan, no pixel hides it by being uncovered
        return out + (0 * h_PD).sum(1, keepdim=True).to(out)


def feed_forward(h: Tensor, expert: tuple[Tensor, ...]) -> Tensor:
    """W2 act(W1 h + b1) + b2, h (..., D) -> (..., D)."""
    w1, b1, w2, b2 = expert
    return F.linear(activate(F.linear(h, w1, b1), w2.shape[-1]), w2, b2)


def choose_plan(h_BPD: Tensor, hidden: int) -> Literal["fused", "covered"]:
    """By shape and device alone: a choice by the batch's routing would let an image depend on its neighbours."""
    if h_BPD.device.type != "cpu":
        return "fused"  # gathering asks the device for counts, K times a layer
    return "covered" if h_BPD.shape[1] * h_BPD.shape[2] * hidden >= COVERED_FROM else "fused"


COVERED_FROM = 1 << 22  # pixels x width x hidden width of a sample
