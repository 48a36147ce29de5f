"""Samplers: functions over a Denoiser. x = x_0 + sigma eps throughout; sigmas (steps + 1,) fall to 0.

In these coordinates the probability-flow ODE is dx/dsigma = (x - x_0(x, sigma)) / sigma (Karras et al., arXiv
2206.00364, eq. 1 and 3 with sigma(t) = t). Every sampler below is a way to step along it; ddpm, and ddim with eta > 0,
also add fresh noise.

| name | source |
| ddpm | arXiv 2006.11239, algorithm 2, with either variance of its section 3.2 |
| ddim | arXiv 2010.02502, eq. 12 and 16 |
| euler | arXiv 2206.00364, algorithm 1 without its correction: the same numbers as ddim with eta 0 |
| heun | arXiv 2206.00364, algorithm 1 without churn |
| dpmpp_2m | arXiv 2211.01095, algorithm 2 |
| unipc | arXiv 2302.04867, UniPC-2 with B_2(h), multistep, predicting x_0 |
| euler_ancestral | k-diffusion, at its eta of 1: the same numbers as ddpm with variance posterior |

SAMPLERS, at the end, says of each what is true of it; the tests hold each to its line. A new one: docs/extending.md.

noise(i) gives the standard normal of step i, shaped as x: the caller draws it per image, so that an image does not
depend on its neighbours in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raphael.base.config.sampling import OF_SAMPLERS, SamplerName, Sampling
from raphael.diffusion.denoiser import Denoiser
from raphael.net.condition import Condition

NoiseFn = Callable[[int], Tensor]
# (step, sigma, x, x_0): once a step, before x moves on, with the network's estimate there. x = x_0 + sigma eps; at
# infinite sigma it is eps. A true value ends the run: `sample` returns this x. Neither tensor may be written to.
Callback = Callable[[int, float, Tensor, Tensor], bool | None]


class Ended(Exception):  # noqa: N818  no error: a watcher ends the run at `x`
    """Raised by `Watch.moved`; `sample` returns x."""

    def __init__(self, x: Tensor):
        super().__init__("the run was ended by its watcher")
        self.x = x


class Watch:
    """What looks on at a run: called as a `Callback` with the estimate of each step, `moved` after each step.

    On its own it calls the callback and changes nothing.
    """

    def __init__(self, callback: Callback | None = None):
        self.callback = callback

    def __call__(self, step: int, sigma: float, x: Tensor, x0: Tensor) -> bool | None:
        return self.callback(step, sigma, x, x0) if self.callback else None

    def moved(self, step: int, x: Tensor) -> Tensor:
        """x (B, C, h, w) after the step, at the following noise level -> the x to go on from. May raise `Ended`."""
        return x


class _Later(Watch):
    """Of a run that began one step ago."""

    def __init__(self, watch: Watch):
        super().__init__(lambda step, *seen: watch(step + 1, *seen))
        self.watch = watch

    def moved(self, step: int, x: Tensor) -> Tensor:
        return self.watch.moved(step + 1, x)


UNWATCHED = Watch()


def watch_of(callback: Callback | Watch | None) -> Watch:
    return callback if isinstance(callback, Watch) else Watch(callback)


@dataclass(frozen=True)
class Sampler:
    """A sampler and what is true of it.

    steps: (denoiser, x, sigmas, cond, noise, watch) -> x at the last sigma; also the options that OF_SAMPLERS gives it.
    order: of its error in the length of a step on the probability-flow ODE; None where it adds noise.
    evaluations: of the network in n steps.
    fresh: (following sigma, options) -> deviation of the noise that it adds in a step from infinite sigma.
    """

    steps: Callable[..., Tensor]
    order: int | None
    evaluations: Callable[[int], int] = lambda n: n
    fresh: Callable[..., float] = lambda following: 0.0


def sample(
    how: Sampling,
    denoiser: Denoiser,
    start: Tensor,
    sigmas: Tensor,
    cond: Condition,
    noise: NoiseFn,
    callback: Callback | Watch | None = None,
) -> Tensor:
    """Generate latents (B, C, h, w) from `start`, standard normal of that shape.

    how: the sampler and its options; sigmas, guidance and thresholds are the caller's. sigmas may begin with infinity,
    where a schedule has no signal left (zero terminal SNR). callback: may look on and end the run (`Callback`).
    Raises ValueError on an unknown name.
    """
    if how.sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {how.sampler!r}, expected one of {', '.join(SAMPLERS)}")
    try:
        return _sample(how, denoiser, start, sigmas, cond, noise, watch_of(callback))
    except Ended as ended:
        return ended.x


def _sample(
    how: Sampling, denoiser: Denoiser, start: Tensor, sigmas: Tensor, cond: Condition, noise: NoiseFn, watch: Watch
) -> Tensor:
    sampler = SAMPLERS[how.sampler]
    options = {name: getattr(how, name) for name, samplers in OF_SAMPLERS.items() if how.sampler in samplers}
    if math.isfinite(sigmas[0]):
        # the variance-preserving x_T is standard normal; in these coordinates it is sqrt(1 + sigma_T^2) times that
        x = start * float((1 + sigmas[0] ** 2).sqrt())
        return sampler.steps(denoiser, x, sigmas, cond, noise, watch, **options)
    x0 = denoiser(start, _per_sample(math.inf, start), cond)
    if watch(0, math.inf, start, x0):
        return start
    following = float(sigmas[1])
    x = _leave_pure_noise(x0, start, following, noise, sampler.fresh(following, **options))
    x = watch.moved(0, x)
    return sampler.steps(denoiser, x, sigmas[1:], cond, lambda i: noise(i + 1), _Later(watch), **options)


def _leave_pure_noise(x0: Tensor, eps: Tensor, following: float, noise: NoiseFn, up: float) -> Tensor:
    """The limit of a step as sigma goes to infinity: x' = x_0 + sqrt(s'^2 - up^2) eps + up z, which is DDIM's.

    Every sampler takes this step there. Euler's is the same; Heun's second slope and the memory of the multistep ones
    (whose weight falls with the distance in log sigma) say nothing across an infinite step, so they begin after it.
    """
    x = x0 + max(0.0, following**2 - up**2) ** 0.5 * eps
    return x + up * noise(0) if up > 0 and following > 0 else x


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition,
    noise: NoiseFn,
    watch: Watch = UNWATCHED,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): eta = 0 deterministic, eta = 1 the variances of DDPM's posterior.

    In these coordinates: x' = x_0 + sqrt(s'^2 - up^2) / s (x - x_0) + up z,   up = eta s' sqrt(1 - s'^2 / s^2).
    """
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if watch(i, sigma, x, x0):
            return x
        up = eta * following * max(0.0, 1 - (following / sigma) ** 2) ** 0.5
        x = x0 + (following**2 - up**2) ** 0.5 / sigma * (x - x0)
        if up > 0:
            x = x + up * noise(i)
        x = watch.moved(i, x)
    return x


