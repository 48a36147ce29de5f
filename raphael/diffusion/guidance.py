"""Guidance: denoiser -> denoiser wrappers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raphael.diffusion.denoiser import Denoiser, TextCondition


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """D = D(x; null) + s (D(x; c) - D(x; null)) (Ho & Salimans, arXiv 2207.12598, with s = 1 + w).

    On x_0 estimates this equals guidance on eps: the two differ by an affine map. Both branches run as one batch.
    scale 1 needs no second branch; 0 is unconditional. null: the empty caption, batch of 1.
    """

    denoiser: Denoiser
    scale: float
    null: TextCondition

    def __call__(self, x: Tensor, sigma: Tensor, cond: TextCondition) -> Tensor:
        if self.scale == 1.0:
            return self.denoiser(x, sigma, cond)
        null = self.null.expand(len(x))
        if self.scale == 0.0:
            return self.denoiser(x, sigma, null)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond.concat(null))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)
