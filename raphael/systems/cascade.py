"""The pipeline of a cascade by texts: one network draws small images, a second enlarges them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.diffusion.cascade import Upsampler, shrunk
from raphael.diffusion.image_noise import ImageNoise, ImageSeed
from raphael.diffusion.sampling import Order, Parts, encode_texts, evaluating
from raphael.net.condition import Condition
from raphael.systems.pipeline import Pipeline
from raphael.systems.texts import encoded


class CascadePipeline(Pipeline):
    """unet: the first network. What is diffused by it are images of 1 / factor of the side that is asked for; sampling
    ends with the second network's, or the first's with `Sampling(until="base")`."""

    def __init__(
        self, unet: Any, diffusion: DiffusionConfig, upsampler: Upsampler, text_encoder: Any, meta: dict[str, Any]
    ):
        super().__init__(unet, diffusion, meta)
        expect_fit(unet.config, upsampler)
        self.upsampler, self.text_encoder = upsampler, text_encoder.eval()
        self.upsampler.unet.eval()

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        return {"base": self.unet, "upsampler": self.upsampler.unet}

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.unet, self.upsampler.unet, self.text_encoder

    @property
    def components(self) -> dict[str, Any]:
        return {**super().components, "upsampler": self.upsampler.unet, "text_encoder": self.text_encoder}

    @property
    def downsampling(self) -> int:  # type: ignore[override]
        return self.upsampler.factor

    @property
    def space(self) -> str:  # type: ignore[override]
        return f"{Pipeline.space} at 1 / {self.upsampler.factor} of the side"

    @property
    def multiple_px(self) -> int:
        return math.lcm(self.upsampler.factor * self.unet.config.multiple, self.upsampler.unet.config.multiple)

    def encode(self, texts: list[str]) -> Condition:
        return encoded(self.text_encoder, texts, self.device)

    def parts(
        self,
        height: int | None = None,
        width: int | None = None,
        encode: Callable[[list[str]], Condition] | None = None,
    ) -> Parts:
        return replace(super().parts(height, width, encode), then=self.upsampler)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images of the asked size (B, 3, H, W) in [-1, 1] -> the first network's, means of areas."""
        return shrunk(images, self.upsampler.factor)

    @torch.inference_mode()
    def enlarge(
        self, low: torch.Tensor, texts: list[str], seeds: list[ImageSeed], sampling: Sampling | None = None
    ) -> torch.Tensor:
        """The second network alone: images (n, 3, h, w) in [-1, 1], their captions -> (n, 3, factor h, factor w)."""
        parts, how, low = self.parts(), sampling or self.defaults, low.to(self.device)
        noise = ImageNoise(seeds, tuple(low.shape[1:]), self.device)
        cond, null = encode_texts(parts, texts), encode_texts(parts, [""])
        with evaluating(self.upsampler.unet):
            return self.upsampler(low, Order(cond, null, noise, how)).clamp(-1, 1)


def expect_fit(base: Any, upsampler: Upsampler) -> None:
    """Raises ValueError for an upsampler of another base: what it is told is of other channels, or by other texts."""
    config = upsampler.unet.config
    pairs = (
        ("images of channels", "latent_channels", config.picture_channels, base.latent_channels),
        ("text vectors of width", "context_dim", config.context_dim, base.context_dim),
        ("captions of tokens", "context_length", config.context_length, base.context_length),
    )
    for what, name, got, expected in pairs:
        if got != expected:
            raise ValueError(
                f"upsampler: got one for {what} {got}, expected {expected}, the base's {name}: it was trained for "
                "another base"
            )