def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition,
    noise: NoiseFn,
    watch: Watch = UNWATCHED,
    variance: Literal["posterior", "beta"] = "posterior",
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2): the posterior's mean, and noise of variance beta~ or beta.

    posterior, beta~ = (1 - alpha_bar') / (1 - alpha_bar) beta, is right for data that are one point; beta for data that
    are standard normal. In these coordinates x' = x_0 + s'^2 / s^2 (x - x_0) + up z with, for beta,
    up^2 = beta / alpha_bar' = (s^2 - s'^2) (1 + s'^2) / (1 + s^2). The last step adds none.
    """
    if variance == "posterior":
        return ddim(denoiser, x, sigmas, cond, noise, watch, eta=1.0)
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if watch(i, sigma, x, x0):
            return x
        if following == 0.0:
            return watch.moved(i, x0)
        up = ((sigma**2 - following**2) * (1 + following**2) / (1 + sigma**2)) ** 0.5
        x = watch.moved(i, x0 + (following / sigma) ** 2 * (x - x0) + up * noise(i))
    return x


def euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Condition, noise: NoiseFn, watch: Watch = UNWATCHED
) -> Tensor:
    """x' = x + (s' - s) (x - x_0) / s. DDIM with eta 0 in other words (arXiv 2010.02502, section 4.3)."""
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if watch(i, sigma, x, x0):
            return x
        if following == 0.0:
            return watch.moved(i, x0)
        x = watch.moved(i, x + (following - sigma) * ((x - x0) / sigma))
    return x


def heun(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Condition, noise: NoiseFn, watch: Watch = UNWATCHED
) -> Tensor:
    """Karras et al., arXiv 2206.00364, algorithm 1: the mean of the slopes at both ends of an Euler step.

    The last step stays Euler's: the slope has no value at sigma = 0.
    """
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if watch(i, sigma, x, x0):
            return x
        if following == 0.0:
            return watch.moved(i, x0)
        slope = (x - x0) / sigma
        ahead = x + (following - sigma) * slope
        at_end = (ahead - denoiser(ahead, _per_sample(following, ahead), cond)) / following
        x = watch.moved(i, x + (following - sigma) * (slope + at_end) / 2)
    return x


def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Condition, noise: NoiseFn, watch: Watch = UNWATCHED
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), lambda = -log sigma; first order at both ends."""
    previous, previous_h = None, 0.0
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if watch(i, sigma, x, x0):
            return x
        if following == 0.0:
            return watch.moved(i, x0)
        h = _log_ratio(sigma, following)
        x = following / sigma * x + (1 - following / sigma) * _extrapolated(x0, previous, h, previous_h)
        x = watch.moved(i, x)
        previous, previous_h = x0, h
    return x


