"""From what records hold to the latents that are diffused. The costly and neutral thing (raw moments, or pixels) is
stored; the choices (sampling, scaling) are made here, at load."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raphael.base.records import MOMENTS, PIXELS

DETERMINISTIC_LOG_VARIANCE = -30.0  # diffusers' lower bound: a standard deviation of 3e-7


def moments_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The raw moments (B, 2C, h, w) of a batch of records: as they are stored, or made of stored pixels.

    pixels uint8 (B, 3, H, W) -> float32 (B, 6, H, W), the mean p / 127.5 - 1 and a log-variance of nothing: what the
    autoencoder `pixels` gives, in a quarter of the bytes and without float16's rounding.
    """
    if MOMENTS in batch:
        return batch[MOMENTS]
    mean = batch[PIXELS].float() / 127.5 - 1
    return torch.cat([mean, torch.full_like(mean, DETERMINISTIC_LOG_VARIANCE)], dim=1)


def sample_latents(moments: Tensor, scaling_factor: float, shift: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """moments (B, 2C, h, w), raw mean and log-variance -> scaled latents (B, C, h, w), float32.

    noise: standard normal (B, C, h, w) for a draw from the posterior; None for its mean.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        # the bounds of diffusers' DiagonalGaussianDistribution
        mean = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
    return (mean - shift) * scaling_factor
