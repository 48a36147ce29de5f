"""The denoising loss by timestep on scenes that no training saw: same scenes, noise and timesteps for every model.

python -m flows.timestep_loss     in a workspace with models/raphael; writes reports/timestep_loss.json
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import scene_captions, scenes
from raphael.config import Config, load_config
from raphael.stage import one_clear_line, write_json

BINS = 10
SCENES = 128
BATCH = 64


def heldout_pictures(config: Config, number: int) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 (number, H, W, 3) and full captions of the held-out scenes, each suite in turn."""
    side, share = config.picture.height_px, config.source.scenes.heldout_share
    pictures, captions = [], []
    for index in range(number):
        suite = scene_captions.SUITES[index % len(scene_captions.SUITES)]
        # scenes beyond those that prompts.json was made of
        scene = scenes.heldout_scene(config.seed, suite, 1_000_000 + index, side, share)
        pictures.append(np.asarray(scenes.draw(scene).convert("RGB")))
        captions.append(scene_captions.caption(scene, random.Random(f"loss/{index}"), complete=True)[0])
    return np.stack(pictures), captions


def timestep_losses(pipeline: Any, pictures: np.ndarray, captions: list[str], bins: int = BINS) -> list[float]:
    """Mean square error of the prediction (v or eps) in the middle of each of `bins` equal ranges of timesteps.

    pictures uint8 (n, H, W, 3). Index 0 is the cleanest range. Latents are the posterior's means, as in training; the
    noise of picture i is that of generator seed i at every timestep.
    """
    import torch

    schedule, losses = pipeline.schedule, []
    with torch.inference_mode():
        latents = latents_of(pipeline.autoencoder, pictures)
        generators = [torch.Generator().manual_seed(index) for index in range(len(latents))]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        text = pipeline.encode(captions)
        for index in range(bins):
            t = torch.full((len(latents),), int((index + 0.5) / bins * schedule.num_steps))
            noised = schedule.add_noise(latents, noise, t)
            target = noise if pipeline.diffusion.prediction == "eps" else schedule.velocity(latents, noise, t)
            errors = []
            for start in range(0, len(latents), BATCH):
                part = slice(start, start + BATCH)
                output = pipeline.unet(noised[part], t[part].float(), text.context[part], text.mask[part])
                errors.append((output.prediction - target[part]).square().flatten(1).mean(1))
            losses.append(torch.cat(errors).mean().item())
    return losses


def latents_of(autoencoder: Any, pictures: np.ndarray) -> Any:
    """Scaled latents (n, C, h, w), the posterior's means, of pictures uint8 (n, H, W, 3)."""
    import torch

    from raphael.diffusion.latents import sample_latents

    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    moments = torch.cat([autoencoder.encode_moments(part) for part in images.split(BATCH)])
    return sample_latents(moments, autoencoder.scaling_factor, autoencoder.shift)


def main() -> int:
    from raphael.generate.pipeline import RaphaelPipeline

    with one_clear_line("timestep_loss") as outcome:
        root = Path.cwd()
        config = load_config(root / "params.yaml")
        pipeline = RaphaelPipeline.from_pretrained(root / "models" / "raphael")
        pictures, captions = heldout_pictures(config, SCENES)
        losses = timestep_losses(pipeline, pictures, captions)
        steps = pipeline.schedule.num_steps
        timesteps = [int((index + 0.5) / BINS * steps) for index in range(BINS)]
        report = {"model": pipeline.identity, "scenes": SCENES, "timesteps": timesteps, "losses": losses}
        write_json(root / "reports" / "timestep_loss.json", report)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
