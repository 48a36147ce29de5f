"""From the stored VAE moments to the latents that are diffused. The costly and neutral thing (raw moments) is stored;
the choices (sampling, scaling) are made here, at load."""

from __future__ import annotations

from torch import Tensor


def sample_latents(moments: Tensor, scaling_factor: float, shift: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """moments (B, 2C, h, w), raw mean and log-variance -> scaled latents (B, C, h, w), float32.

    noise: standard normal (B, C, h, w) for a draw from the posterior; None for its mean.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        # the bounds of diffusers' DiagonalGaussianDistribution
        mean = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
    return (mean - shift) * scaling_factor
