"""The printed formulas of RAPHAEL's section 3.1, token by token and sample by sample: slow, obvious, the truth."""

import torch
from torch import Tensor

from raphael.net.moe.mixtures import SpaceMoE, TimeMoE


def gelu(x: Tensor) -> Tensor:
    """Hendrycks & Gimpel (arXiv 1606.08415): x times the normal distribution's share below x."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def space_moe(moe: SpaceMoE, h: Tensor, context: Tensor, attention: Tensor, context_mask: Tensor | None) -> Tensor:
    """out = 1/n_y sum_i e_{route(y_i)}( h o M_hat_i ), each term times its gate weight (value 1)."""
    out = []
    for b in range(len(h)):
        terms = []
        for i in range(context.shape[1]):
            if context_mask is not None and not context_mask[b, i]:
                continue
            log_p = torch.log_softmax(moe.gate.net(context[b, i]), dim=-1)
            k = int(log_p.argmax())
            m = attention[b, :, i].detach()
            inside = ((m >= moe.mask_threshold * m.max()) & (m > 0)).to(h).unsqueeze(-1)
            e = gelu((h[b] * inside) @ moe.experts.w1[k].T + moe.experts.b1[k])
            weight = 1.0
            if moe.gate.gradient == "straight_through":
                weight = torch.exp(log_p[k] - log_p[k].detach())
            terms.append(weight * (e @ moe.experts.w2[k].T + moe.experts.b2[k]))
        out.append(sum(terms) / max(1, len(terms)) if terms else torch.zeros_like(h[b]))
    return torch.stack(out)


def time_moe(moe: TimeMoE, h: Tensor, time_embedding: Tensor) -> Tensor:
    """out = te_{argmax G'(t)}( h ), one expert a sample."""
    out = []
    for b in range(len(h)):
        log_p = torch.log_softmax(moe.gate.net(time_embedding[b]), dim=-1)
        k = int(log_p.argmax())
        e = gelu(h[b] @ moe.experts.w1[k].T + moe.experts.b1[k])
        out.append(torch.exp(log_p[k] - log_p[k].detach()) * (e @ moe.experts.w2[k].T + moe.experts.b2[k]))
    return torch.stack(out)
