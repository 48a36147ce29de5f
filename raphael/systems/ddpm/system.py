"""What DDPM is, as data; its settings, and what it asks of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raphael.base.config.params import Config
from raphael.base.config.preset import DiffusionConfig, Positive, Share
from raphael.base.config.systems import Part, System
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.strict import ConfigError

LABEL = "label"  # as in raphael/base/records.py
OF_TEXTS = ("num_probe", "num_knockout_images", "num_swaps")  # of `evaluate`


@dataclass(frozen=True)
class DdpmSettings:
    """Of model.settings. Where encode.fields has `label` the model is conditional on the class; its number of classes
    is that of the records, so unet.vector_dim is left out."""

    unet: PlainUNetConfig
    diffusion: DiffusionConfig

    def __post_init__(self) -> None:
        for name in ("vector_dim", "size_px", "context_dim", "picture_channels", "level_embedding"):
            if value := getattr(self.unet, name):
                raise ValueError(f"unet.{name}: got {value}, expected none: it reads the label alone, from the records")
        if self.unet.predicted_channels != self.unet.latent_channels:
            raise ValueError(f"unet.out_channels: got {self.unet.out_channels}, expected 0: as its images have")


@dataclass(frozen=True)
class DdpmTraining:
    """Of train.settings."""

    label_drop: Share = 0.1  # of samples whose label is the null one, for classifier-free guidance
    timestep_shift: Positive = 1.0  # of training's timesteps (raphael/objectives/timesteps.py); 1: uniform, as DDPM


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other."""
    settings = config.model.load()
    if not config.autoencoder.is_pixels:
        raise ConfigError(
            f"{config.file}: autoencoder.pretrained: got {config.autoencoder.pretrained!r} with model.system ddpm, "
            "expected pixels: it has no autoencoder"
        )
    if settings.unet.latent_channels != 3:
        got = settings.unet.latent_channels
        raise ConfigError(f"{config.file}: model.settings.unet.latent_channels: got {got}, expected 3, of pixels")
    for name in OF_TEXTS:
        if count := getattr(config.evaluate, name):
            raise ConfigError(f"{config.file}: evaluate.{name}: got {count}, expected 0: it asks a model by texts")
    multiple = settings.unet.multiple
    for size in config.picture.sizes_px:
        if any(side % multiple for side in size):
            raise ConfigError(
                f"{config.file}: picture.sizes_px: got {list(size)}, expected multiples of {multiple}, which its "
                f"{len(settings.unet.channels)} levels halve"
            )


def prompts(meta: dict[str, Any], listed: dict[str, Any]) -> dict[str, Any]:
    """What the stage generate asks for: every class by its name, or nothing, of an unconditional model."""
    classes = meta.get("classes", [])
    entries = [{"prompt": name, "label": name, "suite": "class", "truth": None} for name in classes]
    return {"prompts": entries or [{"prompt": "", "suite": "unconditional", "truth": None}]}


SYSTEM = System(
    name="ddpm",
    about="images by a plain U-Net on pixels, unconditional or of a class (arXiv 2006.11239, 2102.09672, 2207.12598)",
    settings=DdpmSettings,
    training=DdpmTraining,
    check=check,
    fields=("pixels",),
    more_fields=lambda config: (LABEL,) if LABEL in config.encode.fields else (),
    inputs=(),
    parts=(Part("denoiser", losses=("loss",)),),
    prompts=prompts,
    asked="circle",
    told="labels",
)
