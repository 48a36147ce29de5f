import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from truth.closed_form_diffusion import COND, MEAN, SPREAD, Mixture, exact_flow, gaussian_denoiser, no_noise, starts

from raphael.config import SamplerName
from raphael.diffusion.denoiser import NetworkDenoiser
from raphael.diffusion.samplers import ddim, dpmpp_2m, euler, heun, sample, unipc
from raphael.diffusion.schedule import Schedule
from raphael.preset import DiffusionConfig

CONFIG = DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "eps", False)
ZERO_SNR = replace(CONFIG, prediction="v", zero_terminal_snr=True)
ORDERS = {ddim: 1, euler: 1, heun: 2, dpmpp_2m: 2, unipc: 3}


def geometric(top, bottom, steps):
    """steps + 1 levels, equally spaced in log sigma, then 0."""
    return torch.cat([torch.logspace(math.log10(top), math.log10(bottom), steps, dtype=torch.float64), torch.zeros(1)])


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("sampler", ORDERS, ids=lambda sampler: sampler.__name__)
def test_deterministic_samplers_converge_to_the_ode_at_their_order(sampler):
    top = float(Schedule(CONFIG).sigma[-1])
    x, errors = starts() * top, []
    for steps in (40, 80, 160):
        # down to a small sigma: the last step to zero, first order in every sampler, then costs nothing that would show
        reached = sampler(gaussian_denoiser, x, geometric(top, top * 1e-5, steps), COND, no_noise)
        errors.append((reached - exact_flow(x, top)).abs().max().item())
    observed = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(ORDERS[sampler] - 0.2 < order < ORDERS[sampler] + 0.5 for order in observed), (observed, errors)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_sampler_reaches_the_mean_the_covariance_and_the_modes_of_a_mixture(name):
    """Quasi-random starts: with 2048 points their own error is near 1e-3. First order: 300 steps; the others: 60."""
    first_order, stochastic = name in ("ddim", "euler"), name == "ddpm"
    tolerance = 0.08 if stochastic else 0.03  # 2048 fresh noises: 3 standard errors; the others: the steps' own error
    mixture = Mixture()
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=3).draw(2048, dtype=torch.float64)
    start = (points.clamp(1e-6, 1 - 1e-6) * 2 - 1).erfinv().mul(2**0.5).view(-1, 2, 1, 1)
    sigmas = geometric(200.0, 2e-3, 300 if first_order or stochastic else 60)
    x = sample(name, mixture.denoiser, start, sigmas, COND, noise_like(start) if stochastic else no_noise).view(-1, 2)
    torch.testing.assert_close(x.mean(0), mixture.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(x.T.cov(), mixture.covariance, rtol=0, atol=2 * tolerance)
    torch.testing.assert_close(mixture.component_shares(x), mixture.weights, rtol=0, atol=tolerance / 2)


def test_ddpm_reaches_the_mean_and_variance_of_the_data():
    start = starts(4000)
    sigmas = Schedule(CONFIG).sampling_sigmas(1000)  # the posterior's variance is exact only in the limit
    x = sample("ddpm", gaussian_denoiser, start, sigmas, COND, noise_like(start))
    assert abs(x.mean().item() - MEAN) < 0.02
    assert abs(x.std().item() - SPREAD) < 0.02


def peer_scheduler(name, schedule, steps, **changes):
    """diffusers' scheduler at our noise levels: its own are products of a thousand float32 numbers, 1e-6 off."""
    import diffusers

    common = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        **changes,
    }
    peer = {
        "ddim": lambda: diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**common),
        "heun": lambda: diffusers.HeunDiscreteScheduler(**common),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**common, final_sigmas_type="zero"),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**common, solver_order=2, final_sigmas_type="zero"),
    }[name]()
    peer.alphas_cumprod = schedule.alpha_bar.clone()
    peer.set_timesteps(steps)
    return peer


