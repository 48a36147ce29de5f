import math
from dataclasses import replace

import pytest
import torch

from raphael.base.config.preset import DiffusionConfig
from raphael.diffusion.prediction import Velocity, training_pair
from raphael.diffusion.schedule import Schedule
from raphael.net.latents import sample_latents

CONFIG = DiffusionConfig(1000, "linear", 1e-4, 0.02, "eps", False)
SCHEDULES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def zero_terminal(name):
    return Schedule(DiffusionConfig(1000, name, *SCHEDULES[name], "v", True))


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
    x_t, v = training_pair(Velocity(), schedule, x0, noise, t)
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_follows_the_papers_algorithm_step_by_step(name):
    """arXiv 2305.08891, algorithm 1, in Python's own numbers."""
    roots = Schedule(replace(CONFIG, schedule=name, beta_start=SCHEDULES[name][0], beta_end=SCHEDULES[name][1]))
    roots = [math.sqrt(value) for value in roots.alpha_bar.tolist()]
    first, last = roots[0], roots[-1]
    expected = [((root - last) * first / (first - last)) ** 2 for root in roots]
    alpha_bar = zero_terminal(name).alpha_bar
    torch.testing.assert_close(alpha_bar, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert alpha_bar[-1] == 0 and math.isclose(alpha_bar[0], first**2, rel_tol=1e-12)
    assert (alpha_bar.diff() < 0).all()


def test_zero_terminal_snr_agrees_with_the_rescaled_betas_of_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    peer = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(zero_terminal("scaled_linear").alpha_bar, peer, rtol=1e-9, atol=1e-15)


def test_at_zero_snr_the_noised_data_is_the_noise_and_the_velocity_is_minus_the_data():
    schedule, t = zero_terminal("scaled_linear"), torch.tensor([999])
    x0, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    assert torch.equal(schedule.add_noise(x0, noise, t), noise)
    assert torch.equal(training_pair(Velocity(), schedule, x0, noise, t)[1], -x0)


def test_timestep_inverts_sigma_up_to_infinity_and_rises_in_between():
    schedule = zero_terminal("scaled_linear")
    t = torch.tensor([0, 1, 499, 997, 998, 999])
    assert torch.isinf(schedule.sigma[999]) and torch.isfinite(schedule.sigma[:999]).all()
    torch.testing.assert_close(schedule.timestep(schedule.sigma[t]), t.float(), rtol=0, atol=1e-4)
    beyond = schedule.timestep(schedule.sigma[998] * torch.tensor([1.0, 2.0, 1e3, math.inf], dtype=torch.float64))
    assert (beyond.diff() > 0).all() and beyond[0] == 998 and beyond[-1] == 999
    torch.testing.assert_close(beyond[1], torch.tensor(998.5), rtol=0, atol=1e-4)  # sqrt(alpha_bar) is halved there


@pytest.mark.parametrize("schedule", [Schedule(CONFIG), zero_terminal("linear")], ids=["usual", "zero terminal SNR"])
def test_shares_of_the_timesteps_become_the_noise_levels_that_hold_exactly_those_timesteps(schedule):
    for low, high in [(0.0, 1.0), (0.0, 0.5), (0.2503, 0.7007), (1.0, 1.0), (0.5, 1.0), (0.0, 0.0)]:
        bottom, top = schedule.sigma_bounds(low, high)
        inside = (bottom <= schedule.sigma) & (schedule.sigma <= top)
        expected = [low <= t / 999 <= high for t in range(1000)]
        assert inside.tolist() == expected, (low, high)
    assert schedule.sigma_bounds(0.0, 1.0) == (0.0, math.inf)


def test_latents_are_the_scaled_posterior_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 8, 3, 3)
    peer = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(sample_latents(moments, 0.5, 0.1), (peer.mode() - 0.1) * 0.5)
    noise = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(sample_latents(moments, 0.5, 0.1, noise), (peer.mean + peer.std * noise - 0.1) * 0.5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_sigma_of_a_timestep_whole_or_between_is_the_inverse_of_the_timestep_of_a_sigma(name, zero_snr):
    schedule = Schedule(DiffusionConfig(1000, name, *SCHEDULES[name], "v", zero_snr))
    whole = torch.arange(1000)
    assert torch.equal(schedule.sigma_at(whole), schedule.sigma)
    between = torch.cat([torch.linspace(0, 999, 4321, dtype=torch.float64), torch.tensor([998.25, 998.9])])
    sigma = schedule.sigma_at(between)
    torch.testing.assert_close(schedule.timestep(sigma).double(), between, rtol=0, atol=1e-4)
    assert bool((schedule.sigma_at(between.sort().values).diff()[between.sort().values.diff() > 0] > 0).all())
