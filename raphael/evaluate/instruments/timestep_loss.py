"""The denoising loss by timestep on drawn scenes that no training saw: the same for every model, as are noise and
timesteps.

Of a model by texts it is told the scenes' captions, of a model of classes the class that a caption names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.images.fit import fit
from raphael.base.probe_set import ProbeSet
from raphael.diffusion.prediction import training_pair
from raphael.generate.pipeline import Pipeline, default_size

BINS = 10
SCENES = 128
BATCH = 64


def chosen(pipeline: Pipeline, asked: ProbeSet, count: int = SCENES) -> tuple[np.ndarray, list[str]]:
    """(images, what each would be asked for) of up to `count` scenes, evenly spread over those that the model can be
    asked for; over all of them, for one that is asked for nothing."""
    texts = pipeline.asked_for(asked.captions)
    rows = [row for row, text in enumerate(texts) if text] or list(range(len(texts)))
    count = min(count, len(rows))
    rows = [rows[index * len(rows) // count] for index in range(count)]
    return asked.images[rows], [texts[row] for row in rows]


def timesteps(pipeline: Pipeline, bins: int = BINS) -> list[int]:
    """The middles of equal ranges, the cleanest first."""
    return [int((index + 0.5) / bins * pipeline.schedule.num_steps) for index in range(bins)]


@torch.inference_mode()
def timestep_losses(
    pipeline: Pipeline,
    images: np.ndarray,
    texts: list[str],
    bins: int = BINS,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """(n, bins) mean square errors of the prediction, of each image at each of `timesteps`.

    images uint8 (n, H, W, 3). Latents are the posterior's means, as in training; the noise of image i is that of
    generator seed i at every timestep. advance: called with the number of images judged, bins times each.
    """
    schedule, prediction = pipeline.schedule, pipeline.prediction
    latents = latents_of(pipeline, images)
    generators = [torch.Generator().manual_seed(index) for index in range(len(latents))]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    noise, condition, losses = noise.to(latents.device), pipeline.encode(texts), []
    for timestep in timesteps(pipeline, bins):
        t = torch.full((len(latents),), timestep, device=latents.device)
        noised, target = training_pair(prediction, schedule, latents, noise, t)
        errors = []
        for start in range(0, len(latents), BATCH):
            part = slice(start, start + BATCH)
            output = pipeline.unet(noised[part], t[part].float(), condition.rows(part))
            errors.append((output.prediction - target[part]).square().flatten(1).mean(1))
            advance(len(errors[-1]))
        losses.append(torch.cat(errors))
    return torch.stack(losses, dim=1)


def latents_of(pipeline: Pipeline, images: np.ndarray) -> Tensor:
    """What is diffused, (n, C, h, w), of images uint8 (n, H, W, 3) at the model's first size."""
    size = default_size(pipeline.meta["picture"])
    if images.shape[1:3] != size:
        from PIL import Image

        in_pixels = pipeline.downsampling == 1
        images = np.stack([fit(Image.fromarray(image), *size, in_pixels) for image in images])
    x = torch.from_numpy(images).to(pipeline.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([pipeline.encode_images(part) for part in x.split(BATCH)])


def told(losses: Tensor, at: list[int]) -> dict[str, Any]:
    """For reports/evaluate.json: the mean of each timestep over the images."""
    return {"n": len(losses), "timesteps": at, "losses": [round(loss, 6) for loss in losses.mean(0).tolist()]}
