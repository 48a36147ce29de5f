"""Noise as a protocol, and the discrete schedule.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t = 0 .. T-1.

(RAPHAEL's printed forward equation swaps the two roots; its reverse step uses this convention. See docs/paper.md.)
The samplers work in variance-exploding coordinates x_0 + sigma eps, sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from raphael.base.config.preset import DiffusionConfig


class Noise(ABC):
    """A family of noise levels, told as timesteps t from 0 (the cleanest) to T-1 to the network, as sigma to samplers.

    zero_terminal_snr: at T-1 there is no signal: sigma is infinite there. All that follows needs no more than these.
    """

    num_steps: int  # T
    zero_terminal_snr: bool

    @abstractmethod
    def timesteps(self, u: Tensor) -> Tensor:
        """The timesteps of training: u (B,) uniform in [0, 1) -> (B,), rising with u."""

    @abstractmethod
    def alpha_bar_at(self, t: Tensor) -> Tensor:
        """The share of signal 1 / (1 + sigma^2) at timesteps t (B,) -> (B,) float64."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep of a noise level: sigma (B,) -> t (B,) float32, clamped to [0, T-1]."""

    @abstractmethod
    def sigma_at(self, t: Tensor) -> Tensor:
        """Of `timestep` the inverse: t (B,) in [0, T-1], whole or between -> sigma (B,) float64."""

    @abstractmethod
    def sampling_sigmas(self, steps: int) -> Tensor:
        """(steps + 1,) float64, falling from the largest noise to 0. Raises ValueError unless steps fit."""

    @abstractmethod
    def sigma_bounds(self, low: float, high: float) -> tuple[float, float]:
        """The noise levels of the timesteps t with low <= t / (T-1) <= high, both shares in [0, 1].

        Share 0 is sigma 0 and share 1 is infinite: nothing lies beyond the ends.
        """

    def roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, spread) at t (B,), signal^2 + spread^2 = 1, shaped to multiply `like` (B, ...)."""
        alpha_bar = self.alpha_bar_at(t).view(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = signal x_0 + spread eps for x0 and noise (B, ...) and timesteps t (B,)."""
        signal, spread = self.roots(t, x0)
        return signal * x0 + spread * noise


class Schedule(Noise):
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

    def timesteps(self, u: Tensor) -> Tensor:
        """Every timestep alike: floor(u T), int64."""
        return (u * self.num_steps).long().clamp(max=self.num_steps - 1)

    def alpha_bar_at(self, t: Tensor) -> Tensor:
        return self.alpha_bar.to(t.device)[t]

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

    def sigma_at(self, t: Tensor) -> Tensor:
        t, sigma = t.double(), self.sigma.to(t.device)
        low = t.long().clamp(0, self.num_steps - 2)
        share = t - low
        between = (sigma[low].log() * (1 - share) + sigma[low + 1].log() * share).exp()
        if self.zero_terminal_snr:
            root = self.alpha_bar[-2].sqrt() * (1 - share)
            between = torch.where(low == self.num_steps - 2, (root**-2 - 1).clamp(min=0).sqrt(), between)
        return torch.where(share == 0, sigma[low], torch.where(share == 1, sigma[low + 1], between))

    def sigma_bounds(self, low: float, high: float) -> tuple[float, float]:
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


FAST27 = (10, 10, 3, 2, 2)  # steps in each fifth of the timesteps, from clean to noisy


def section_timesteps(counts: tuple[int, ...], num_steps: int) -> list[int]:
    """Rising timesteps: as many as `counts` says in each of len(counts) equal sections of 0 to num_steps - 1, from the
    section's first to its last, equally spaced and rounded (half to even); of a count of 1 its first. Where num_steps
    is no multiple, the first sections are longer by one (guided-diffusion's `space_timesteps`, 2105.05233).

    Raises ValueError where a section is shorter than its count.
    """
    length, longer = divmod(num_steps, len(counts))
    found, first = [], 0
    for number, count in enumerate(counts):
        size = length + (number < longer)
        if size < count:
            raise ValueError(f"spacing: got {count} steps for {size} timesteps, expected at most as many")
        stride = (size - 1) / max(1, count - 1)
        found += [first + round(stride * step) for step in range(count)]
        first += size
    return found


def fast27_timesteps(num_steps: int) -> list[int]:
    """The 27 of GLIDE's upsampler (its release's `fast27`): FAST27, but T - 3 in the place of T - 1, where an error of
    DDIM's first step is largest. Rising."""
    return [*section_timesteps(FAST27, num_steps)[:-1], num_steps - 3]


def spaced_sigmas(noise: Noise, spacing: str, steps: int) -> Tensor:
    """(steps + 1,) float64, falling to 0. spacing: trailing, which is the noise's own way, or fast27."""
    if spacing == "trailing":
        return noise.sampling_sigmas(steps)
    t = torch.tensor(fast27_timesteps(noise.num_steps)[::-1])
    return torch.cat([noise.sigma_at(t).double(), torch.zeros(1, dtype=torch.float64)])


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
    if config.schedule != "cosine":
        raise ValueError(f"schedule: got {config.schedule}, expected linear, scaled_linear or cosine: it has no betas")
    # Nichol & Dhariwal, arXiv 2102.09672, eq. 17: alpha_bar(t) = cos^2((t/T + 0.008) / 1.008 * pi/2), betas capped
    t = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
