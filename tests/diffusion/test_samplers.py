import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from truth.closed_form_diffusion import (
    COND,
    MEAN,
    SPREAD,
    Mixture,
    exact_flow,
    gaussian_denoiser,
    knowing_network,
    no_noise,
    starts,
)

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import SamplerName, Sampling
from raphael.diffusion.denoiser import NetworkDenoiser
from raphael.diffusion.prediction import Eps, Velocity
from raphael.diffusion.samplers import SAMPLERS, sample
from raphael.diffusion.schedule import Schedule

CONFIG = DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "eps", False)
ZERO_SNR = replace(CONFIG, prediction="v", zero_terminal_snr=True)
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if sampler.order]


def geometric(top, bottom, steps):
    """steps + 1 levels, equally spaced in log sigma, then 0."""
    return torch.cat([torch.logspace(math.log10(top), math.log10(bottom), steps, dtype=torch.float64), torch.zeros(1)])


def noise_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_every_name_of_the_settings_has_a_sampler():
    assert tuple(SAMPLERS) == get_args(SamplerName)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_converge_to_the_ode_at_their_order(name):
    sampler = SAMPLERS[name]
    top = float(Schedule(CONFIG).sigma[-1])
    x, errors = starts() * top, []
    for steps in (40, 80, 160):
        # down to a small sigma: the last step to zero, first order in every sampler, then costs nothing that would show
        reached = sampler.steps(gaussian_denoiser, x, geometric(top, top * 1e-5, steps), COND, no_noise)
        errors.append((reached - exact_flow(x, top)).abs().max().item())
    observed = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(sampler.order - 0.2 < order < sampler.order + 0.5 for order in observed), (observed, errors)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_sampler_reaches_the_mean_the_covariance_and_the_modes_of_a_mixture(name):
    """Quasi-random starts: with 2048 points their own error is near 1e-3. First order: 300 steps; the others: 60."""
    order = SAMPLERS[name].order
    first_order, stochastic = order == 1, order is None
    tolerance = 0.08 if stochastic else 0.03  # 2048 fresh noises: 3 standard errors; the others: the steps' own error
    mixture = Mixture()
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=3).draw(2048, dtype=torch.float64)
    start = (points.clamp(1e-6, 1 - 1e-6) * 2 - 1).erfinv().mul(2**0.5).view(-1, 2, 1, 1)
    sigmas = geometric(200.0, 2e-3, 300 if first_order or stochastic else 60)
    x = sample(
        Sampling(name), mixture.denoiser, start, sigmas, COND, noise_like(start) if stochastic else no_noise
    ).view(-1, 2)
    torch.testing.assert_close(x.mean(0), mixture.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(x.T.cov(), mixture.covariance, rtol=0, atol=2 * tolerance)
    torch.testing.assert_close(mixture.component_shares(x), mixture.weights, rtol=0, atol=tolerance / 2)


def test_ddpm_reaches_the_mean_and_variance_of_the_data():
    start = starts(4000)
    sigmas = Schedule(CONFIG).sampling_sigmas(1000)  # the posterior's variance is exact only in the limit
    x = sample(Sampling("ddpm"), gaussian_denoiser, start, sigmas, COND, noise_like(start))
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
    ours = sample(Sampling(name), gaussian_denoiser, starts(), schedule.sampling_sigmas(steps), COND, no_noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def chain(variance, alpha_bar, spread):
    """Mean and variance of x_vp at each level of DDPM's chain on N(MEAN, spread^2), then of the data that it ends in.

    arXiv 2006.11239 in its own symbols: eq. 7 for the mean, section 3.2 for both variances; alpha_bar falls.
    """
    mean, var, found = 0.0, 1.0, []
    for now, after in zip(alpha_bar, [*alpha_bar[1:], 1.0], strict=True):
        found.append((mean, var))
        kept = spread**2 * now**0.5 / (spread**2 * now + 1 - now)  # E[x_0 | x] = kept x + fixed
        fixed = MEAN * (1 - kept * now**0.5)
        beta = 1 - now / after
        of_x0, of_x = after**0.5 * beta / (1 - now), (now / after) ** 0.5 * (1 - after) / (1 - now)
        added = 0.0 if after == 1.0 else beta * ((1 - after) / (1 - now) if variance == "posterior" else 1.0)
        mean, var = (of_x0 * kept + of_x) * mean + of_x0 * fixed, (of_x0 * kept + of_x) ** 2 * var + added
    return [*found, (mean, var)]


def moments(how, sigmas, spread):
    """The exact mean and variance of x at each level: a sampler of Gaussian data is affine in its start and noises.

    Row 0 has none of them, row 1 the start alone, row 2 + i the noise of step i alone.
    """
    steps, states = len(sigmas) - 1, []
    rows = torch.eye(steps + 2, dtype=torch.float64)[:, 1:].reshape(steps + 2, steps + 1, 1, 1)
    denoiser = lambda x, sigma, cond: (  # noqa: E731
        MEAN + spread**2 / (spread**2 + sigma.view(-1, 1, 1, 1) ** 2) * (x - MEAN)
    )
    watch = lambda step, sigma, x, x0: states.append(x)  # noqa: E731
    end = sample(how, denoiser, rows[:, :1], sigmas, COND, lambda i: rows[:, i + 1 : i + 2], watch)
    flat = [x.flatten() for x in (*states, end)]
    return [(float(x[0]), float((x[1:] - x[0]).square().sum())) for x in flat]


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_has_at_every_level_the_mean_and_variance_of_its_chain_at_both_choices(variance, spread):
    sigmas = Schedule(CONFIG).sampling_sigmas(10)
    alpha_bar = (1 / (1 + sigmas[:-1] ** 2)).tolist()
    expected = chain(variance, alpha_bar, spread)
    scales = [*(math.sqrt(1 + sigma**2) for sigma in sigmas[:-1].tolist()), 1.0]  # from x_vp
    got = moments(Sampling("ddpm", variance=variance), sigmas, spread)
    for (mean, var), (ours, ours_var), scale in zip(expected, got, scales, strict=True):
        assert ours == pytest.approx(scale * mean, abs=1e-9) and ours_var == pytest.approx(scale**2 * var, rel=1e-9)


def test_each_variance_of_ddpm_is_exact_for_the_data_that_it_is_meant_for():
    """Section 3.2. beta~ for one point: N(point, sigma^2) at every level, but for what the start, which is
    N(0, 1 + sigma_T^2) whatever the data are, has too much; beta for standard normal data: 1 + sigma^2.
    """
    sigmas = Schedule(CONFIG).sampling_sigmas(10)
    for (mean, var), sigma in zip(moments(Sampling("ddpm"), sigmas, 0.0), sigmas.tolist(), strict=True):
        left = sigma**2 / float(sigmas[0]) ** 2  # of the start
        assert mean == pytest.approx(MEAN * (1 - left)) and var == pytest.approx(sigma**2 + left**2, rel=1e-9)
    normal = moments(Sampling("ddpm", variance="beta"), sigmas, 1.0)
    for (_, var), sigma in zip(normal[:-1], sigmas[:-1].tolist(), strict=True):
        assert var == pytest.approx(1 + sigma**2, rel=1e-9)
    assert normal[-1][1] == pytest.approx(1 / (1 + float(sigmas[-2]) ** 2))  # the last step is a mean: no noise


@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm_agrees_with_diffusers_at_both_variances_when_both_get_the_same_noise(variance, theirs, monkeypatch):
    import diffusers

    schedule, noise = Schedule(CONFIG), [starts(seed=100 + i) for i in range(10)]
    peer = diffusers.DDPMScheduler(1000, variance_type=theirs, clip_sample=False, timestep_spacing="trailing")
    peer.alphas_cumprod = schedule.alpha_bar.clone()
    peer.set_timesteps(10)
    network, x = knowing_network(schedule, Eps()), starts()
    for i, t in enumerate(peer.timesteps):
        z = noise[i] * (i < 9)  # algorithm 2 adds none in the last step; theirs does unless it ends at timestep 0
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        x = peer.step(network(x, t.expand(len(x))).prediction, t, x).prev_sample
    denoiser, how = NetworkDenoiser(network, schedule, Eps()), Sampling("ddpm", variance=variance)
    ours = sample(how, denoiser, starts(), schedule.sampling_sigmas(10), COND, lambda i: noise[i])
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def test_euler_ancestral_agrees_with_diffusers_when_both_get_the_same_noise_and_is_ddpm(monkeypatch):
    import diffusers

    schedule, noise = Schedule(CONFIG), [starts(seed=100 + i) for i in range(10)]
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    peer = diffusers.EulerAncestralDiscreteScheduler(1000, **common, timestep_spacing="trailing")
    peer.set_timesteps(10)
    x = starts() * peer.sigmas[0].double().square().add(1).sqrt()
    for i, t in enumerate(peer.timesteps):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *_, i=i, **__: noise[i]
        )
        sigma = peer.sigmas[i].double()
        peer.scale_model_input(x, t)
        eps = (x - gaussian_denoiser(x, sigma.expand(len(x)), COND)) / sigma
        x = peer.step(eps, t, x).prev_sample
    draw = lambda name: sample(  # noqa: E731
        Sampling(name), gaussian_denoiser, starts(), schedule.sampling_sigmas(10), COND, lambda i: noise[i]
    )
    torch.testing.assert_close(draw("euler_ancestral"), x, rtol=0, atol=1e-4)  # their levels are float32
    assert torch.equal(draw("euler_ancestral"), draw("ddpm"))


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_the_last_step_returns_the_estimate_of_x0_itself(name):
    """In float32, where x + d dt would differ in the last bits."""
    answers = []

    def denoiser(x, sigma, cond):
        answers.append(gaussian_denoiser(x, sigma.float(), cond))
        return answers[-1]

    start, sigmas = starts(50).float(), Schedule(CONFIG).sampling_sigmas(6)
    x = sample(Sampling(name), denoiser, start, sigmas, COND, noise_like(start))
    assert torch.equal(x, answers[-1])


@pytest.mark.parametrize("config", [CONFIG, ZERO_SNR], ids=["usual", "zero terminal SNR"])
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_callback_sees_every_step_and_ends_the_run_with_the_state_that_it_saw(name, config):
    sigmas, noise = Schedule(config).sampling_sigmas(6), [starts(seed=300 + i) for i in range(6)]

    def run(until):
        seen = []

        def callback(step, sigma, x, x0):
            torch.testing.assert_close(x0, gaussian_denoiser(x, torch.full((len(x),), sigma), COND))
            seen.append((step, sigma, x))
            return step == until

        return sample(Sampling(name), gaussian_denoiser, starts(), sigmas, COND, lambda i: noise[i], callback), seen

    whole, seen = run(until=None)
    assert [(step, sigma) for step, sigma, _ in seen] == list(enumerate(sigmas[:-1].tolist()))
    unwatched = sample(Sampling(name), gaussian_denoiser, starts(), sigmas, COND, lambda i: noise[i])
    assert torch.equal(whole, unwatched)
    for until in (0, 1, 5):
        stopped, before = run(until)
        assert len(before) == until + 1 and torch.equal(stopped, seen[until][2]) and not torch.equal(stopped, whole)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun"])
def test_a_run_that_was_ended_goes_on_from_its_state_to_the_same_result(name):
    """Of samplers without memory: the state over sqrt(1 + sigma^2) is the start of the levels that are left."""
    sigmas, noise = Schedule(CONFIG).sampling_sigmas(8), [starts(seed=300 + i) for i in range(8)]
    run = lambda *more: sample(Sampling(name), gaussian_denoiser, *more)  # noqa: E731
    whole = run(starts(), sigmas, COND, lambda i: noise[i])
    state = run(starts(), sigmas, COND, lambda i: noise[i], lambda step, *_: step == 3)
    rest = run(state / (1 + sigmas[3] ** 2).sqrt(), sigmas[3:], COND, lambda i: noise[i + 3])
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_agrees_with_diffusers_at_every_eta_when_both_get_the_same_noise(eta, zero_terminal_snr):
    """v prediction, by a network that knows the best answer; with zero terminal SNR the first input is pure noise."""
    config = replace(CONFIG, prediction="v", zero_terminal_snr=zero_terminal_snr)
    schedule, noise = Schedule(config), [starts(seed=100 + i) for i in range(10)]
    network = knowing_network(schedule, Velocity())
    peer = peer_scheduler("ddim", schedule, 10, prediction_type="v_prediction")
    x = starts()
    for i, t in enumerate(peer.timesteps):
        v = network(x, t.expand(len(x)), None, False).prediction
        x = peer.step(v, t, x, eta=eta, variance_noise=noise[i]).prev_sample
    denoiser, sigmas = NetworkDenoiser(network, schedule, Velocity()), schedule.sampling_sigmas(10)
    ours = sample(Sampling("ddim", eta=eta), denoiser, starts(), sigmas, COND, lambda i: noise[i])
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_from_infinite_noise_every_sampler_starts_with_the_limit_of_ddims_step(name):
    """By hand: x_0 at pure noise is the mean of the data; then the same sampler, from the second level on."""
    sigmas = Schedule(ZERO_SNR).sampling_sigmas(12)
    eps, noise = starts(), [starts(seed=200 + i) for i in range(12)]
    assert math.isinf(sigmas[0]) and math.isfinite(sigmas[1])
    second = MEAN + sigmas[1] * (eps if SAMPLERS[name].order else noise[0])
    unit = second / (1 + sigmas[1] ** 2).sqrt()
    by_hand = sample(Sampling(name), gaussian_denoiser, unit, sigmas[1:], COND, lambda i: noise[i + 1])
    ours = sample(Sampling(name), gaussian_denoiser, eps, sigmas, COND, lambda i: noise[i])
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-9)


