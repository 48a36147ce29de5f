"""The loss of a plain diffusion model (DDPM, arXiv 2006.11239, eq. 14): the mean square of its network's error; and of
one that enlarges images (Imagen, arXiv 2205.11487, figure A.32)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.randomness import SampleRng
from raphael.diffusion.cascade import augmented, shrunk, with_picture
from raphael.diffusion.prediction import Prediction, about, training_pair
from raphael.diffusion.schedule import Noise
from raphael.net.condition import Condition
from raphael.net.inputs import known_picture
from raphael.net.latents import moments_of, sample_latents
from raphael.objectives.holes import known_masks
from raphael.objectives.timesteps import by_quarter, shifted

Told = Callable[[Mapping[str, Tensor], Tensor | None], Condition]


class PlainDenoising(nn.Module):
    """unet: a network of (x, t, Condition) with `.prediction`. told(batch, dropped): what it is told of a batch, with
    dropped (B,) bool the samples that it is told nothing of, for classifier-free guidance; None: none. drop: their
    share. shift: where in time it is trained (`shifted`), 1: uniformly. Latents are (mean - shift) * factor of the
    records' means, scale = (factor, shift): as they are of pixels in [-1, 1]; an autoencoder has its own. shrink: side
    of the records' images / side of those that it is trained on, means of areas: of a cascade's first network.
    A network with `inpainting` is shown what is left of x_0 around random holes (raphael/objectives/holes.py).
    """

    def __init__(
        self,
        unet: nn.Module,
        noise: Noise,
        prediction: Prediction,
        told: Told,
        drop: float = 0.0,
        shift: float = 1.0,
        shrink: int = 1,
        scale: tuple[float, float] = (1.0, 0.0),
    ):
        super().__init__()
        self.scale = scale
        self.unet, self.schedule, self.prediction = unet, noise, prediction
        self.told, self.drop, self.shift, self.shrink = told, drop, shift, shrink

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        """batch: pixels (B, 3, H, W) uint8 or moments, and what `told` reads.

        Returns "loss", "denoise" (the same) and, detached, "denoise_t": the error in each quarter of the timesteps.
        """
        x0 = self._x0(batch)
        t = self.schedule.timesteps(shifted(rng.uniform("timestep"), self.shift)).to(x0.device)
        noise = rng.normal("noise", tuple(x0.shape[1:])).to(x0.device)
        dropped = (rng.uniform("condition_drop") < self.drop).to(x0.device)
        condition = self._condition(batch, dropped, x0, rng)
        given, target = training_pair(about(self.prediction, condition), self.schedule, x0, noise, t)
        predicted = self.unet(given, t, condition).prediction.float()
        loss = F.mse_loss(predicted, target)
        quarters = by_quarter(predicted, target, t, self.schedule.num_steps)
        return {"loss": loss, "denoise": loss.detach(), **quarters}

    @torch.no_grad()
    def heldout(self, batch: dict[str, Tensor], rng: SampleRng, place: Tensor) -> Tensor:
        """(B,) mean square error of each sample at the timestep of `place`, (B,) in [0, 1). Nothing is dropped."""
        x0 = self._x0(batch)
        t = self.schedule.timesteps(place).to(x0.device)
        noise = rng.normal("noise", tuple(x0.shape[1:])).to(x0.device)
        condition = self._condition(batch, None, x0, rng)
        given, target = training_pair(about(self.prediction, condition), self.schedule, x0, noise, t)
        predicted = self.unet(given, t, condition).prediction.float()
        return (predicted - target).square().flatten(1).mean(1)

    def _condition(self, batch: Mapping[str, Tensor], dropped: Tensor | None, x0: Tensor, rng: SampleRng) -> Condition:
        told = self.told(batch, dropped)
        if not getattr(getattr(self.unet, "config", None), "inpainting", False):
            return told
        known = known_masks(rng, *x0.shape[2:]).to(x0.device)
        return replace(told, picture=known_picture(x0, known))

    def _x0(self, batch: Mapping[str, Tensor]) -> Tensor:
        return shrunk(sample_latents(moments_of(batch), *self.scale), self.shrink)


class Enlarging(PlainDenoising):
    """The same loss of a cascade's second network, which is told the images at 1 / factor of their side.

    These are means of areas, with noise conditioning augmentation of a level uniform in [0, highest], drawn for each
    sample, and the level is told. A dropped sample keeps its picture: what is dropped is the text. highest: the paper's
    is 1; sampling asks for no level above some 0.3, and each level is learned apart. None: they are as they are, and no
    level is told (GLIDE).
    """

    def __init__(
        self,
        unet: nn.Module,
        noise: Noise,
        prediction: Prediction,
        told: Told,
        drop: float = 0.0,
        shift: float = 1.0,
        factor: int = 2,
        highest: float | None = 1.0,
    ):
        super().__init__(unet, noise, prediction, told, drop, shift)
        self.factor, self.highest = factor, highest

    def _condition(self, batch: Mapping[str, Tensor], dropped: Tensor | None, x0: Tensor, rng: SampleRng) -> Condition:
        low, text = shrunk(x0, self.factor), self.told(batch, dropped)
        if self.highest is None:
            return with_picture(text, low, None, self.factor, self.schedule.num_steps)
        eps = rng.normal("augmentation noise", tuple(low.shape[1:])).to(low.device)
        level = self.highest * rng.uniform("augmentation level").to(low.device)
        return with_picture(text, augmented(low, eps, level), level, self.factor, self.schedule.num_steps)
