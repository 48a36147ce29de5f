"""Samplers: functions over a Denoiser. x = x_0 + sigma eps throughout; sigmas (steps + 1,) fall to 0.

noise(i) gives the standard normal of step i, shaped as x: the caller draws it per image, so that an image does not
depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from raphael.diffusion.denoiser import Denoiser, TextCondition

SamplerName = Literal["ddpm", "ddim", "dpmpp_2m"]
NoiseFn = Callable[[int], Tensor]


def sample(
    name: SamplerName,
    denoiser: Denoiser,
    start: Tensor,
    sigmas: Tensor,
    cond: TextCondition,
    noise: NoiseFn,
) -> Tensor:
    """Draw latents (B, C, h, w) from `start`, standard normal of that shape. Raises ValueError on an unknown name."""
    functions = {"ddpm": _ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
    if name not in functions:
        raise ValueError(f"sampler: got {name!r}, expected one of {', '.join(functions)}")
    # the variance-preserving x_T is standard normal; in these coordinates it is sqrt(1 + sigma_T^2) times that
    return functions[name](denoiser, start * float((1 + sigmas[0] ** 2).sqrt()), sigmas, cond, noise)


def ddim(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn, eta: float = 0.0
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): eta = 0 deterministic, eta = 1 the variances of DDPM's posterior.

    In these coordinates: x' = x_0 + sqrt(s'^2 - up^2) / s (x - x_0) + up z,   up = eta s' sqrt(1 - s'^2 / s^2).
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        up = eta * following * max(0.0, 1 - (following / sigma) ** 2) ** 0.5
        x = x0 + (following**2 - up**2) ** 0.5 / sigma * (x - x0)
        if up > 0:
            x = x + up * noise(i)
    return x


def _ddpm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) with the posterior's variance."""
    return ddim(denoiser, x, sigmas, cond, noise, eta=1.0)


def dpmpp_2m(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), lambda = -log sigma; first order at both ends."""
    previous, previous_h = None, 0.0
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if following == 0.0:
            return x0
        h = torch.log(torch.tensor(sigma / following, dtype=torch.float64)).item()
        estimate = x0
        if previous is not None:
            ratio = h / (2 * previous_h)
            estimate = (1 + ratio) * x0 - ratio * previous
        x = following / sigma * x + (1 - following / sigma) * estimate
        previous, previous_h = x0, h
    return x


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, device=x.device, dtype=torch.float64)
