"""Noise that is continuous in sigma: EDM's, rectified flow's, and Imagen's cosine. All tell the network a real timestep
in [0, T-1].

The samplers' coordinates stay x = x_0 + sigma eps. What rectified flow holds, (1 - time) x_0 + time eps, is
(1 - time) x with sigma = time / (1 - time); a step of Euler along its straight lines is then the step of `euler`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raphael.base.config.preset import DiffusionConfig
from raphael.diffusion.schedule import Noise, Schedule


class _Continuous(Noise):
    """Timesteps and noise levels as functions of each other."""

    def alpha_bar_at(self, t: Tensor) -> Tensor:
        return 1 / (1 + self.sigma_at(t) ** 2)

    def roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma_at(t).view(-1, *[1] * (like.dim() - 1))
        signal = (1 + sigma**2).rsqrt()
        spread = (1 + sigma**-2).rsqrt()  # not the root of 1 - signal^2, which loses small sigmas; 1 at infinity
        return signal.to(like.dtype), spread.to(like.dtype)

    def sigma_bounds(self, low: float, high: float) -> tuple[float, float]:
        ends = self.sigma_at(torch.tensor([low, high], dtype=torch.float64) * (self.num_steps - 1)).tolist()
        return (0.0 if low <= 0 else ends[0], math.inf if high >= 1 else ends[1])


class EdmNoise(_Continuous):
    """Karras et al., arXiv 2206.00364, table 1. t is linear in log sigma, as its c_noise = log(sigma) / 4 is.

    Training: log sigma is normal; what falls outside [sigma_min, sigma_max] (2 in 100,000 at their numbers) moves to
    the end, so that the network never sees a time that sampling cannot ask for.
    """

    zero_terminal_snr = False

    def __init__(self, config: DiffusionConfig):
        self.num_steps, self.settings = config.num_steps, config.edm
        self.low, self.high = math.log(config.edm.sigma_min), math.log(config.edm.sigma_max)

    def timesteps(self, u: Tensor) -> Tensor:
        """Quantiles u of the log-normal distribution; (B,) float32."""
        log_sigma = self.settings.log_sigma_mean + self.settings.log_sigma_std * torch.special.ndtri(u.double())
        return self._time(log_sigma)

    def sigma_at(self, t: Tensor) -> Tensor:
        return (self.low + t.double() / (self.num_steps - 1) * (self.high - self.low)).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return self._time(sigma.double().log())

    def sampling_sigmas(self, steps: int) -> Tensor:
        """Equation 5: equal steps of sigma^(1 / rho) from sigma_max to sigma_min, then 0."""
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1")
        top, bottom = (end ** (1 / self.settings.rho) for end in (self.settings.sigma_max, self.settings.sigma_min))
        share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        sigmas = (top + share * (bottom - top)) ** self.settings.rho
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])

    def _time(self, log_sigma: Tensor) -> Tensor:
        share = (log_sigma.clamp(self.low, self.high) - self.low) / (self.high - self.low)
        return (share * (self.num_steps - 1)).float()


class RectifiedFlow(_Continuous):
    """The straight line from data to noise (arXiv 2209.03003; arXiv 2403.03206).

    time = t / (T-1), sigma = time / (1 - time). At time 1 it is pure noise, so sigma is infinite. Training: time is
    logit-normal, or uniform.
    """

    zero_terminal_snr = True

    def __init__(self, config: DiffusionConfig):
        self.num_steps, self.settings = config.num_steps, config.rectified_flow

    def timesteps(self, u: Tensor) -> Tensor:
        """Quantiles u of the logit-normal distribution (arXiv 2403.03206, section 3.1); (B,) float32."""
        mean, std = self.settings.logit_mean, self.settings.logit_std
        time = u.double() if std == 0 else torch.sigmoid(mean + std * torch.special.ndtri(u.double()))
        return (time * (self.num_steps - 1)).float()

    def sigma_at(self, t: Tensor) -> Tensor:
        time = t.double() / (self.num_steps - 1)
        return time / (1 - time)

    def timestep(self, sigma: Tensor) -> Tensor:
        time = 1 / (1 + 1 / sigma.double())  # 1 at infinity
        return (time * (self.num_steps - 1)).float()

    def sampling_sigmas(self, steps: int) -> Tensor:
        """At equal steps of time from 1 to 0."""
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1")
        time = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        return time / (1 - time)


class CosineNoise(_Continuous):
    """alpha_bar(time) = cos^2((time + s) / (1 + s) pi / 2), time = t / (T-1) uniform in training: the cosine schedule
    of arXiv 2102.09672, eq. 17, in continuous time, as Imagen has it (arXiv 2205.11487, 2.1; appendix F).

    log SNR = -2 log tan((time + s) / (1 + s) pi / 2). At time 1 it is pure noise, so sigma is infinite. offset: s; with
    0, time 0 is the image itself: of noise conditioning augmentation (raphael/diffusion/cascade.py).
    """

    zero_terminal_snr = True

    def __init__(self, num_steps: int, offset: float = 0.008):
        self.num_steps, self.offset = num_steps, offset

    def timesteps(self, u: Tensor) -> Tensor:
        return u.float() * (self.num_steps - 1)

    def sigma_at(self, t: Tensor) -> Tensor:
        time = t.double() / (self.num_steps - 1)
        sigma = ((time + self.offset) / (1 + self.offset) * (math.pi / 2)).tan()
        return torch.where(time >= 1, math.inf, sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        time = sigma.double().atan() / (math.pi / 2) * (1 + self.offset) - self.offset
        return (time.clamp(0, 1) * (self.num_steps - 1)).float()

    def sampling_sigmas(self, steps: int) -> Tensor:
        """At equal steps of time from 1 to 0."""
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1")
        time = 1 - torch.arange(steps, dtype=torch.float64) / steps
        return torch.cat([self.sigma_at(time * (self.num_steps - 1)), torch.zeros(1, dtype=torch.float64)])

    def log_snr(self, t: Tensor) -> Tensor:
        """log (alpha_bar / (1 - alpha_bar)) at t (B,) -> (B,) float64."""
        return -2 * self.sigma_at(t).log()


def noise_of(config: DiffusionConfig) -> Noise:
    if config.schedule == "continuous_cosine":
        return CosineNoise(config.num_steps)
    continuous = {"edm": EdmNoise, "rectified_flow": RectifiedFlow}
    return continuous.get(config.schedule, Schedule)(config)