@pytest.mark.parametrize("steps", [1, 2, 4, 20])  # divisors of 1000: DDIMScheduler misses its own timesteps otherwise
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_a_sampler_agrees_with_diffusers_on_the_same_denoiser(name, steps):
    """Euler's and Heun's schedulers hold x_0 + sigma eps, the others that over sqrt(1 + sigma^2)."""
    schedule, peer = Schedule(CONFIG), peer_scheduler(name, Schedule(CONFIG), steps)
    scaled = name in ("euler", "heun")
    x = starts() * ((1 + schedule.sigma[-1] ** 2).sqrt() if scaled else 1)
    for t in peer.timesteps:
        sigma = schedule.sigma[int(t)]
        scale = 1 if scaled else (1 + sigma**2).sqrt()
        if scaled:
            peer.scale_model_input(x, t)  # without it Euler's scheduler warns
        x0 = gaussian_denoiser(x * scale, sigma.expand(len(x)), COND)
        x = peer.step((x * scale - x0) / sigma, t, x).prev_sample
    ours = sample(name, gaussian_denoiser, starts(), schedule.sampling_sigmas(steps), COND, no_noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_agrees_with_diffusers_at_every_eta_when_both_get_the_same_noise(eta, zero_terminal_snr):
    """v prediction, by a network that knows the best answer; with zero terminal SNR the first input is pure noise."""
    config = replace(CONFIG, prediction="v", zero_terminal_snr=zero_terminal_snr)
    schedule, noise = Schedule(config), [starts(seed=100 + i) for i in range(10)]
    network = knowing_network(schedule)
    peer = peer_scheduler("ddim", schedule, 10, prediction_type="v_prediction")
    x = starts()
    for i, t in enumerate(peer.timesteps):
        v = network(x, t.expand(len(x)), None, None, False).prediction
        x = peer.step(v, t, x, eta=eta, variance_noise=noise[i]).prev_sample
    denoiser, sigmas = NetworkDenoiser(network, schedule, "v"), schedule.sampling_sigmas(10)
    ours = sample("ddim", denoiser, starts(), sigmas, COND, lambda i: noise[i], eta)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def knowing_network(schedule):
    """E[v | x_t] of Gaussian data, as a network."""

    class Network(torch.nn.Module):
        def forward(self, x, timestep, context, mask, collect):
            alpha_bar = schedule.alpha_bar[timestep.round().long()].view(-1, 1, 1, 1)
            signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            x0 = MEAN + SPREAD**2 * signal / (SPREAD**2 * alpha_bar + 1 - alpha_bar) * (x - signal * MEAN)
            output = type("Output", (), {})()
            output.prediction = signal * (x - signal * x0) / spread - spread * x0
            return output

    return Network()


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_from_infinite_noise_every_sampler_starts_with_the_limit_of_ddims_step(name):
    """By hand: x_0 at pure noise is the mean of the data; then the same sampler, from the second level on."""
    sigmas = Schedule(ZERO_SNR).sampling_sigmas(12)
    eps, noise = starts(), [starts(seed=200 + i) for i in range(12)]
    assert math.isinf(sigmas[0]) and math.isfinite(sigmas[1])
    second = MEAN + sigmas[1] * (noise[0] if name == "ddpm" else eps)
    unit = second / (1 + sigmas[1] ** 2).sqrt()
    by_hand = sample(name, gaussian_denoiser, unit, sigmas[1:], COND, lambda i: noise[i + 1])
    ours = sample(name, gaussian_denoiser, eps, sigmas, COND, lambda i: noise[i])
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_the_step_from_infinite_noise_is_the_limit_of_the_step_from_ever_more_noise(name):
    sigmas, errors = Schedule(ZERO_SNR).sampling_sigmas(5), []
    noise = [starts(seed=200 + i) for i in range(5)]
    at_infinity = sample(name, gaussian_denoiser, starts(), sigmas, COND, lambda i: noise[i])
    for top in (1e4, 1e6):
        sigmas[0] = top
        near = sample(name, gaussian_denoiser, starts(), sigmas, COND, lambda i: noise[i])
        errors.append((near - at_infinity).abs().max().item())
    assert errors[0] < 0.1 and errors[1] < errors[0] / 50


def test_one_step_from_infinite_noise_is_the_mean_of_the_data():
    for name in get_args(SamplerName):
        x = sample(name, gaussian_denoiser, starts(), Schedule(ZERO_SNR).sampling_sigmas(1), COND, no_noise)
        assert torch.equal(x, torch.full_like(x, MEAN))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_network_that_knows_the_truth_is_wrapped_into_a_denoiser_that_returns_x0(prediction):
    schedule = Schedule(CONFIG if prediction == "eps" else ZERO_SNR)  # v: up to infinite sigma
    x0, noise = starts(5, 2), starts(5, 3)
    t = torch.tensor([0, 10, 400, 800, 999])

    class Knowing(torch.nn.Module):
        def forward(self, x, timestep, context, mask, collect):
            torch.testing.assert_close(timestep, t.float(), rtol=0, atol=1e-3)
            torch.testing.assert_close(x, schedule.add_noise(x0, noise, t))
            output = type("Output", (), {})()
            output.prediction = noise if prediction == "eps" else schedule.velocity(x0, noise, t)
            return output

    sigma = schedule.sigma[t]
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    x[torch.isinf(sigma)] = noise[torch.isinf(sigma)]
    estimate = NetworkDenoiser(Knowing(), schedule, prediction)(x, sigma, COND)
    torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-9)


