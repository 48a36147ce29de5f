import math
from dataclasses import replace

import pytest
import torch

from raphael.config import DiffusionConfig
from raphael.diffusion.latents import sample_latents
from raphael.diffusion.schedule import Schedule

CONFIG = DiffusionConfig(1000, "linear", 1e-4, 0.02, "eps")


def test_alpha_bar_is_the_product_of_one_minus_beta():
    alpha_bar, product = Schedule(CONFIG).alpha_bar, 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert math.isclose(alpha_bar[t].item(), product, rel_tol=1e-9)


def test_the_cosine_schedule_follows_its_formula_until_the_cap():
    alpha_bar = Schedule(replace(CONFIG, schedule="cosine")).alpha_bar
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    for t in (0, 1, 500, 990):
        assert math.isclose(alpha_bar[t].item(), f[t + 1] / f[0], rel_tol=1e-9)
    assert alpha_bar[-1] > 0


def test_noised_data_has_the_variance_of_the_schedule():
    schedule = Schedule(CONFIG)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    x = schedule.add_noise(2 * x0, noise, torch.full((20_000,), 300))
    alpha_bar = schedule.alpha_bar[300].item()
    assert abs(x.var().item() - (4 * alpha_bar + 1 - alpha_bar)) < 0.1


def test_velocity_and_noised_data_give_back_the_data():
    schedule = Schedule(CONFIG)
    x0, noise = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([5, 500, 995])
    alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    x_t, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    back = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v
    torch.testing.assert_close(back, x0)


def test_timestep_inverts_sigma_and_interpolates_in_its_logarithm():
    schedule = Schedule(CONFIG)
    t = torch.tensor([0, 1, 499, 999])
    torch.testing.assert_close(schedule.timestep(schedule.sigma[t]), t.float(), rtol=0, atol=1e-4)
    between = (schedule.sigma[10] * schedule.sigma[11]).sqrt().view(1)
    torch.testing.assert_close(schedule.timestep(between), torch.tensor([10.5]), rtol=0, atol=1e-4)


def test_sampling_starts_at_the_largest_noise_and_ends_without():
    schedule = Schedule(CONFIG)
    for steps in (1, 7, 1000):
        sigmas = schedule.sampling_sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == schedule.sigma[-1] and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="steps: got 1001, expected 1 to 1000"):
        schedule.sampling_sigmas(1001)


def test_latents_are_the_scaled_posterior_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 8, 3, 3)
    peer = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(sample_latents(moments, 0.5, 0.1), (peer.mode() - 0.1) * 0.5)
    noise = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(sample_latents(moments, 0.5, 0.1, noise), (peer.mean + peer.std * noise - 0.1) * 0.5)
