"""Guidance and thresholding: denoiser -> denoiser wrappers. They compose: threshold what guidance returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raphael.diffusion.denoiser import Denoiser
from raphael.net.condition import Condition

EVERYWHERE = (0.0, math.inf)
LogP = Callable[[Tensor, Tensor], Tensor]  # x (B, C, h, w), finite sigma (B,) -> log p(c | x, sigma) (B,), each its c


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """D = D(x; null) + s (D(x; c) - D(x; null)) (Ho & Salimans, arXiv 2207.12598, with s = 1 + w).

    On x_0 estimates this equals guidance on eps: the two differ by an affine map. Both branches run as one batch.
    scale 1 needs no second branch; 0 is unconditional. null: the empty caption, batch of 1.
    interval: the noise levels, both ends included, where s acts; outside s is 1, so the conditional branch runs alone
    and the step costs half (Kynkäänniemi et al., arXiv 2404.07724, which finds guidance harmful at high noise and idle
    at low noise). A picture is told to both branches, unless the null row has its own: it is not guided by.
    rescale: share by which a guided estimate gets the deviation of the conditional one, which guidance raises (Lin et
    al., arXiv 2305.08891, eq. 15 and 16; there of the network's output, here of x_0).
    """

    denoiser: Denoiser
    scale: float
    null: Condition
    interval: tuple[float, float] = EVERYWHERE  # sigma
    rescale: float = 0.0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        if self.scale == 1.0:
            return self.denoiser(x, sigma, cond)
        if self.interval == EVERYWHERE:
            return self._guided(x, sigma, cond, self.scale)
        inside = (self.interval[0] <= sigma) & (sigma <= self.interval[1])
        if inside.all():
            return self._guided(x, sigma, cond, self.scale)
        if not inside.any():
            return self.denoiser(x, sigma, cond)
        # samplers give a whole batch one sigma; a caller that mixes them pays for both branches on all rows
        scale = torch.where(inside, self.scale, 1.0).to(x).view(-1, *[1] * (x.dim() - 1))
        return self._guided(x, sigma, cond, scale)

    def _guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float | Tensor) -> Tensor:
        null = self.null.expand(len(x))
        if null.picture is None and cond.picture is not None:
            null = replace(null, picture=cond.picture)
        if not isinstance(scale, Tensor) and scale == 0.0:
            return self.denoiser(x, sigma, null)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond.concat(null, null=True))
        conditional, unconditional = both.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return rescaled(guided, conditional, self.rescale) if self.rescale else guided


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Both (B, ...): `guided` moved by `share` towards itself at the deviation that `conditional` has, per sample."""
    over = tuple(range(1, guided.dim()))
    factor = conditional.std(over, keepdim=True) / guided.std(over, keepdim=True)
    return guided * (share * factor + 1 - share)


@dataclass(frozen=True)
class GradientGuidance:
    """D = D(x) + s sigma^2 grad_x log p(c | x, sigma): towards what a classifier, or a CLIP, of noised images says.

    With s = 1 and the true p it is exactly the conditional denoiser of an unconditional one: Tweedie's formula, D = x +
    sigma^2 grad log p(x), and Bayes' rule. In the coordinates of eps it is guided-diffusion's (arXiv 2105.05233,
    algorithm 2) eps - sqrt(1 - alpha_bar) s grad_{x_t} log p; GLIDE's CLIP guidance (arXiv 2112.10741, section 2.4) is
    the same with exp(logit scale) f(x_t, t) . g(c) for log p.

    scale 0 asks nobody. Nothing is asked at infinite sigma either: nothing of x_0 is in x there, and sigma^2 times a
    gradient of 0 would be NaN. Costs a forward and a backward of log_p's network a step.
    """

    denoiser: Denoiser
    log_p: LogP
    scale: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        x0 = self.denoiser(x, sigma, cond)
        finite = torch.isfinite(sigma)
        if self.scale == 0 or not finite.any():
            return x0
        asked = torch.where(finite, sigma, 1.0)
        step = self.scale * asked.view(-1, *[1] * (x.dim() - 1)) ** 2 * gradient(self.log_p, x, asked)
        return x0 + torch.where(finite.view(-1, *[1] * (x.dim() - 1)), step, 0.0).to(x0)


def gradient(log_p: LogP, x: Tensor, sigma: Tensor) -> Tensor:
    """grad_x log p of each sample (B, C, h, w), in x's type, whatever mode the caller computes in.

    Of the sum over the batch, never the mean: a sample's own gradient does not depend on its neighbours. Tensors made
    in inference mode cannot enter a graph, so x and sigma are copied outside of it; autocast is off, since rounding to
    bfloat16 is larger than what a confident classifier's gradient differs by.
    """
    kind = x.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
        x = x.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(log_p(x, sigma.detach().clone()).sum(), x)
    return found


@dataclass(frozen=True)
class Thresholded:
    """Keeps estimates of x_0 where data can be, against the saturation of strong guidance (arXiv 2205.11487, 2.3).

    Meant for models of pixels, whose values fill [-bound, bound]. Latents have no such bounds: off by default there.
    The sampler takes its direction from the thresholded x_0 too. Raises ValueError on what is no kind or out of range.
    """

    denoiser: Denoiser
    kind: Literal["static", "dynamic"]
    percentile: float = 99.5
    bound: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("static", "dynamic"):
            raise ValueError(f"threshold: got {self.kind!r}, expected none, static or dynamic")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"threshold_percentile: got {self.percentile:g}, expected 0 to 100")
        if not self.bound > 0:
            raise ValueError(f"threshold_bound: got {self.bound:g}, expected more than 0")

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        x0 = self.denoiser(x, sigma, cond)
        if self.kind == "static":
            return x0.clamp(-self.bound, self.bound)
        return dynamic_threshold(x0, self.percentile, self.bound)


def dynamic_threshold(x0: Tensor, percentile: float = 99.5, bound: float = 1.0) -> Tensor:
    """Imagen's dynamic thresholding (arXiv 2205.11487, 2.3) of x0 (B, ...), each sample by its own s.

    s = the percentile of |x0| over the sample, at least bound; x0 is clipped to [-s, s] and multiplied by bound / s.
    """
    size = x0.flatten(1).abs()
    size = size if size.dtype == torch.float64 else size.float()  # quantile takes no half precision
    s = torch.quantile(size, percentile / 100, dim=1).clamp(min=bound).to(x0.dtype)
    s = s.view(-1, *[1] * (x0.dim() - 1))
    return x0.clamp(-s, s) * (bound / s)
