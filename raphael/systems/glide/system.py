"""What GLIDE is, as data; its settings, and what it asks of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from raphael.base.config.params import NO_TEXT, Config
from raphael.base.config.preset import DiffusionConfig, Positive, Share
from raphael.base.config.systems import Part, System
from raphael.base.config.unet import CaptionConfig, PlainUNetConfig
from raphael.base.strict import ConfigError, Range

# finetune: the base, trained on with empty captions; inpaint: that one, trained on with pictures that have holes
BASE, FINETUNE, UPSAMPLER, INPAINT = "base", "finetune", "upsampler", "inpaint"
SEEING = {"inpainting": True, "picture_channels": 4}  # of the part inpaint's U-Net: it is told a mask and a picture
# How its models are sampled where nobody says otherwise: clipped estimates and 27 steps of the upsampler as the release
# has them, the guidance that the paper's raters preferred (arXiv 2112.10741, 5.1)
SAMPLING = {"guidance_scale": 3.0, "threshold": "static", "upsampler_steps": 27, "upsampler_spacing": "fast27"}
OF_MIXTURES = ("num_knockout_images", "num_swaps")  # of `evaluate`


@dataclass(frozen=True)
class BaseSettings:
    """unet: also of the parts that train the base on. text: of the transformer that is trained with it."""

    unet: PlainUNetConfig
    text: CaptionConfig
    diffusion: DiffusionConfig

    def __post_init__(self) -> None:
        expect(self.unet, {**PLAIN, "picture_channels": 0, "level_embedding": False})
        expect_text(self.unet, self.text)
        if self.diffusion.prediction == "residual":
            raise ValueError("diffusion.prediction: got residual, expected another: the base enlarges no picture")


@dataclass(frozen=True)
class UpsamplerSettings:
    """factor: the side of its images / of the base's, whole. With unet.level_embedding what it enlarges is augmented by
    noise, as Imagen's is; without, as GLIDE's, it is not."""

    unet: PlainUNetConfig
    text: CaptionConfig
    diffusion: DiffusionConfig
    factor: Annotated[int, Range(2)] = 2

    def __post_init__(self) -> None:
        expect(self.unet, {**PLAIN, "picture_channels": 3})
        expect_text(self.unet, self.text)


@dataclass(frozen=True)
class GlideSettings:
    """Of model.settings: the two networks, each with text and noise of its own."""

    base: BaseSettings
    upsampler: UpsamplerSettings

    def __post_init__(self) -> None:
        lengths = [own.unet.context_length for own in (self.base, self.upsampler)]
        if lengths[0] != lengths[1]:
            got = f"{lengths[0]} and {lengths[1]}"
            raise ValueError(f"base.unet.context_length and upsampler.unet.context_length: got {got}, expected one")

    @property
    def multiple(self) -> int:
        """Of which an image's sides must be multiples."""
        return math.lcm(self.upsampler.factor * self.base.unet.multiple, self.upsampler.unet.multiple)


@dataclass(frozen=True)
class GlideTraining:
    """Of train.settings."""

    empty_captions: Share = 0.2  # in the parts finetune and inpaint; the base has none
    upsampler_drop: Share = 0.1  # of captions that the upsampler is not told
    base_shift: Positive = 1.0  # of the base's timesteps (raphael/objectives/timesteps.py); 1: uniform
    upsampler_shift: Positive = 1.0
    augmentation: Share = 1.0  # the highest level of noise on what it enlarges, where its network is told of any
    extra: tuple[str, ...] = ()  # parts beside the others: inpaint


PLAIN = {
    "latent_channels": 3, "out_channels": 0, "inpainting": False, "pooled_text": False, "text_pool": False,
    "text_layers": 0,
}  # fmt: skip


def expect(unet: PlainUNetConfig, wanted: dict[str, object]) -> None:
    for name, value in wanted.items():
        if (got := getattr(unet, name)) != value:
            raise ValueError(f"unet.{name}: got {got}, expected {value}")


def expect_text(unet: PlainUNetConfig, text: CaptionConfig) -> None:
    if not unet.context_dim or unet.vector_dim != unet.context_dim:
        raise ValueError(
            f"unet.vector_dim: got {unet.vector_dim} with context_dim {unet.context_dim}, expected one number above 0: "
            "the last token is the vector"
        )
    if unet.context_dim % text.head_dim:
        raise ValueError(
            f"text.head_dim: got {text.head_dim}, expected a divisor of {unet.context_dim}, unet.context_dim"
        )


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other."""
    settings, file = config.model.load(), config.file
    if not config.autoencoder.is_pixels:
        got = config.autoencoder.pretrained
        raise ConfigError(
            f"{file}: autoencoder.pretrained: got {got!r} with model.system glide, expected pixels: it has no "
            "autoencoder"
        )
    if config.clip.pretrained == NO_TEXT:
        raise ConfigError(
            f"{file}: clip.pretrained: got {NO_TEXT!r} with model.system glide, expected an encoder, or '', which "
            "trains one: its tokenizer reads the captions, and its space is the noised CLIP's"
        )
    if (length := config.clip.context_length) != (got := settings.base.unet.context_length):
        raise ConfigError(
            f"{file}: model.settings.base.unet.context_length: got {got}, expected {length}, clip.context_length"
        )
    for name in OF_MIXTURES:
        if count := getattr(config.evaluate, name):
            raise ConfigError(f"{file}: evaluate.{name}: got {count}, expected 0: it asks a model of latents")
    known = [part.name for part in SYSTEM.extra]
    if other := [name for name in config.training().extra if name not in known]:
        raise ConfigError(f"{file}: train.settings.extra: got {other[0]!r}, expected some of {', '.join(known)}")
    for size in config.picture.sizes_px:
        if any(side % settings.multiple for side in size):
            raise ConfigError(
                f"{file}: picture.sizes_px: got {list(size)}, expected multiples of {settings.multiple}: the base "
                f"draws 1 / {settings.upsampler.factor} of a side, and both networks halve it"
            )


SYSTEM = System(
    name="glide",
    about="text to image on pixels by a cascade whose text transformers are trained with it (arXiv 2112.10741)",
    settings=GlideSettings,
    training=GlideTraining,
    check=check,
    fields=("pixels", "token_ids"),  # as in raphael/base/records.py
    inputs=("models/clip", "data/source/prompts.json"),
    carries={"text_encoder": "models/clip"},  # the tokenizer; its CLIP is the noised CLIP's
    parts=(Part(BASE, share=0.7), Part(FINETUNE, share=0.1, needs=(BASE,)), Part(UPSAMPLER, share=0.2)),
    extra=(Part(INPAINT, share=0.2, needs=(FINETUNE,)),),
    guides=("clip",),
)
