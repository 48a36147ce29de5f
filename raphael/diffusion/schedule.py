"""The noise schedule: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t = 0 .. T-1.

(RAPHAEL's printed forward equation swaps the two roots; its reverse step uses this convention. See docs/paper.md.)
The samplers work in variance-exploding coordinates x_0 + sigma eps, sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raphael.preset import DiffusionConfig


class Schedule:
    """alpha_bar (T,) and sigma (T,), float64, increasing noise.

    With zero_terminal_snr alpha_bar ends in 0 and sigma in infinity: x_{T-1} is the noise, v there is -x_0.
    """

    def __init__(self, config: DiffusionConfig):
        self.num_steps = config.num_steps
        self.zero_terminal_snr = config.zero_terminal_snr
        self.alpha_bar = torch.cumprod(1 - _betas(config), dim=0)
        if self.zero_terminal_snr:
            self.alpha_bar = zero_terminal(self.alpha_bar)
        self.sigma = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for x0 and noise (B, ...) and timesteps t (B,) int."""
        signal, spread = self._roots(t, x0)
        return signal * x0 + spread * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, arXiv 2202.00512)."""
        signal, spread = self._roots(t, x0)
        return signal * noise - spread * x0

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep of a noise level: sigma (B,) -> t (B,), linear in log sigma, clamped.

        Where the schedule ends in infinite sigma, its last interval is linear in sqrt(alpha_bar) instead.
        """
        log_sigmas = self.sigma.log().to(sigma.device)
        log_sigma = sigma.double().log().clamp(log_sigmas[0], log_sigmas[-1])
        high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, self.num_steps - 1)
        low = high - 1
        share = (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
        if self.zero_terminal_snr:
            root = (1 + sigma.double() ** 2).rsqrt()  # sqrt(alpha_bar): 0 at infinite sigma
            last = 1 - root / self.alpha_bar[-2].sqrt().to(sigma.device)
            share = torch.where(high == self.num_steps - 1, last, share)
        return (low + share).float()

    def sigma_bounds(self, low: float, high: float) -> tuple[float, float]:
        """The noise levels of the timesteps t with low <= t / (T-1) <= high, both shares in [0, 1].

        Share 0 is sigma 0 and share 1 is infinite: nothing lies beyond the ends.
        """
        last = self.num_steps - 1
        first_t, last_t = math.ceil(low * last), math.floor(high * last)
        return (
            0.0 if low <= 0 else float(self.sigma[first_t]),
            math.inf if high >= 1 else float(self.sigma[last_t]),
        )

    def sampling_sigmas(self, steps: int) -> Tensor:
        """(steps + 1,) float64, from sigma_{T-1} down to 0, at timesteps equally spaced from T-1 ("trailing").

        Trailing spacing starts at the largest noise, which the starting noise has (arXiv 2305.08891, table 2).
        Raises ValueError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps: got {steps}, expected 1 to {self.num_steps}, the steps of the trained schedule")
        index = torch.arange(steps, dtype=torch.float64) * (self.num_steps / steps)
        t = (self.num_steps - index).round().long() - 1
        return torch.cat([self.sigma[t], torch.zeros(1, dtype=torch.float64)])

    def _roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(t.device)[t].view(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)


def zero_terminal(alpha_bar: Tensor) -> Tensor:
    """alpha_bar (T,) moved so that its last value is exactly 0 (arXiv 2305.08891, algorithm 1).

    sqrt(alpha_bar) is shifted to end in 0, then scaled to keep its first value.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _betas(config: DiffusionConfig) -> Tensor:
    T, start, end = config.num_steps, config.beta_start, config.beta_end
    if config.schedule == "linear":  # DDPM, arXiv 2006.11239
        return torch.linspace(start, end, T, dtype=torch.float64)
    if config.schedule == "scaled_linear":  # latent diffusion: linear in sqrt(beta)
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    # Nichol & Dhariwal, arXiv 2102.09672, eq. 17: alpha_bar(t) = cos^2((t/T + 0.008) / 1.008 * pi/2), betas capped
    t = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
