"""A cascade: a network draws small images, another enlarges them (arXiv 2106.15282), here by Imagen's rules.

The second network is told the small images, with noise on them, and how much: noise conditioning augmentation (arXiv
2205.11487, 2.4 and figure A.32; arXiv 2106.15282, 4.2). In training the level is uniform in [0, 1]; in sampling it is
chosen, and both branches of guidance are told the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.config.sampling import Sampling
from raphael.diffusion.noise import CosineNoise
from raphael.diffusion.prediction import Prediction
from raphael.diffusion.sampling import Order, Parts, sample_order
from raphael.diffusion.schedule import Noise, spaced_sigmas
from raphael.net.condition import Condition

STREAM = "upsampler"  # of an image's noise
AUGMENTATION = "augmentation"


def shrunk(images: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H / factor, W / factor), the means of areas."""
    return images if factor == 1 else F.avg_pool2d(images, factor)


def enlarged(images: Tensor, factor: int) -> Tensor:
    """(B, C, h, w) -> (B, C, factor h, factor w), bilinear between the middles of pixels."""
    return F.interpolate(images, scale_factor=float(factor), mode="bilinear", align_corners=False)


def augmented(images: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """cos(a pi / 2) images + sin(a pi / 2) eps: at level a = 0 the images themselves, at 1 noise. images, eps (B, ...),
    level (B,) in [0, 1]. It is `add_noise` of a cosine schedule whose time 0 is clean."""
    schedule = CosineNoise(2, offset=0.0)  # whose timesteps, from 0 to 1, are its times
    return schedule.add_noise(images, eps, level)


def with_picture(condition: Condition, low: Tensor, level: Tensor | None, factor: int, num_steps: int) -> Condition:
    """The upsampler's condition: what the text says, the augmented small images (B, C, h, w) at the large size, and
    the level, as a timestep; None: they are not augmented, and nothing is told of it. Hooks on the first network's
    attention do not act on the second."""
    own = {"picture": enlarged(low, factor), "level": None if level is None else level * (num_steps - 1)}
    return replace(condition, **own, control=None, hooks=None, hooked=None, step=None)


@dataclass(frozen=True)
class Upsampler:
    """The second network with its own noise and prediction. factor: the side of its images / of those it is told."""

    unet: nn.Module
    schedule: Noise
    prediction: Prediction
    factor: int

    def __call__(self, low: Tensor, order: Order) -> Tensor:
        """Images (B, C, factor h, factor w) of the small ones (B, C, h, w) that `order` has given.

        By order.settings' sampler and threshold, and the upsampler's own steps, guidance and augmentation. A network
        that is told no level was trained without augmentation and gets none. An image's noise is that of its own seed,
        apart from the noise of the first network. Raises ValueError for augmentation that such a network is asked for.
        """
        count, (channels, height, width) = len(low), low.shape[1:]
        settings, shape = order.settings, (channels, self.factor * height, self.factor * width)
        low, level = low.clamp(-1, 1), None
        if self.is_augmented:
            level = torch.full((count,), settings.augmentation, device=low.device)
            eps = order.noise.another(AUGMENTATION, (channels, height, width)).start().to(low)
            low = augmented(low, eps, level)
        elif settings.augmentation not in (0, Sampling.augmentation):  # the default means nothing was asked for
            raise ValueError(
                f"augmentation: got {settings.augmentation:g}, expected 0: the upsampler was trained without"
            )
        cond, null = (
            with_picture(one.expand(count), low, level, self.factor, self.schedule.num_steps)
            for one in (order.cond, order.null)
        )
        how = settings.of_upsampler()
        parts = Parts(self.unet, self.schedule, self.prediction, _no_text, lambda images: images, shape)
        sigmas = spaced_sigmas(self.schedule, settings.upsampler_spacing, how.steps)
        return sample_order(parts, Order(cond, null, order.noise.another(STREAM, shape), how, sigmas))

    @property
    def is_augmented(self) -> bool:
        """Whether noise on what it enlarges is told to the network."""
        return getattr(getattr(self.unet, "config", None), "level_embedding", True)


def _no_text(texts: list[str]) -> Condition:
    raise AssertionError("an upsampler is told what its cascade is told")
