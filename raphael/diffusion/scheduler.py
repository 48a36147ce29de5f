"""Schedulers of diffusers over our Denoiser: `set_timesteps`, `scale_model_input`, `step`, and nothing else of them.

A scheduler keeps its samples in coordinates of its own and wants what a network predicted. Our Denoiser takes
x = x_0 + sigma eps and returns x_0, guided and thresholded. Three forms, by the noise that the scheduler knows:

| form | its sample | what it wants |
| vp: a product of betas | `scale_model_input` gives x_vp = signal x_0 + spread eps | eps, v or x_0: its config's |
| flow: s = timestep / T | (1 - s) x_0 + s eps | eps - x_0 |
| edm | x_0 + sigma eps | (x_0 - c_skip x) / c_out, arXiv 2206.00364, eq. 7 |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raphael.base.config.preset import DiffusionConfig
from raphael.diffusion.denoiser import Denoiser
from raphael.diffusion.noise import CosineNoise, EdmNoise, RectifiedFlow
from raphael.diffusion.prediction import Eps, Sample, Velocity
from raphael.diffusion.samplers import Ended, Watch
from raphael.diffusion.schedule import Noise, Schedule
from raphael.net.condition import Condition

BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
OUTPUTS = {"epsilon": Eps(), "v_prediction": Velocity(), "sample": Sample()}
MOST_APART = 1e-3  # of alpha_bar: theirs are products of a thousand float32 numbers


class SchedulerConfig(dict):
    """A mapping whose entries are attributes, too, as a diffusers config is."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class OwnScheduler:
    """What `pipeline.scheduler` is while our own samplers are used: `X.from_config(pipeline.scheduler.config)` is a
    diffusers scheduler for the same noise."""

    config: SchedulerConfig


@dataclass(frozen=True)
class Scheduled:
    """How a diffusers scheduler is to run over one batch.

    asked: of its `set_timesteps` one of num_inference_steps, timesteps, sigmas. options: of its `step`, those that it
    has (eta). generators: for the noise that it adds, one or one for each sample.
    """

    scheduler: Any
    asked: dict[str, Any]
    generators: torch.Generator | Sequence[torch.Generator]
    options: dict[str, Any]


def scheduler_config(diffusion: DiffusionConfig) -> SchedulerConfig:
    """diffusers' words for a model's noise and prediction, which its schedulers read.

    trailing: as Schedule.sampling_sigmas. set_alpha_to_one: the last step ends at the image itself.
    """
    steps = {"num_train_timesteps": diffusion.num_steps}
    if diffusion.schedule == "rectified_flow":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0, "shift": 1.0}
        return SchedulerConfig(_class_name="FlowMatchEulerDiscreteScheduler", **steps, **flow)
    if diffusion.schedule == "edm":
        edm = diffusion.edm
        levels = {"sigma_min": edm.sigma_min, "sigma_max": edm.sigma_max, "sigma_data": diffusion.sigma_data}
        return SchedulerConfig(
            _class_name="EDMEulerScheduler", **steps, **levels, rho=edm.rho, sigma_schedule="karras",
            prediction_type="epsilon",
        )  # fmt: skip
    if diffusion.schedule == "continuous_cosine":
        noise = CosineNoise(diffusion.num_steps)
        alpha_bar = noise.alpha_bar_at(torch.arange(diffusion.num_steps))
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return SchedulerConfig(
            _class_name="DDIMScheduler", **steps, trained_betas=betas.tolist(), prediction_type="v_prediction",
            timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True, clip_sample=False,
        )  # fmt: skip
    return SchedulerConfig(
        _class_name="DDIMScheduler",
        **steps,
        beta_schedule=BETAS[diffusion.schedule],
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        prediction_type=PREDICTIONS.get(diffusion.prediction, "v_prediction"),
        rescale_betas_zero_snr=diffusion.zero_terminal_snr,
        timestep_spacing="trailing",
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
    )


def form_of(scheduler: Any) -> str:
    """vp, flow or edm. Raises ValueError for what is no scheduler, or predicts what none of the forms has."""
    missing = [name for name in ("set_timesteps", "step", "config") if not hasattr(scheduler, name)]
    if missing:
        got = type(scheduler).__name__
        raise ValueError(f"scheduler: got {got} without {', '.join(missing)}, expected a scheduler of diffusers")
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith("EDM"):
        return "edm"
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow"
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in OUTPUTS or not hasattr(scheduler, "alphas_cumprod"):
        expected = f"one over betas with prediction_type {', '.join(OUTPUTS)}, FlowMatch* or EDM*"
        raise ValueError(f"scheduler: got {name} with prediction_type {prediction}, expected {expected}")
    return "vp"


