"""Guidance by gradients against the exact conditional denoiser of a mixture, and by its rules one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from truth.closed_form_diffusion import COND, Mixture

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.diffusion.guidance import GradientGuidance, gradient
from raphael.diffusion.samplers import sample
from raphael.diffusion.schedule import Schedule

MIXTURE = Mixture()
CLASSES = [(0,), (1,), (2,), (0, 2)]  # the components of each class
LEVELS = [0.05, 0.4, 1.0, 3.0, 20.0, 150.0]


def points(count: int, sigma: float, seed: int = 0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return (1 + sigma) * torch.randn(count, 2, 1, 1, dtype=torch.float64, generator=noise)


def log_joint(x: Tensor, sigma: Tensor) -> Tensor:
    """log (w_k N(x; mu_k, S_k + sigma^2)) -> (B, 3), each row's own sigma."""
    total = MIXTURE.covariances + sigma.view(-1, 1, 1, 1) ** 2 * torch.eye(2, dtype=torch.float64)  # (B, 3, 2, 2)
    apart = x.view(-1, 1, 2) - MIXTURE.means
    whitened = torch.linalg.solve(total, apart[..., None])[..., 0]
    return MIXTURE.weights.log() - 0.5 * (torch.logdet(total) + (apart * whitened).sum(-1))


def log_p_of(members: tuple[int, ...]):
    """log p(c | x, sigma) of a class that is some of the components."""

    def log_p(x: Tensor, sigma: Tensor) -> Tensor:
        joint = log_joint(x, sigma)
        return joint[:, list(members)].logsumexp(1) - joint.logsumexp(1)

    return log_p


class Part(Mixture):
    """The mixture of some components: its `denoiser` is the exact conditional one."""

    def __init__(self, members: tuple[int, ...]):
        rows = list(members)
        self.weights = Mixture.weights[rows] / Mixture.weights[rows].sum()
        self.means, self.roots = Mixture.means[rows], Mixture.roots[rows]

    def denoiser(self, x, sigma, cond):
        if len(self.weights) == 1 and not torch.isinf(sigma[0]):  # no posterior over one component
            total = self.covariances[0] + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64)
            apart = x.view(-1, 2) - self.means[0]
            return (self.means[0] + apart @ torch.linalg.solve(total, self.covariances[0])).view_as(x)
        return super().denoiser(x, sigma, cond)