def test_a_network_of_eps_is_refused_where_the_noise_is_pure():
    with pytest.raises(ValueError, match="got eps with zero_terminal_snr, expected v"):
        NetworkDenoiser(torch.nn.Identity(), Schedule(ZERO_SNR), "eps")


def test_euler_is_ddim_without_noise():
    sigmas = Schedule(CONFIG).sampling_sigmas(9)
    mixture, start = Mixture(), starts(8)[:, :, 0].reshape(8, 2, 1, 1)
    drawn = [sample(name, mixture.denoiser, start, sigmas, COND, no_noise) for name in ("euler", "ddim")]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 7), ("euler", 7), ("heun", 13), ("unipc", 7)])
def test_a_sampler_asks_the_network_as_often_as_its_table_says(name, evaluations):
    asked = []
    denoiser = lambda x, sigma, cond: asked.append(float(sigma[0])) or gaussian_denoiser(x, sigma, cond)  # noqa: E731
    sample(name, denoiser, starts(), Schedule(CONFIG).sampling_sigmas(7), COND, no_noise)
    assert len(asked) == evaluations and min(asked) > 0


@pytest.mark.parametrize("name", ["ddpm", "heun", "unipc"])
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(name):
    start, sigmas = starts(6), Schedule(CONFIG).sampling_sigmas(10)
    noise = [starts(6, 100 + i) for i in range(10)]
    whole = sample(name, gaussian_denoiser, start, sigmas, COND, lambda i: noise[i])
    alone = sample(name, gaussian_denoiser, start[4:5], sigmas, COND, lambda i: noise[i][4:5])
    assert torch.equal(whole[4:5], alone)


def test_an_unknown_sampler_names_the_known_ones():
    expected = "got 'plms', expected one of " + ", ".join(get_args(SamplerName))
    with pytest.raises(ValueError, match=expected):
        sample("plms", gaussian_denoiser, starts(), Schedule(CONFIG).sampling_sigmas(5), COND, no_noise)


@pytest.mark.parametrize(("name", "eta"), [("heun", 0.5), ("ddpm", 1.0), ("ddim", 1.5), ("ddim", -0.1)])
def test_an_eta_that_means_nothing_is_refused(name, eta):
    with pytest.raises(ValueError, match="eta: got"):
        sample(name, gaussian_denoiser, starts(), Schedule(CONFIG).sampling_sigmas(5), COND, no_noise, eta)