LIMITS = [
    Sampling("ddpm"),
    Sampling("ddpm", variance="beta"),
    Sampling("ddim"),
    Sampling("ddim", eta=0.5),
    Sampling("euler"),
]


@pytest.mark.parametrize("how", LIMITS, ids=lambda how: f"{how.sampler}-{how.variance}-{how.eta}")
def test_the_step_from_infinite_noise_is_the_limit_of_the_step_from_ever_more_noise(how):
    sigmas, errors = Schedule(ZERO_SNR).sampling_sigmas(5), []
    noise = [starts(seed=200 + i) for i in range(5)]
    at_infinity = sample(how, gaussian_denoiser, starts(), sigmas, COND, lambda i: noise[i])
    for top in (1e4, 1e6):
        sigmas[0] = top
        near = sample(how, gaussian_denoiser, starts(), sigmas, COND, lambda i: noise[i])
        errors.append((near - at_infinity).abs().max().item())
    assert errors[0] < 0.1 and errors[1] < errors[0] / 50


def test_one_step_from_infinite_noise_is_the_mean_of_the_data():
    for name in get_args(SamplerName):
        x = sample(Sampling(name), gaussian_denoiser, starts(), Schedule(ZERO_SNR).sampling_sigmas(1), COND, no_noise)
        assert torch.equal(x, torch.full_like(x, MEAN))


