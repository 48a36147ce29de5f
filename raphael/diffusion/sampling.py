"""Sampling: images from the parts of a model: what the pipeline (raphael/generate) and a training run's grids share.

One image, one seed: every random number of image `index` is a function of (seed, index) alone, so image 17 is the
same whatever stands beside it: to the byte in batches of one size, otherwise to the rounding of kernels that choose
their order of summation by the batch size (measured: 2e-5 of latents of order 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from raphael.base.config.params import GenerateConfig
from raphael.base.config.sampling import Sampling
from raphael.base.precision import autocast
from raphael.diffusion.denoiser import Denoiser, NetworkDenoiser
from raphael.diffusion.guidance import ClassifierFreeGuidance, Thresholded
from raphael.diffusion.image_noise import BatchNoise, ImageNoise, ImageSeed
from raphael.diffusion.prediction import Prediction
from raphael.diffusion.samplers import Callback, Watch, sample, watch_of
from raphael.diffusion.schedule import Noise
from raphael.diffusion.scheduler import Scheduled, run_scheduler
from raphael.net.condition import Condition

if TYPE_CHECKING:
    from raphael.net.unet import UNet, UNetOutput

Wrap = Callable[[Denoiser], Denoiser]


@dataclass(frozen=True)
class Parts:
    """What sampling needs, as functions, so that a training run hands over what it holds in memory.

    encode: texts -> Condition; decode: scaled latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1];
    latent_shape: (C, h, w) of one image. guide: texts -> what wraps the denoiser of images of them, None: nothing does.
    then: of a cascade, what makes of the first network's images (B, C, h, w) of an order those that are decoded
    (raphael/diffusion/cascade.py); None: there is one network.
    """

    unet: UNet
    schedule: Noise
    prediction: Prediction
    encode: Callable[[list[str]], Condition]
    decode: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, int, int]
    guide: Callable[[list[str]], Wrap] | None = None
    then: Callable[[Tensor, Order], Tensor] | None = None


def sampling_of(config: GenerateConfig) -> Sampling:
    """Of params.yaml's `generate`, how to sample; the rest says what and how many."""
    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})


def generate_images(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[ImageSeed],
    settings: Sampling,
    negative_prompt: str = "",
    batch_size: int = 50,
) -> np.ndarray:
    """One image per prompt -> uint8 (n, H, W, 3). Raises ValueError where prompts and seeds differ in number."""
    if len(prompts) != len(seeds):
        raise ValueError(f"got {len(seeds)} seeds for {len(prompts)} prompts, expected one seed per image")
    images = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        latents = generate_latents(parts, list(prompts[part]), list(seeds[part]), settings, negative_prompt)
        images.append(decode_images(parts, latents))
    return np.concatenate(images)


@dataclass(frozen=True)
class Order:
    """One batch of B images to sample. All but what they are of, and from which noise, may be left out.

    noise: start() and noise(step), standard normal (B, C, h, w); null: the unconditional row, one for all or B.
    sigmas: (steps + 1,) falling to 0, None: the schedule's, settings.steps of them. scheduled: a diffusers scheduler in
    place of settings.sampler and of sigmas (raphael/diffusion/scheduler.py). collect: of NetworkDenoiser. wrap: of
    `guided_denoiser`.
    """

    cond: Condition
    null: Condition
    noise: BatchNoise
    settings: Sampling
    sigmas: Tensor | None = None
    scheduled: Scheduled | None = None
    callback: Callback | Watch | None = None
    collect: Callable[[UNetOutput], None] | None = None
    wrap: Wrap | None = None


def generate_latents(
    parts: Parts,
    prompts: list[str],
    seeds: list[ImageSeed],
    settings: Sampling,
    negative_prompt: str = "",
    callback: Callback | None = None,
) -> Tensor:
    """Generate scaled latents (n, C, h, w), one batch. The conditional and unconditional branch share one forward.

    callback: (step, sigma, x, x_0), raphael/diffusion/samplers.py; ended by it, the result is x = x_0 + sigma eps.
    """
    noise = ImageNoise(seeds, parts.latent_shape, next(parts.unet.parameters()).device)
    with torch.inference_mode():
        cond, null = encode_texts(parts, prompts), encode_texts(parts, [negative_prompt])
    wrap = parts.guide(prompts) if parts.guide else None
    return sample_order(parts, Order(cond, null, noise, settings, callback=callback, wrap=wrap))


@torch.inference_mode()
def sample_order(parts: Parts, order: Order) -> Tensor:
    """Scaled latents (B, C, h, w) of one batch; of a cascade its last network's, or the first's with `until` base.

    Raises ValueError for an option of cascades where there is one network.
    """
    if parts.then is None:
        order.settings.expect_one_network()
    first = _sampled(parts, order)
    return first if parts.then is None or order.settings.until == "base" else parts.then(first, order)


def _sampled(parts: Parts, order: Order) -> Tensor:
    settings, device = order.settings, next(parts.unet.parameters()).device
    denoiser = guided_denoiser(parts, settings, order.null, order.collect, order.wrap)
    remembering = getattr(parts.unet, "remembering", contextlib.nullcontext)  # of texts, where a network reads any
    with evaluating(parts.unet), remembering(), autocast(settings.precision, device):
        if order.scheduled is not None:
            watch = watch_of(order.callback)
            return run_scheduler(order.scheduled, parts.schedule, denoiser, order.noise.start(), order.cond, watch)
        sigmas = parts.schedule.sampling_sigmas(settings.steps) if order.sigmas is None else order.sigmas
        return sample(settings, denoiser, order.noise.start(), sigmas, order.cond, order.noise, order.callback)


def guided_denoiser(
    parts: Parts,
    settings: Sampling,
    null: Condition,
    collect: Callable[[UNetOutput], None] | None = None,
    wrap: Wrap | None = None,
) -> Denoiser:
    """The network as a Denoiser, guided, then (where asked for) thresholded: guidance is what drives values out.

    null: of the unconditional branch, one row or one for each sample. collect: of NetworkDenoiser. wrap: acts on what
    classifier-free guidance returns, as gradients of a classifier do.
    """
    denoiser: Denoiser = ClassifierFreeGuidance(
        NetworkDenoiser(parts.unet, parts.schedule, parts.prediction, collect),
        settings.guidance_scale,
        null,
        parts.schedule.sigma_bounds(*settings.guidance_interval),
        settings.guidance_rescale,
    )
    denoiser = wrap(denoiser) if wrap else denoiser
    if settings.threshold == "none":
        return denoiser
    return Thresholded(denoiser, settings.threshold, settings.threshold_percentile, settings.threshold_bound)


def encode_texts(parts: Parts, texts: list[str]) -> Condition:
    """The condition of a batch of prompts, each different text encoded once."""
    unique = sorted(set(texts))
    device = next(parts.unet.parameters()).device
    cond = parts.encode(unique)
    return cond.rows([unique.index(text) for text in texts]).to(device)


@torch.inference_mode()
def decode_images(parts: Parts, latents: Tensor) -> np.ndarray:
    """Scaled latents (n, C, h, w) -> uint8 (n, H, W, 3), rounded to nearest."""
    return as_bytes(parts.decode(latents))


def as_bytes(images: Tensor) -> np.ndarray:
    """(n, 3, H, W) in [-1, 1], beyond them clipped -> uint8 (n, H, W, 3)."""
    images = images.float().clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class evaluating:  # noqa: N801  reads as a verb: `with evaluating(unet):`
    """Evaluation mode inside, the former mode after: a training run generates grids between two of its steps."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()

    def __exit__(self, *exception: object) -> None:
        self.module.train(self.was_training)