@pytest.mark.parametrize("members", CLASSES)
@pytest.mark.parametrize("level", LEVELS)
def test_at_weight_1_it_is_the_exact_conditional_denoiser_of_a_mixture(members, level):
    x, sigma = points(64, level), torch.full((64,), level, dtype=torch.float64)
    guided = GradientGuidance(MIXTURE.denoiser, log_p_of(members), 1.0)(x, sigma, COND)
    exact = Part(members).denoiser(x, sigma, COND)
    assert not torch.allclose(exact, MIXTURE.denoiser(x, sigma, COND), rtol=0, atol=1e-3)
    # sigma^2 multiplies the gradient, and with it the rounding of float64
    torch.testing.assert_close(guided, exact, rtol=0, atol=1e-12 * max(1.0, level**2))


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_in_coordinates_of_eps_it_is_the_classifier_guidance_of_guided_diffusion(scale):
    """eps' = eps - sqrt(1 - alpha_bar) s grad_{x_t} log p, x_t = sqrt(alpha_bar) x."""
    schedule, log_p = Schedule(DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", zero_terminal_snr=True)), log_p_of((1,))
    for t in (100, 500, 900):
        alpha_bar, level = float(schedule.alpha_bar[t]), float(schedule.sigma[t])
        x, sigma = points(16, level, t), torch.full((16,), level, dtype=torch.float64)
        x_t = (alpha_bar**0.5 * x).requires_grad_()
        (slope,) = torch.autograd.grad(log_p(x_t / alpha_bar**0.5, sigma).sum(), x_t)
        eps = (x - MIXTURE.denoiser(x, sigma, COND)) / level
        theirs = eps - (1 - alpha_bar) ** 0.5 * scale * slope
        ours = GradientGuidance(MIXTURE.denoiser, log_p, scale)(x, sigma, COND)
        torch.testing.assert_close((x - ours) / level, theirs, rtol=1e-9, atol=1e-10)


def test_sampling_an_unconditional_mixture_by_it_gives_the_asked_component():
    sigmas = torch.cat([torch.logspace(2, -2.5, 60, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    start = torch.randn(4000, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    denoiser = GradientGuidance(MIXTURE.denoiser, log_p_of((1,)), 1.0)
    drawn = sample(Sampling("dpmpp_2m"), denoiser, start, sigmas, COND, lambda i: start).view(-1, 2)
    torch.testing.assert_close(drawn.mean(0), Mixture.means[1], rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.T.cov(), MIXTURE.covariances[1], rtol=0, atol=0.02)


def test_infinite_noise_is_skipped_whether_all_samples_have_it_or_some():
    asked = []

    def log_p(x, sigma):
        asked.append(sigma.clone())
        return log_p_of((1,))(x, sigma)

    def denoiser(x, sigma, cond):  # each row its own sigma
        rows = [MIXTURE.denoiser(x[i : i + 1], sigma[i : i + 1], cond) for i in range(len(x))]
        return torch.cat(rows)

    x, infinite = points(3, 1.0), torch.full((3,), math.inf, dtype=torch.float64)
    guided = GradientGuidance(denoiser, log_p, 3.0)
    assert torch.equal(guided(x, infinite, COND), denoiser(x, infinite, COND)) and not asked
    mixed = torch.tensor([0.5, math.inf, 2.0], dtype=torch.float64)
    found = guided(x, mixed, COND)
    assert bool(found.isfinite().all()) and bool(asked[0].isfinite().all())
    assert torch.equal(found[1], denoiser(x, mixed, COND)[1])
    for row in (0, 2):
        alone = guided(x[row : row + 1], mixed[row : row + 1], COND)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=1e-13)


def test_gradients_are_summed_over_the_batch_and_not_averaged():
    """A sample's step is what it is alone, however many stand beside it."""
    x, sigma = points(5, 1.0), torch.full((5,), 1.0, dtype=torch.float64)
    whole = gradient(log_p_of((1,)), x, sigma)
    for row in range(5):
        alone = gradient(log_p_of((1,)), x[row : row + 1], sigma[:1])
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=0, atol=1e-14)


def test_every_sample_has_a_class_of_its_own():
    x, sigma = points(3, 1.0), torch.full((3,), 1.0, dtype=torch.float64)
    wanted = torch.tensor([2, 0, 1])

    def log_p(x, sigma):
        return log_joint(x, sigma).log_softmax(1).gather(1, wanted[:, None])[:, 0]

    guided = GradientGuidance(MIXTURE.denoiser, log_p, 1.0)(x, sigma, COND)
    for row, component in enumerate(wanted.tolist()):
        exact = Part((component,)).denoiser(x[row : row + 1], sigma[:1], COND)
        torch.testing.assert_close(guided[row : row + 1], exact, rtol=0, atol=1e-12)


def test_weight_0_asks_nobody():
    def log_p(x, sigma):
        raise AssertionError("asked")

    x, sigma = points(3, 1.0), torch.ones(3, dtype=torch.float64)
    assert torch.equal(GradientGuidance(MIXTURE.denoiser, log_p, 0.0)(x, sigma, COND), MIXTURE.denoiser(x, sigma, COND))


def test_inference_mode_and_autocast_around_it_change_no_bit():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 1)).requires_grad_(False)

    def log_p(x, sigma):
        return network(x)[:, 0] / (1 + sigma)

    x, sigma = torch.randn(4, 3, 2, 2), torch.rand(4)
    plain = gradient(log_p, x, sigma)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = gradient(log_p, x * 1, sigma * 1)  # tensors of inference mode, as samplers hold them
    assert torch.equal(plain, inside) and plain.dtype == torch.float32 and bool(plain.any())
    assert all(parameter.grad is None for parameter in network.parameters())