def test_euler_is_ddim_without_noise():
    sigmas = Schedule(CONFIG).sampling_sigmas(9)
    mixture, start = Mixture(), starts(8)[:, :, 0].reshape(8, 2, 1, 1)
    drawn = [sample(Sampling(name), mixture.denoiser, start, sigmas, COND, no_noise) for name in ("euler", "ddim")]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_sampler_asks_the_network_as_often_as_its_line_says(name):
    asked = []
    denoiser = lambda x, sigma, cond: asked.append(float(sigma[0])) or gaussian_denoiser(x, sigma, cond)  # noqa: E731
    sample(Sampling(name), denoiser, starts(), Schedule(CONFIG).sampling_sigmas(7), COND, noise_like(starts()))
    assert len(asked) == SAMPLERS[name].evaluations(7) and min(asked) > 0


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(name):
    start, sigmas = starts(6), Schedule(CONFIG).sampling_sigmas(10)
    noise = [starts(6, 100 + i) for i in range(10)]
    whole = sample(Sampling(name), gaussian_denoiser, start, sigmas, COND, lambda i: noise[i])
    alone = sample(Sampling(name), gaussian_denoiser, start[4:5], sigmas, COND, lambda i: noise[i][4:5])
    assert torch.equal(whole[4:5], alone)


def test_an_unknown_sampler_names_the_known_ones():
    expected = "got 'plms', expected one of " + ", ".join(get_args(SamplerName))
    with pytest.raises(ValueError, match=expected):
        sample(Sampling("plms"), gaussian_denoiser, starts(), Schedule(CONFIG).sampling_sigmas(5), COND, no_noise)


@pytest.mark.parametrize(("name", "eta"), [("heun", 0.5), ("ddpm", 1.0), ("ddim", 1.5), ("ddim", -0.1)])
def test_an_eta_that_means_nothing_is_refused(name, eta):
    with pytest.raises(ValueError, match="eta: got"):
        Sampling(name, eta=eta)
