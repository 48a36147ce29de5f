"""What diffusion does to an image, as two strips: forward, x_0 under more and more noise up to x_T; and reverse, x_T on
its way back, with the network's estimate of x_0 below each step. Of any system; latents are decoded to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.images.grid import image_grid
from raphael.base.stage import write_json
from raphael.diffusion.prediction import variance_preserving
from raphael.diffusion.sampling import ImageNoise, Parts, decode_images, generate_latents

if TYPE_CHECKING:
    from raphael.base.config.sampling import Sampling
    from raphael.systems.pipeline import Pipeline

PANELS = 8


@dataclass(frozen=True)
class Panel:
    """t: the timestep; sigma: spread / signal there, None where it is infinite. image: uint8 (H, W, 3)."""

    t: float
    sigma: float | None
    image: np.ndarray

    def told(self) -> dict[str, Any]:
        return {"t": round(self.t, 3), "sigma": self.sigma}


@torch.inference_mode()
def forward_strip(parts: Parts, x0: Tensor, noise: Tensor, panels: int = PANELS) -> list[Panel]:
    """x_t = signal x_0 + spread eps at `panels` timesteps, equally far apart, the first of them x_0 itself.

    x0, noise: (1, C, h, w).
    """
    last, found = parts.schedule.num_steps - 1, [Panel(0.0, 0.0, decode_images(parts, x0)[0])]
    for place in range(1, panels):
        t = torch.tensor([round(place / (panels - 1) * last)], device=x0.device)
        bar = float(parts.schedule.alpha_bar_at(t))
        noised = parts.schedule.add_noise(x0, noise, t)
        found.append(Panel(float(t), _sigma(bar), decode_images(parts, noised)[0]))
    return found


def reverse_strip(
    parts: Parts, prompt: str, seed: int, settings: Sampling, panels: int = PANELS
) -> tuple[list[Panel], list[Panel], Tensor]:
    """(x_t, the estimates of x_0 there, x_0): `panels` of the run's steps, equally far apart, and its end."""
    seen: list[tuple[float, Tensor, Tensor]] = []

    def watch(step: int, sigma: float, x: Tensor, x0: Tensor) -> None:
        seen.append((sigma, x.clone(), x0.clone()))

    end = generate_latents(parts, [prompt], [(seed, 0)], settings, callback=watch)
    chosen = [seen[round(place)] for place in np.linspace(0, len(seen) - 1, min(panels - 1, len(seen)))]
    noised, estimates = [], []
    for sigma, x, x0 in chosen:
        level = torch.tensor([sigma], dtype=torch.float64, device=x.device)
        t, told = float(parts.schedule.timestep(level)), None if np.isinf(sigma) else sigma
        seen_x, _, _ = variance_preserving(x, level.view(-1, 1, 1, 1).to(x))
        noised.append(Panel(t, told, decode_images(parts, seen_x)[0]))
        estimates.append(Panel(t, told, decode_images(parts, x0)[0]))
    last = Panel(0.0, 0.0, decode_images(parts, end)[0])
    return [*noised, last], [*estimates, last], end


def write_strips(pipeline: Pipeline, folder: Path, prompt: str, seed: int = 0) -> list[Path]:
    """forward.png, reverse.png and strips.json in `folder`; returns the PNGs. The image of both is the same one."""
    parts = pipeline.parts()
    noised, estimates, x0 = reverse_strip(parts, prompt, seed, pipeline.defaults)
    forward = forward_strip(parts, x0, ImageNoise([(seed, 0)], parts.latent_shape, x0.device).start())
    folder.mkdir(parents=True, exist_ok=True)
    _draw(folder / "forward.png", forward)
    _draw(folder / "reverse.png", [*noised, *estimates], len(noised))
    told = {"model": pipeline.identity, "prompt": prompt, "seed": seed, "sampling": vars(pipeline.defaults)}
    rows = {"forward": forward, "reverse": noised}
    write_json(folder / "strips.json", {**told, **{name: [p.told() for p in row] for name, row in rows.items()}})
    return [folder / "forward.png", folder / "reverse.png"]


def _draw(file: Path, panels: list[Panel], columns: int = 0) -> None:
    captions = [f"t = {panel.t:.0f}" for panel in panels]
    if columns:
        captions[columns:] = ["estimate of x_0"] * (len(panels) - columns)
        captions[columns - 1] = captions[-1] = "x_0"
    image_grid([panel.image for panel in panels], columns or len(panels), captions).save(file)


def _sigma(bar: float) -> float | None:
    return ((1 - bar) / bar) ** 0.5 if bar > 0 else None
