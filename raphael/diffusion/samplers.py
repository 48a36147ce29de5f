"""Samplers: functions over a Denoiser. x = x_0 + sigma eps throughout; sigmas (steps + 1,) fall to 0.

In these coordinates the probability-flow ODE is dx/dsigma = (x - x_0(x, sigma)) / sigma (Karras et al., arXiv
2206.00364, eq. 1 and 3 with sigma(t) = t). Every sampler below is a way to step along it; ddpm, and ddim with eta > 0,
also add fresh noise.

| name | source | order | network evaluations in n steps |
| ddpm | arXiv 2006.11239, algorithm 2 | stochastic | n |
| ddim | arXiv 2010.02502, eq. 12 and 16 | 1 | n |
| euler | arXiv 2206.00364, algorithm 1 without its correction: the same numbers as ddim with eta 0 | 1 | n |
| heun | arXiv 2206.00364, algorithm 1 without churn | 2 | 2 n - 1 |
| dpmpp_2m | arXiv 2211.01095, algorithm 2 | 2 | n |
| unipc | arXiv 2302.04867, UniPC-2 with B_2(h), multistep, predicting x_0 | 3 | n |

noise(i) gives the standard normal of step i, shaped as x: the caller draws it per image, so that an image does not
depend on its neighbours in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from raphael.config import SamplerName
from raphael.diffusion.denoiser import Denoiser, TextCondition

NoiseFn = Callable[[int], Tensor]


def sample(
    name: SamplerName,
    denoiser: Denoiser,
    start: Tensor,
    sigmas: Tensor,
    cond: TextCondition,
    noise: NoiseFn,
    eta: float = 0.0,
) -> Tensor:
    """Draw latents (B, C, h, w) from `start`, standard normal of that shape.

    eta: of ddim alone. sigmas may begin with infinity, where a schedule has no signal left (zero terminal SNR).
    Raises ValueError on an unknown name, and on an eta other than 0 for a sampler that has none.
    """
    functions = {"ddpm": _ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "unipc": unipc}
    if name not in functions:
        raise ValueError(f"sampler: got {name!r}, expected one of {', '.join(functions)}")
    if eta and name != "ddim":
        raise ValueError(f"eta: got {eta:g} with sampler {name}, expected 0: only ddim has it")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta:g}, expected a number from 0 (deterministic) to 1 (the noise of ddpm)")
    options = {"eta": eta} if name == "ddim" else {}
    if math.isinf(sigmas[0]):
        x = _leave_pure_noise(denoiser, start, float(sigmas[1]), cond, noise, eta=1.0 if name == "ddpm" else eta)
        return functions[name](denoiser, x, sigmas[1:], cond, lambda i: noise(i + 1), **options)
    # the variance-preserving x_T is standard normal; in these coordinates it is sqrt(1 + sigma_T^2) times that
    return functions[name](denoiser, start * float((1 + sigmas[0] ** 2).sqrt()), sigmas, cond, noise, **options)


def _leave_pure_noise(
    denoiser: Denoiser, eps: Tensor, following: float, cond: TextCondition, noise: NoiseFn, eta: float
) -> Tensor:
    """The limit of DDIM's step as sigma goes to infinity: x' = x_0 + sqrt(s'^2 - up^2) eps + up z, with up = eta s'.

    Every sampler takes this step there. Euler's is the same; Heun's second slope and the memory of the multistep ones
    (whose weight falls with the distance in log sigma) say nothing across an infinite step, so they begin after it.
    """
    x0 = denoiser(eps, _per_sample(math.inf, eps), cond)
    up = eta * following
    x = x0 + (following**2 - up**2) ** 0.5 * eps
    return x + up * noise(0) if up > 0 else x


def ddim(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn, eta: float = 0.0
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): eta = 0 deterministic, eta = 1 the variances of DDPM's posterior.

    In these coordinates: x' = x_0 + sqrt(s'^2 - up^2) / s (x - x_0) + up z,   up = eta s' sqrt(1 - s'^2 / s^2).
    """
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        up = eta * following * max(0.0, 1 - (following / sigma) ** 2) ** 0.5
        x = x0 + (following**2 - up**2) ** 0.5 / sigma * (x - x0)
        if up > 0:
            x = x + up * noise(i)
    return x


def _ddpm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) with the posterior's variance."""
    return ddim(denoiser, x, sigmas, cond, noise, eta=1.0)


