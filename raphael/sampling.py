"""Drawing pictures from the parts of a model: what the pipeline (raphael/generate) and a training run's grids share.

One picture, one seed: every random number of picture `index` is a function of (seed, index) alone, so picture 17 is the
same whatever stands beside it: to the byte in batches of one size, otherwise to the rounding of kernels that choose
their order of summation by the batch size (measured: 2e-5 of latents of order 1).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raphael.config import GenerateConfig, SamplerName, ThresholdKind
from raphael.diffusion.denoiser import Denoiser, NetworkDenoiser, TextCondition
from raphael.diffusion.guidance import ClassifierFreeGuidance, Thresholded
from raphael.diffusion.samplers import sample
from raphael.diffusion.schedule import Schedule
from raphael.precision import autocast
from raphael.randomness import SampleRng

if TYPE_CHECKING:
    from raphael.net.unet import UNet

PictureSeed = tuple[int, int]  # (seed, index): all that the noise of a picture depends on


@dataclass(frozen=True)
class Parts:
    """What drawing needs, as functions, so that a training run hands over what it holds in memory.

    encode: texts -> TextCondition; decode: scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1];
    latent_shape: (C, h, w) of one picture.
    """

    unet: UNet
    schedule: Schedule
    prediction: str
    encode: Callable[[list[str]], TextCondition]
    decode: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Sampling:
    """How to draw. guidance_scale 1 is no guidance; 0 ignores the prompt. The fields are those of GenerateConfig."""

    sampler: SamplerName = "dpmpp_2m"
    steps: int = 15
    guidance_scale: float = 4.0
    precision: str = "fp32"  # of the network's products: fp32, bf16, or auto (raphael/precision.py)
    eta: float = 0.0  # of ddim
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the timesteps, 0 the cleanest, 1 the noisiest
    threshold: ThresholdKind = "none"
    threshold_percentile: float = 99.5
    threshold_bound: float = 1.0


def sampling_of(config: GenerateConfig) -> Sampling:
    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})


def draw_images(
    parts: Parts,
    prompts: Sequence[str],
    seeds: Sequence[PictureSeed],
    settings: Sampling,
    negative_prompt: str = "",
    batch_size: int = 50,
) -> np.ndarray:
    """Draw one picture per prompt -> uint8 (n, H, W, 3). Raises ValueError where prompts and seeds differ in number."""
    if len(prompts) != len(seeds):
        raise ValueError(f"got {len(seeds)} seeds for {len(prompts)} prompts, expected one seed per picture")
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        latents = draw_latents(parts, list(prompts[part]), list(seeds[part]), settings, negative_prompt)
        pictures.append(decode_pictures(parts, latents))
    return np.concatenate(pictures)


@torch.inference_mode()
def draw_latents(
    parts: Parts,
    prompts: list[str],
    seeds: list[PictureSeed],
    settings: Sampling,
    negative_prompt: str = "",
) -> Tensor:
    """Draw scaled latents (n, C, h, w), one batch. The conditional and unconditional branch share one forward."""
    denoiser = guided_denoiser(parts, settings, negative_prompt)
    device = next(parts.unet.parameters()).device
    noise = PictureNoise(seeds, parts.latent_shape, device)
    sigmas = parts.schedule.sampling_sigmas(settings.steps)
    with evaluating(parts.unet), parts.unet.remembering(), autocast(settings.precision, device):
        cond = encode_texts(parts, prompts)
        return sample(settings.sampler, denoiser, noise.start(), sigmas, cond, noise, settings.eta)


def guided_denoiser(parts: Parts, settings: Sampling, negative_prompt: str = "") -> Denoiser:
    """The network as a Denoiser, guided, then (where asked for) thresholded: guidance is what drives values out."""
    low, high = settings.guidance_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval: got {low:g} to {high:g}, expected two shares, the lower first")
    denoiser: Denoiser = ClassifierFreeGuidance(
        NetworkDenoiser(parts.unet, parts.schedule, parts.prediction),
        settings.guidance_scale,
        encode_texts(parts, [negative_prompt]),
        parts.schedule.sigma_bounds(low, high),
    )
    if settings.threshold == "none":
        return denoiser
    return Thresholded(denoiser, settings.threshold, settings.threshold_percentile, settings.threshold_bound)


def encode_texts(parts: Parts, texts: list[str]) -> TextCondition:
    """The condition of a batch of prompts, each different text encoded once."""
    unique = sorted(set(texts))
    device = next(parts.unet.parameters()).device
    cond = parts.encode(unique)
    rows = torch.tensor([unique.index(text) for text in texts], device=cond.context.device)
    return TextCondition(cond.context[rows].to(device), cond.mask[rows].to(device))


@torch.inference_mode()
def decode_pictures(parts: Parts, latents: Tensor) -> np.ndarray:
    """Scaled latents (n, C, h, w) -> uint8 (n, H, W, 3), rounded to nearest."""
    pictures = parts.decode(latents).float().clamp(-1, 1)
    return ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class PictureNoise:
    """Standard normal noise (B, C, h, w), each picture's from its own seed: start(), noise(step)."""

    def __init__(self, seeds: list[PictureSeed], shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.sources = [SampleRng(seed, 0, [index]) for seed, index in seeds]
        self.shape = shape
        self.device = device

    def start(self) -> Tensor:
        return self._draw("picture")

    def __call__(self, step: int) -> Tensor:
        return self._draw(f"picture step {step}")

    def _draw(self, stream: str) -> Tensor:
        rows = [torch.as_tensor(source.normal(stream, self.shape)) for source in self.sources]
        return torch.cat(rows).to(self.device)


class evaluating:  # noqa: N801  reads as a verb: `with evaluating(unet):`
    """Evaluation mode inside, the former mode after: a training run draws grids between two of its steps."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()

    def __exit__(self, *exception: object) -> None:
        self.module.train(self.was_training)


GRID_WIDTH_PX = 160  # of a captioned tile: small pictures are enlarged to it, so that a caption has room
CAPTION_PX, CAPTION_LINES = 13, 3


def image_grid(images: Sequence[Any], columns: int, captions: Sequence[str] = (), margin_px: int = 4) -> Any:
    """Lay pictures (uint8 (H, W, 3) arrays or PIL images of one size) out as a grid -> PIL.Image, RGB, white ground.

    captions: up to three lines below each picture; pictures are then enlarged by a whole factor to about 160 px.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images]
    if not pictures:
        raise ValueError("got no pictures for a grid, expected at least one")
    scale = max(1, round(GRID_WIDTH_PX / pictures[0].width)) if captions else 1
    width, height = (scale * side for side in pictures[0].size)
    text_px = CAPTION_LINES * CAPTION_PX + margin_px if captions else 0
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    cell_w, cell_h = width + margin_px, height + text_px + margin_px
    grid = Image.new("RGB", (columns * cell_w + margin_px, rows * cell_h + margin_px), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, picture in enumerate(pictures):
        x, y = margin_px + (i % columns) * cell_w, margin_px + (i // columns) * cell_h
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if i < len(captions):
            for line, text in enumerate(_wrapped(captions[i], width, font)):
                draw.text((x, y + height + line * CAPTION_PX), text, fill="black", font=font)
    return grid


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """At most CAPTION_LINES lines that fit into `width` px; letters differ in width, so lines are measured."""
    for chars in range(max(1, len(caption)), 0, -1):
        lines = textwrap.wrap(caption, chars, max_lines=CAPTION_LINES, placeholder=" …"[:chars])
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return []
