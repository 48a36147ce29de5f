"""Edge-supervised learning (RAPHAEL, section 3.2): P_theta(M), convolutions from an attention map to edges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EdgeHead(nn.Module):
    """num_layers 3x3 convolutions (the paper's example: 5) on the cross-attention map, one channel a token.

    The map is multiplied by the number of tokens first: after the softmax its entries are near 1/N.
    """

    def __init__(self, context_length: int, channels: int, num_layers: int):
        super().__init__()
        widths = [context_length] + [channels] * (num_layers - 1) + [1]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(
        self,
        attention: Tensor,  # (B, P, N)
        height: int,
        width: int,
    ) -> Tensor:  # (B, 1, height, width) logits
        B, _, N = attention.shape
        x = (attention * N).mT.reshape(B, N, height, width).to(self.convs[0].weight.dtype)
        for conv in self.convs[:-1]:
            x = F.gelu(conv(x))
        return self.convs[-1](x)


def focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """FL = -a_t (1 - p_t)^gamma log p_t (arXiv 1708.02002, eq. 5), element by element, for targets in [0, 1].

    A soft target y is the mixture y FL(1) + (1-y) FL(0); a_t is alpha for edges, 1 - alpha for the rest. float32.
    """
    logits, target = logits.float(), target.float()
    p = torch.sigmoid(logits)
    positive = -alpha * (1 - p) ** gamma * F.logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-logits)
    return target * positive + (1 - target) * negative
