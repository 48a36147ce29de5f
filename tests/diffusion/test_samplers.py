import pytest
import torch

from raphael.config import DiffusionConfig
from raphael.diffusion.denoiser import NetworkDenoiser, TextCondition
from raphael.diffusion.guidance import ClassifierFreeGuidance
from raphael.diffusion.samplers import ddim, dpmpp_2m, sample
from raphael.diffusion.schedule import Schedule

CONFIG = DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "eps")
COND = TextCondition(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
MEAN, SPREAD = 1.5, 0.4  # the data of these tests: x_0 ~ N(MEAN, SPREAD^2)


def gaussian_denoiser(x, sigma, cond):
    """E[x_0 | x] in closed form for Gaussian data."""
    sigma = sigma.view(-1, 1, 1, 1)
    return MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)


def starts(count=4, seed=0):
    return torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def no_noise(i):
    raise AssertionError("a deterministic sampler asked for noise")


def exact_flow(x, sigma):
    """The probability-flow ODE of Gaussian data, solved: distance to the mean shrinks by the ratio of spreads."""
    return MEAN + (x - MEAN) * SPREAD / (SPREAD**2 + sigma**2) ** 0.5


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2)])
def test_deterministic_samplers_converge_to_the_ode_at_their_order(sampler, order):
    schedule = Schedule(CONFIG)
    top = float(schedule.sigma[-1])
    x = starts() * top
    errors = []
    for steps in (20, 40):
        # geometric down to a small sigma: the last step to zero then costs nothing that would hide the order
        sigmas = torch.cat([torch.logspace(0, -4, steps, dtype=torch.float64) * top, torch.zeros(1)])
        errors.append((sampler(gaussian_denoiser, x, sigmas, COND, no_noise) - exact_flow(x, top)).abs().max().item())
    assert errors[1] < errors[0] / (2**order * 0.85), errors


def test_ddpm_reaches_the_mean_and_variance_of_the_data():
    schedule = Schedule(CONFIG)
    generator = torch.Generator().manual_seed(1)
    start = starts(4000)
    sigmas = schedule.sampling_sigmas(1000)  # the posterior's variance is exact only in the limit of small steps
    x = sample("ddpm", gaussian_denoiser, start, sigmas, COND, lambda i: torch.randn(start.shape, generator=generator))
    assert abs(x.mean().item() - MEAN) < 0.02
    assert abs(x.std().item() - SPREAD) < 0.02


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_a_sampler_agrees_with_diffusers_on_the_same_denoiser(name):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    common = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
    }
    if name == "ddim":
        peer = DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    else:
        peer = DPMSolverMultistepScheduler(**common, final_sigmas_type="zero", lower_order_final=True)
    schedule = Schedule(CONFIG)
    peer.set_timesteps(20)
    x = starts()
    for t in peer.timesteps:
        sigma = schedule.sigma[int(t)]
        scale = (1 + sigma**2).sqrt()
        x0 = gaussian_denoiser(x * scale, sigma.expand(len(x)), COND)
        x = peer.step((x * scale - x0) / sigma, t, x).prev_sample
    ours = sample(name, gaussian_denoiser, starts(), schedule.sampling_sigmas(20), COND, no_noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_network_that_knows_the_truth_is_wrapped_into_a_denoiser_that_returns_x0(prediction):
    schedule = Schedule(CONFIG)
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
    estimate = NetworkDenoiser(Knowing(), schedule, prediction)(x, sigma, COND)
    torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-9)


def test_guidance_is_the_affine_combination_and_skips_the_branch_it_does_not_need():
    sizes = []

    def denoiser(x, sigma, cond):
        sizes.append(len(x))
        return x + cond.context.view(-1, 1, 1, 1)

    cond = TextCondition(torch.full((3, 1, 1), 2.0), torch.ones(3, 1, dtype=torch.bool))
    null = TextCondition(torch.full((1, 1, 1), -1.0), torch.ones(1, 1, dtype=torch.bool))
    x, sigma = torch.zeros(3, 1, 2, 2), torch.ones(3)
    values = [ClassifierFreeGuidance(denoiser, s, null)(x, sigma, cond).unique().tolist() for s in (0.0, 1.0, 4.0)]
    assert values == [[-1.0], [2.0], [-1.0 + 4.0 * 3.0]]
    assert sizes == [3, 3, 6]


def test_an_image_does_not_depend_on_its_neighbours_in_the_batch():
    schedule, start = Schedule(CONFIG), starts(6)
    noise = [starts(6, 100 + i) for i in range(10)]
    whole = sample("ddpm", gaussian_denoiser, start, schedule.sampling_sigmas(10), COND, lambda i: noise[i])
    alone = sample(
        "ddpm", gaussian_denoiser, start[4:5], schedule.sampling_sigmas(10), COND, lambda i: noise[i][4:5]
    )
    assert torch.equal(whole[4:5], alone)


def test_an_unknown_sampler_names_the_known_ones():
    with pytest.raises(ValueError, match="got 'plms', expected one of ddpm, ddim, dpmpp_2m"):
        sample("plms", gaussian_denoiser, starts(), Schedule(CONFIG).sampling_sigmas(5), COND, no_noise)