def euler(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """x' = x + (s' - s) (x - x_0) / s. DDIM with eta 0 in other words (arXiv 2010.02502, section 4.3)."""
    for sigma, following in _steps(sigmas):
        x = x + (following - sigma) * _slope(denoiser, x, sigma, cond)
    return x


def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """Karras et al., arXiv 2206.00364, algorithm 1: the mean of the slopes at both ends of an Euler step.

    The last step stays Euler's: the slope has no value at sigma = 0.
    """
    for sigma, following in _steps(sigmas):
        slope = _slope(denoiser, x, sigma, cond)
        ahead = x + (following - sigma) * slope
        if following > 0:
            ahead = x + (following - sigma) * (slope + _slope(denoiser, ahead, following, cond)) / 2
        x = ahead
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), lambda = -log sigma; first order at both ends."""
    previous, previous_h = None, 0.0
    for sigma, following in _steps(sigmas):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if following == 0.0:
            return x0
        h = _log_ratio(sigma, following)
        x = following / sigma * x + (1 - following / sigma) * _extrapolated(x0, previous, h, previous_h)
        previous, previous_h = x0, h
    return x


def unipc(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: TextCondition, noise: NoiseFn) -> Tensor:
    """UniPC-2 (arXiv 2302.04867, section 3, for x_0 prediction and B_2(h)), first order at both ends.

    Its predictor, with the weight 1/2 that the paper allows at order 2, is the step of DPM-Solver++(2M). Before each
    prediction the corrector takes the last step again, now knowing x_0 at its end, which raises the order to 3; the
    network is not asked again there, so a step costs one evaluation.
    """
    before, before_h, last = None, 0.0, None  # `last`: x, x_0, sigma and h of the last step, corrected
    for sigma, following in _steps(sigmas):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if following == 0.0:
            return x0
        previous, previous_h = None, 0.0
        if last is not None:
            last_x, previous, last_sigma, previous_h = last
            ratio = sigma / last_sigma
            x = ratio * last_x + (1 - ratio) * _corrected(x0, previous, before, previous_h, before_h)
        h = _log_ratio(sigma, following)
        before, before_h, last = previous, previous_h, (x, x0, sigma, h)
        x = following / sigma * x + (1 - following / sigma) * _extrapolated(x0, previous, h, previous_h)
    return x


def _extrapolated(x0: Tensor, previous: Tensor | None, h: float, previous_h: float) -> Tensor:
    """x_0 half a step h of log sigma ahead, on the line through this estimate and the previous one."""
    if previous is None:
        return x0
    ratio = h / (2 * previous_h)
    return (1 + ratio) * x0 - ratio * previous


def _corrected(end: Tensor, start: Tensor, before: Tensor | None, h: float, before_h: float) -> Tensor:
    """UniC's mean of x_0 over a step of length h in lambda = -log sigma, weighted by e^lambda as the ODE's integral is.

    end, start, before: x_0 at the step's end, at its start, and before_h earlier (None: order 1, weight 1/2).
    The weights solve rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2 with r = -before_h / h: the quadratic in lambda
    through the three estimates is integrated exactly.
    """
    if before is None:
        return start + (end - start) / 2
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    r = -before_h / h
    rho_1 = (b_2 - b_1) / (r - 1)
    return start + rho_1 / r * (before - start) + (b_1 - rho_1) * (end - start)


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    """(sigma, following sigma) of every step. The functions above know finite sigmas only; `sample` knows infinity."""
    values = sigmas.tolist()
    assert math.isfinite(values[0]), values[0]
    return list(zip(values[:-1], values[1:], strict=True))


def _slope(denoiser: Denoiser, x: Tensor, sigma: float, cond: TextCondition) -> Tensor:
    return (x - denoiser(x, _per_sample(sigma, x), cond)) / sigma


def _log_ratio(sigma: float, following: float) -> float:
    return torch.log(torch.tensor(sigma / following, dtype=torch.float64)).item()


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, device=x.device, dtype=torch.float64)