def unipc(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Condition, noise: NoiseFn, watch: Watch = UNWATCHED
) -> Tensor:
    """UniPC-2 (arXiv 2302.04867, section 3, for x_0 prediction and B_2(h)), first order at both ends.

    Its predictor, with the weight 1/2 that the paper allows at order 2, is the step of DPM-Solver++(2M). Before each
    prediction the corrector takes the last step again, now knowing x_0 at its end, which raises the order to 3; the
    network is not asked again there, so a step costs one evaluation.
    """
    before, before_h, last = None, 0.0, None  # `last`: x, x_0, sigma and h of the last step, corrected
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        x0 = denoiser(x, _per_sample(sigma, x), cond)
        if watch(i, sigma, x, x0):
            return x
        if following == 0.0:
            return watch.moved(i, x0)
        previous, previous_h = None, 0.0
        if last is not None:
            last_x, previous, last_sigma, previous_h = last
            ratio = sigma / last_sigma
            x = ratio * last_x + (1 - ratio) * _corrected(x0, previous, before, previous_h, before_h)
        h = _log_ratio(sigma, following)
        before, before_h, last = previous, previous_h, (x, x0, sigma, h)
        x = following / sigma * x + (1 - following / sigma) * _extrapolated(x0, previous, h, previous_h)
        x = watch.moved(i, x)
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


def _log_ratio(sigma: float, following: float) -> float:
    return torch.log(torch.tensor(sigma / following, dtype=torch.float64)).item()


def _per_sample(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, device=x.device, dtype=torch.float64)


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": Sampler(
        ddpm, order=None, fresh=lambda following, variance: math.hypot(following, 1.0 if variance == "beta" else 0.0)
    ),
    "ddim": Sampler(ddim, order=1, fresh=lambda following, eta: eta * following),  # the order is that at eta 0
    "euler": Sampler(euler, order=1),
    "heun": Sampler(heun, order=2, evaluations=lambda n: 2 * n - 1),
    "dpmpp_2m": Sampler(dpmpp_2m, order=2),
    "unipc": Sampler(unipc, order=3),
    "euler_ancestral": Sampler(ddpm, order=None, fresh=lambda following: following),
}
