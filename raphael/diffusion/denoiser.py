"""The Denoiser seam: D(x, sigma, cond) -> estimate of x_0, with x = x_0 + sigma eps.

Samplers are functions over it; guidance and thresholding are wrappers that compose. A network is wrapped into one here.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from raphael.diffusion.prediction import Prediction, about, variance_preserving
from raphael.diffusion.schedule import Noise
from raphael.net.condition import Condition


class Denoiser(Protocol):
    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """x (B, C, h, w) = x_0 + sigma eps, sigma (B,) -> estimate of x_0 (B, C, h, w).

        Where sigma is infinite, x is eps itself, the limit of x / sigma: nothing of x_0 is in it.
        """


class NetworkDenoiser:
    """A network as a Denoiser, whatever it predicts (raphael/diffusion/prediction.py has the formulas).

    Raises ValueError for a prediction of eps where the schedule ends in pure noise, at infinite sigma.
    `collect` is called with every UNetOutput (attention maps, routes) when given.
    """

    def __init__(self, unet: nn.Module, schedule: Noise, prediction: Prediction, collect=None):
        if prediction.blind and schedule.zero_terminal_snr:
            raise ValueError("prediction: got eps with zero_terminal_snr, expected v: pure noise holds nothing of x_0")
        self.unet, self.schedule, self.prediction, self.collect = unet, schedule, prediction, collect

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        sigma_ = sigma.view(-1, 1, 1, 1).to(x)
        timestep = self.schedule.timestep(sigma)
        prediction = about(self.prediction, cond)
        given = prediction.network_input(*variance_preserving(x, sigma_))
        if cond.hooks is not None:
            cond = cond.at(sigma, 1 - timestep / (self.schedule.num_steps - 1))
        output = self.unet(given, timestep, cond, collect=self.collect is not None)
        if self.collect is not None:
            self.collect(output)
        return prediction.estimate(output.prediction, x, sigma_)
