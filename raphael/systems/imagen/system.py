"""What Imagen is, as data; its settings, and what it asks of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from raphael.base.config.efficient import EfficientUNetConfig
from raphael.base.config.params import Config
from raphael.base.config.preset import DiffusionConfig, Positive, Share
from raphael.base.config.systems import Part, System
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.strict import ConfigError, Range, later

BASE, UPSAMPLER = "base", "upsampler"
OF_LATENTS = ("num_knockout_images", "num_swaps")  # of `evaluate`


@dataclass(frozen=True)
class BaseSettings:
    unet: PlainUNetConfig
    diffusion: DiffusionConfig


@dataclass(frozen=True)
class UpsamplerSettings:
    """factor: the side of its images / of the base's, whole."""

    unet: EfficientUNetConfig
    diffusion: DiffusionConfig
    factor: Annotated[int, Range(2)] = 2


@dataclass(frozen=True)
class ImagenSettings:
    """Of model.settings: the two networks, each with a noise of its own."""

    base: BaseSettings
    upsampler: UpsamplerSettings

    def __post_init__(self) -> None:
        base, up = self.base.unet, self.upsampler.unet
        for name, network, wanted in (
            ("latent_channels", BASE, 3), ("picture_channels", BASE, 0), ("level_embedding", BASE, False),
            ("vector_dim", BASE, 0), ("latent_channels", UPSAMPLER, 3), ("picture_channels", UPSAMPLER, 3),
            ("level_embedding", UPSAMPLER, True), ("vector_dim", UPSAMPLER, 0), ("out_channels", BASE, 0),
            ("out_channels", UPSAMPLER, 0),
        ):  # fmt: skip
            if (got := getattr(base if network == BASE else up, name)) != wanted:
                raise ValueError(f"{network}.unet.{name}: got {got}, expected {wanted}")
        if self.base.diffusion.prediction == "residual":
            raise ValueError("base.diffusion.prediction: got residual, expected v, x0 or flow: it enlarges no picture")
        for name in ("context_dim", "context_length"):
            if getattr(base, name) != getattr(up, name) or not getattr(base, name):
                got = f"{getattr(base, name)} and {getattr(up, name)}"
                raise ValueError(f"base.unet.{name} and upsampler.unet.{name}: got {got}, expected one, the T5's")

    @property
    def multiple(self) -> int:
        """Of which an image's sides must be multiples."""
        return math.lcm(self.upsampler.factor * self.base.unet.multiple, self.upsampler.unet.multiple)


@dataclass(frozen=True)
class ImagenTraining:
    """Of train.settings."""

    text_drop: Share = 0.1  # of captions that neither network is told, for classifier-free guidance
    base_shift: Positive = 1.0  # of the base's timesteps (raphael/objectives/timesteps.py); 1: uniform, as the paper's
    upsampler_shift: Positive = 1.0
    augmentation: Share = later(1.0)  # the highest level of noise on what the upsampler enlarges; 1: the paper's


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other."""
    settings, file = config.model.load(), config.file
    if not config.autoencoder.is_pixels:
        got = config.autoencoder.pretrained
        raise ConfigError(
            f"{file}: autoencoder.pretrained: got {got!r} with model.system imagen, expected pixels: it has no "
            "autoencoder"
        )
    own = config.clip.tower == "t5" and not config.clip.pretrained
    if not own and not config.clip.pretrained.startswith("t5:"):
        got = config.clip.pretrained or f"tower {config.clip.tower}"
        raise ConfigError(
            f"{file}: clip.pretrained: got {got!r} with model.system imagen, expected t5:<folder or hub id>, or '' "
            "with clip.tower t5, which trains one"
        )
    if own and (width := config.clip.t5.width) != settings.base.unet.context_dim:
        got = settings.base.unet.context_dim
        raise ConfigError(f"{file}: model.settings.base.unet.context_dim: got {got}, expected {width}, clip.t5.width")
    if (length := config.clip.context_length) != (got := settings.base.unet.context_length):
        raise ConfigError(
            f"{file}: model.settings.base.unet.context_length: got {got}, expected {length}, clip.context_length"
        )
    for name in OF_LATENTS:
        if count := getattr(config.evaluate, name):
            raise ConfigError(f"{file}: evaluate.{name}: got {count}, expected 0: it asks a model of latents")
    for size in config.picture.sizes_px:
        if any(side % settings.multiple for side in size):
            raise ConfigError(
                f"{file}: picture.sizes_px: got {list(size)}, expected multiples of {settings.multiple}: the base "
                f"draws 1 / {settings.upsampler.factor} of a side, and both networks halve it"
            )


SYSTEM = System(
    name="imagen",
    about="text to image on pixels by a cascade: frozen T5, base, super-resolution (arXiv 2205.11487)",
    settings=ImagenSettings,
    training=ImagenTraining,
    check=check,
    fields=("pixels", "text", "text_mask"),  # as in raphael/base/records.py
    inputs=("models/clip", "data/source/prompts.json"),
    carries={"text_encoder": "models/clip"},
    parts=(Part(BASE, share=0.8), Part(UPSAMPLER, share=0.2)),
)