def expect_fit(scheduler: Any, noise: Noise) -> None:
    """Raises ValueError where the scheduler knows other noise than the model was trained with."""
    advice = f"make it by {type(scheduler).__name__}.from_config(pipeline.scheduler.config)"
    form, wanted = form_of(scheduler), {RectifiedFlow: "flow", EdmNoise: "edm"}.get(type(noise), "vp")
    if form != wanted:
        raise ValueError(f"scheduler: got one of {form} noise, expected {wanted}, which the model was trained with")
    steps = scheduler.config.get("num_train_timesteps")
    if form != "edm" and steps != noise.num_steps:
        raise ValueError(f"scheduler: got num_train_timesteps {steps}, expected {noise.num_steps}; {advice}")
    if isinstance(noise, Schedule | CosineNoise):
        alpha_bar = noise.alpha_bar_at(torch.arange(noise.num_steps))
        apart = float((scheduler.alphas_cumprod.double().cpu() - alpha_bar).abs().max())
        if apart > MOST_APART:
            raise ValueError(f"scheduler: its betas are not the model's (alpha_bar differs by {apart:.2g}); {advice}")


def run_scheduler(
    scheduled: Scheduled, noise: Noise, denoiser: Denoiser, start: Tensor, cond: Condition, watch: Watch
) -> Tensor:
    """Latents (B, C, h, w) from `start`, standard normal; `watch` is told x in our coordinates, and moves the
    scheduler's own sample. Raises ValueError for timesteps or sigmas that the scheduler does not take."""
    scheduler = scheduled.scheduler
    set_steps(scheduler, scheduled.asked, start.device)
    options = {
        name: value
        for name, value in {**scheduled.options, "generator": scheduled.generators}.items()
        if name in inspect.signature(scheduler.step).parameters
    }
    form, sample = form_of(scheduler), start * getattr(scheduler, "init_noise_sigma", 1.0)
    try:
        for i, t in enumerate(scheduler.timesteps):
            x, sigma, read = _read(form, scheduler, noise, sample, t, i)
            x0 = denoiser(x, sigma.expand(len(x)), cond)
            if watch(i, float(sigma), x, x0):
                return sample
            output = _output(form, scheduler, x0, read, sigma)
            sample = watch.moved(i, scheduler.step(output, t, sample, **options).prev_sample)
    except Ended as ended:
        return ended.x
    return sample


def set_steps(scheduler: Any, asked: dict[str, Any], device: torch.device) -> None:
    known = inspect.signature(scheduler.set_timesteps).parameters
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"{unknown[0]}: got it with {type(scheduler).__name__}, whose steps are not chosen so")
    scheduler.set_timesteps(**asked, device=device)


def _read(
    form: str, scheduler: Any, noise: Noise, sample: Tensor, t: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> x = x_0 + sigma eps (eps itself at infinite sigma), sigma () float64, the sample as `_output` takes it."""
    if form == "edm":
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)  # it asserts that it was asked
        return sample, scheduler.sigmas[step].double().to(sample.device), sample
    if form == "flow":
        s = (t.double() / scheduler.config.num_train_timesteps).clamp(max=1).to(sample.device)
        x = sample if s == 1 else sample / (1 - s).to(sample.dtype)
        return x, s / (1 - s), sample
    sigma = noise.sigma_at(t.double().reshape(1)).squeeze(0).to(sample.device)
    x_vp = scheduler.scale_model_input(sample, t)
    x = x_vp if torch.isinf(sigma) else x_vp * (1 + sigma**2).sqrt().to(sample.dtype)
    return x, sigma, x_vp


def _output(form: str, scheduler: Any, x0: Tensor, read: Tensor, sigma: Tensor) -> Tensor:
    """What a network that estimates x0 would have predicted."""
    if form == "edm":
        data = scheduler.config.sigma_data
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / (sigma**2 + data**2).sqrt()
        return (x0 - c_skip.to(x0) * read) / c_out.to(x0)
    if form == "flow":
        return (read - x0) / (1 / (1 + 1 / sigma)).to(x0)
    signal, spread = (1 + sigma**2).rsqrt().to(x0), (1 + sigma**-2).rsqrt().to(x0)
    eps = (read - signal * x0) / spread
    return OUTPUTS[scheduler.config.get("prediction_type", "epsilon")].target(x0, eps, signal, spread)
