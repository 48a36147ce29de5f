"""The Denoiser seam: D(x, sigma, cond) -> estimate of x_0, with x = x_0 + sigma eps.

Samplers are functions over it; guidance and thresholding are wrappers that compose. A network that predicts eps or v is
wrapped into one here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from raphael.diffusion.schedule import Schedule


@dataclass(frozen=True)
class TextCondition:
    """What the network reads of the captions."""

    context: Tensor  # (B, N, D)
    mask: Tensor  # (B, N) bool, True on real tokens

    def concat(self, other: TextCondition) -> TextCondition:
        return TextCondition(torch.cat([self.context, other.context]), torch.cat([self.mask, other.mask]))

    def expand(self, batch_size: int) -> TextCondition:
        """One condition for a whole batch."""
        return TextCondition(self.context.expand(batch_size, -1, -1), self.mask.expand(batch_size, -1))


class Denoiser(Protocol):
    def __call__(self, x: Tensor, sigma: Tensor, cond: TextCondition) -> Tensor:
        """x (B, C, h, w) = x_0 + sigma eps, sigma (B,) -> estimate of x_0 (B, C, h, w).

        Where sigma is infinite, x is eps itself, the limit of x / sigma: nothing of x_0 is in it.
        """


class NetworkDenoiser:
    """An eps- or v-predicting network as a Denoiser.

    The network sees x_vp = x / sqrt(1 + sigma^2); x_0 = x - sigma eps, or x_0 = (x_vp - sigma v) / sqrt(1 + sigma^2).
    At infinite sigma x_vp = x = eps and x_0 = -v; a schedule that ends there asks for v. Raises ValueError otherwise.
    `collect` is called with every UNetOutput (attention maps, routes) when given.
    """

    def __init__(self, unet: nn.Module, schedule: Schedule, prediction: Literal["eps", "v"], collect=None):
        if prediction == "eps" and schedule.zero_terminal_snr:
            raise ValueError("prediction: got eps with zero_terminal_snr, expected v: pure noise holds nothing of x_0")
        self.unet, self.schedule, self.prediction, self.collect = unet, schedule, prediction, collect

    def __call__(self, x: Tensor, sigma: Tensor, cond: TextCondition) -> Tensor:
        sigma_ = sigma.view(-1, 1, 1, 1).to(x)
        pure = torch.isinf(sigma_)  # the products below would be 0 * inf there
        c_in = torch.where(pure, 1.0, (1 + sigma_**2).rsqrt())
        timestep = self.schedule.timestep(sigma)
        output = self.unet(x * c_in, timestep, cond.context, cond.mask, collect=self.collect is not None)
        if self.collect is not None:
            self.collect(output)
        if self.prediction == "eps":
            return x - sigma_ * output.prediction
        x_vp, spread = torch.where(pure, 0.0, x * c_in), torch.where(pure, 1.0, sigma_)
        return c_in * (x_vp - spread * output.prediction)
