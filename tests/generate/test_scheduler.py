"""`pipeline.scheduler`: diffusers' schedulers over our models, against diffusers' own loop and our own samplers."""

import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from truth.closed_form_diffusion import MEAN, SPREAD, gaussian_denoiser
from truth.tiny_raphael import write_pipeline

from raphael.base.config.sampling import Sampling
from raphael.diffusion.image_noise import ImageNoise
from raphael.diffusion.noise import noise_of
from raphael.diffusion.samplers import UNWATCHED, sample
from raphael.diffusion.scheduler import OwnScheduler, Scheduled, expect_fit, run_scheduler, scheduler_config
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition

VP = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
OTHERS = ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


@pytest.fixture
def own(pipeline):
    yield pipeline
    pipeline.scheduler = OwnScheduler(scheduler_config(pipeline.diffusion))


def made(kind, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_config(config)


def starts(dtype=torch.float64):
    return torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=dtype)


def run(scheduler, noise, start, steps, denoiser=gaussian_denoiser):
    scheduled = Scheduled(scheduler, {"num_inference_steps": steps}, torch.Generator().manual_seed(0), {})
    return run_scheduler(scheduled, noise, denoiser, start, Condition(), UNWATCHED)


def theirs(scheduler, pipeline, prompts, start, steps):
    """diffusers' denoising loop (StableDiffusionPipeline.__call__, step 7), without guidance, on the bare network."""
    cond = pipeline.encode(prompts)
    scheduler.set_timesteps(steps)
    latents = start * scheduler.init_noise_sigma
    with torch.inference_mode():
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(latents, t)
            output = pipeline.unet(given, t.float().expand(len(given)), cond).prediction
            latents = scheduler.step(output, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("name", [*VP, "PNDMScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_scheduler_drives_the_network_as_diffusers_own_loop_does(own, name, prediction):
    kind = VP.get(name) or getattr(diffusers, name)
    config = replace(own.diffusion, prediction=prediction, zero_terminal_snr=False)
    from raphael.diffusion.prediction import prediction_of

    before = own.diffusion, own.prediction, own.schedule
    own.diffusion, own.prediction, own.schedule = config, prediction_of(config), noise_of(config)
    try:
        own.scheduler = made(kind, own.scheduler.config)
        start = ImageNoise([(2, 0), (2, 1)], own.parts().latent_shape).start()
        named = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent", "seed": 2}
        ours = own(["a ring", "a star"], **named).images
        loop = theirs(made(kind, own.scheduler.config), own, ["a ring", "a star"], start, 5)
    finally:
        own.diffusion, own.prediction, own.schedule = before
    torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5 * float(loop.abs().max()))


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", list(VP))
def test_a_scheduler_and_our_sampler_of_that_name_agree(pipeline, name, steps):
    """From the same start: Euler's and Heun's schedulers scale theirs by sigma, ours by sqrt(1 + sigma^2)."""
    noise = noise_of(replace(pipeline.diffusion, prediction="eps", zero_terminal_snr=False))
    scheduler = made(VP[name], scheduler_config(replace(pipeline.diffusion, prediction="eps", zero_terminal_snr=False)))
    scheduler.alphas_cumprod = noise.alpha_bar.clone()  # theirs are products of a thousand float32 numbers, 1e-6 off
    scale = (1 + noise.sigma[-1] ** -2).sqrt() if name in ("euler", "heun") else 1.0
    found = run(scheduler, noise, starts() * scale, steps)
    ours = sample(
        Sampling(name), gaussian_denoiser, starts(), noise.sampling_sigmas(steps), Condition(), lambda i: starts()
    )
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ddim_over_v_up_to_a_last_step_without_signal_is_diffusers_own(pipeline, zero_terminal_snr, steps):
    """Their loop by hand, in their coordinates; the scheduler in ours, and our sampler."""
    config = replace(pipeline.diffusion, prediction="v", zero_terminal_snr=zero_terminal_snr)
    noise, scheduler = noise_of(config), made(diffusers.DDIMScheduler, scheduler_config(config))
    told = scheduler.config
    assert told.prediction_type == "v_prediction" and told.rescale_betas_zero_snr == zero_terminal_snr
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), noise.alpha_bar, rtol=0, atol=1e-5)
    assert (scheduler.alphas_cumprod[-1] == 0) == zero_terminal_snr
    scheduler.alphas_cumprod = noise.alpha_bar.clone()  # theirs are products of a thousand float32 numbers
    scheduler.set_timesteps(steps)
    x = starts()
    for t in scheduler.timesteps:
        signal, spread = noise.alpha_bar[t].sqrt(), (1 - noise.alpha_bar[t]).sqrt()
        x0 = MEAN + signal * SPREAD**2 / ((signal * SPREAD) ** 2 + spread**2) * (x - signal * MEAN)
        x = scheduler.step(signal * (x - signal * x0) / spread - spread * x0, t, x).prev_sample
    how = Sampling("ddim")
    ours = sample(how, gaussian_denoiser, starts(), noise.sampling_sigmas(steps), Condition(), lambda i: starts())
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(run(scheduler, noise, starts(), steps), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "kind", "name"),
    [
        ("rectified_flow", diffusers.FlowMatchEulerDiscreteScheduler, "euler"),
        ("edm", diffusers.EDMEulerScheduler, "euler"),
        ("edm", diffusers.EDMDPMSolverMultistepScheduler, "dpmpp_2m"),
    ],
)
def test_a_scheduler_of_flow_or_edm_and_our_sampler_agree(pipeline, schedule, kind, name):
    prediction = {"rectified_flow": "flow", "edm": "edm"}[schedule]
    flow = schedule == "rectified_flow"
    config = replace(pipeline.diffusion, schedule=schedule, prediction=prediction, zero_terminal_snr=flow)
    noise, steps = noise_of(config), 10
    scheduler = made(kind, scheduler_config(config))
    expect_fit(scheduler, noise)
    start = starts(torch.float32)
    found = run(scheduler, noise, start, steps, lambda x, sigma, cond: gaussian_denoiser(x, sigma.float(), cond))
    if flow:  # theirs end at time 1 / T before 0, not at equal steps to 0
        levels = torch.cat([scheduler.timesteps.double() / 1000, torch.zeros(1, dtype=torch.float64)])
        levels = levels / (1 - levels)
    else:
        levels = scheduler.sigmas.double()
        start = start * float(scheduler.init_noise_sigma / (1 + levels[0] ** 2).sqrt())
    ours = sample(
        Sampling(name), lambda x, sigma, cond: gaussian_denoiser(x, sigma.float(), cond), start, levels, Condition(),
        lambda i: start,
    )  # fmt: skip
    torch.testing.assert_close(found, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_every_scheduler_draws_with_guidance_and_repeats_itself(own, name):
    plain = own("a ring", num_inference_steps=4, output_type="latent").images
    own.scheduler = made(getattr(diffusers, name), own.scheduler.config)
    one, again, other = (own("a ring", num_inference_steps=4, seed=s, output_type="latent").images for s in (0, 0, 1))
    assert torch.isfinite(one).all() and torch.equal(one, again)
    assert not torch.equal(one, other) and not torch.equal(one, plain)


def test_the_noise_that_a_scheduler_adds_is_each_images_own(own):
    own.scheduler = made(diffusers.EulerAncestralDiscreteScheduler, own.scheduler.config)
    both = own(["a ring", "a star"], num_inference_steps=4, output_type="np").images
    alone = own("a ring", num_inference_steps=4, output_type="np").images
    np.testing.assert_allclose(both[0], alone[0], atol=1.01 / 255)
    make = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    first, second = (own("a ring", num_inference_steps=4, generator=make(), output_type="np").images for _ in range(2))
    assert np.array_equal(first, second)


def test_the_scheduler_can_be_read_set_and_given_back(own):
    plain = own("a ring", num_inference_steps=4, output_type="latent").images
    before = own.scheduler
    assert before.config.num_train_timesteps == before.config["num_train_timesteps"] == own.diffusion.num_steps
    own.scheduler = made(diffusers.DDIMScheduler, before.config)
    assert isinstance(own.scheduler, diffusers.DDIMScheduler)
    own.scheduler = made(diffusers.EulerDiscreteScheduler, own.scheduler.config)
    assert not torch.equal(own("a ring", num_inference_steps=4, output_type="latent").images, plain)
    own.scheduler = before
    assert torch.equal(own("a ring", num_inference_steps=4, output_type="latent").images, plain)


def test_a_scheduler_takes_eta_and_timesteps_as_in_diffusers(own):
    own.scheduler = made(diffusers.DDIMScheduler, own.scheduler.config)
    calm, wild = (own("a", num_inference_steps=3, eta=eta, output_type="latent").images for eta in (0.0, 1.0))
    assert not torch.equal(calm, wild)
    with pytest.raises(ValueError, match="timesteps: got it with DDIMScheduler, whose steps are not chosen so"):
        own("a", timesteps=[900, 500])
    own.scheduler = made(diffusers.DPMSolverMultistepScheduler, own.scheduler.config)
    seen = []
    own("a", timesteps=[900, 500, 100], callback_on_step_end=lambda pipe, i, t, told: seen.append(round(t)))
    assert seen == [900, 500, 100]


def test_a_callback_interrupts_a_schedulers_run_too(own):
    own.scheduler = made(diffusers.DDIMScheduler, own.scheduler.config)
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    stopped = own("a", num_inference_steps=4, callback_on_step_end=stop, output_type="latent").images
    assert len(seen) == 2 and torch.equal(stopped, seen[-1])


def test_a_scheduler_for_other_noise_is_refused(own):
    with pytest.raises(ValueError, match="scheduler: its betas are not the model's .*from_config"):
        own.scheduler = diffusers.DDIMScheduler(beta_start=0.01, num_train_timesteps=own.diffusion.num_steps)
    with pytest.raises(ValueError, match="scheduler: got num_train_timesteps 7, expected 1000"):
        own.scheduler = diffusers.DDIMScheduler(num_train_timesteps=7)
    with pytest.raises(ValueError, match="scheduler: got one of flow noise, expected vp"):
        own.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="scheduler: got str without set_timesteps, step, config"):
        own.scheduler = "ddim"
    with pytest.raises(ValueError, match="scheduler: got UnCLIPScheduler with prediction_type other"):
        own.scheduler = diffusers.UnCLIPScheduler(prediction_type="other")
