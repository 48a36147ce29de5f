"""Diffusions whose best denoiser is known in closed form: Gaussian data, and a mixture of Gaussians in the plane."""

from __future__ import annotations

import torch
from torch import Tensor

from raphael.diffusion.prediction import Prediction
from raphael.diffusion.schedule import Noise, Schedule
from raphael.net.condition import Condition

MEAN, SPREAD = 1.5, 0.4  # of Gaussian data: every element N(MEAN, SPREAD^2)
COND = Condition(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


def starts(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def no_noise(i: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def gaussian_denoiser(x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """E[x_0 | x] of Gaussian data; MEAN where sigma is infinite."""
    return MEAN + SPREAD**2 / (SPREAD**2 + sigma.view(-1, 1, 1, 1) ** 2) * (x - MEAN)


def exact_flow(x: Tensor, sigma: float) -> Tensor:
    """The probability-flow ODE of Gaussian data, solved: distance to the mean shrinks by the ratio of spreads."""
    return MEAN + (x - MEAN) * SPREAD / (SPREAD**2 + sigma**2) ** 0.5


def knowing_network(noise: Noise, prediction: Prediction, denoiser=gaussian_denoiser) -> torch.nn.Module:
    """A network with the least error, E[target | input], of a closed-form E[x_0 | x]: targets are linear in both."""

    class Network(torch.nn.Module):
        def forward(self, given: Tensor, t: Tensor, *condition, **options) -> object:
            t = t.round().long() if isinstance(noise, Schedule) else t
            signal, spread = noise.roots(t, given)
            x_vp = given / prediction.network_input(torch.ones_like(signal), signal, spread)
            x = torch.where(signal == 0, x_vp, x_vp / signal)
            x0 = denoiser(x, (spread / signal).flatten(), COND)
            eps = (x_vp - signal * x0) / spread
            output = type("Output", (), {})()
            output.prediction = prediction.target(x0, eps, signal, spread)
            return output

    return Network()


class Mixture:
    """Three Gaussians of different weights and covariances; points are (B, 2, 1, 1)."""

    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[2.0, 1.0], [-1.0, 2.0], [0.0, -2.5]], dtype=torch.float64)
    roots = torch.tensor(  # of the covariances
        [[[0.5, 0.0], [0.2, 0.3]], [[0.3, 0.0], [-0.1, 0.4]], [[0.6, 0.0], [0.0, 0.2]]], dtype=torch.float64
    )

    @property
    def covariances(self) -> Tensor:
        return self.roots @ self.roots.mT

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        apart = self.means - self.mean
        between = apart[:, :, None] * apart[:, None, :]
        return (self.weights[:, None, None] * (self.covariances + between)).sum(0)

    def denoiser(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """E[x_0 | x] = sum_k p(k | x) (mu_k + S_k (S_k + sigma^2)^-1 (x - mu_k)), one sigma for all."""
        if torch.isinf(sigma[0]):
            return self.mean.view(1, 2, 1, 1).expand_as(x)
        total = self.covariances + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64)
        apart = x.view(-1, 1, 2) - self.means  # (B, 3, 2)
        whitened = torch.einsum("kij,bkj->bki", torch.linalg.inv(total), apart)
        log_p = self.weights.log() - 0.5 * (torch.logdet(total) + (apart * whitened).sum(-1))
        inside = self.means + torch.einsum("kij,bkj->bki", self.covariances, whitened)
        return (log_p.softmax(1)[..., None] * inside).sum(1).view_as(x)

    def component_shares(self, x: Tensor) -> Tensor:
        """The share of points that each component explains best, by the exact posterior."""
        apart = x.view(-1, 1, 2) - self.means
        whitened = torch.einsum("kij,bkj->bki", torch.linalg.inv(self.covariances), apart)
        log_p = self.weights.log() - 0.5 * (torch.logdet(self.covariances) + (apart * whitened).sum(-1))
        return log_p.softmax(1).mean(0)
