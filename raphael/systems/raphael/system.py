"""What RAPHAEL is, as data; and what it asks of the settings together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raphael.base.config.data import NonNegative
from raphael.base.config.params import Config
from raphael.base.config.preset import Preset
from raphael.base.config.systems import Part, System, check_sizes
from raphael.base.strict import ConfigError, flatten
from raphael.objectives.denoising_settings import DenoisingSettings
from raphael.systems.raphael.studied import STUDIED

CHANNELS = "unet.latent_channels"  # of the autoencoder, which need not be the one that the preset was made for
LARGE_PX = 256  # from here on timesteps are drawn uniformly, as Stable Diffusion's and the paper's
EDGE_WEIGHT = 0.1  # of a training that begins from a model with edge heads


@dataclass(frozen=True)
class RaphaelTraining(DenoisingSettings):
    """Of train.settings: the loss, and what is measured beside it."""

    num_probe: NonNegative = 24  # scenes for each fact of the probe, beside every held-out loss; 0: none


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other."""
    if other := flatten(config.model.settings).keys() - {CHANNELS}:
        raise ConfigError(
            f"{config.file}: model.settings: got {', '.join(sorted(other))}, expected {CHANNELS} or none: the sizes of "
            f"raphael stand in its preset, {config.model.preset}"
        )
    unet, training = config.model.load().unet, config.training()
    if (weights := training.edge_block_weights) and len(weights) != unet.num_blocks:
        raise ConfigError(
            f"{config.file}: train.settings.edge_block_weights: got {len(weights)} numbers, expected "
            f"{unet.num_blocks}, one for each transformer block of the preset {config.model.preset}, or none"
        )
    ends, batch_size = [phase.until_images for phase in training.phases], config.train.loop.batch_size
    if sorted(set(ends)) != ends or any(end % batch_size for end in ends):
        raise ConfigError(
            f"{config.file}: train.settings.phases: got until_images {ends}, expected growing multiples of "
            f"train.loop.batch_size {batch_size}"
        )
    if config.train.lora.rank and training.balance == "loss_free":
        raise ConfigError(
            f"{config.file}: train.lora.rank: got {config.train.lora.rank} with train.settings.balance loss_free, "
            "expected none or switch: it moves gates, which stay as they are"
        )
    if training.balance == "loss_free" and (micro_batch := config.train.parallel.micro_batch):
        raise ConfigError(
            f"{config.file}: train.parallel.micro_batch: got {micro_batch} with train.settings.balance loss_free, "
            "expected 0: its biases move once a pass"
        )
    check_sizes(config, unet.multiple)


def further(config: Config) -> tuple[str, ...]:
    """Edges are read where the preset has edge heads, sizes where its network is told them."""
    unet = config.model.load().unet
    return (*(() if unet.edge_tokens == "none" else ("edges",)), *(("sizes",) if unet.size_px else ()))


def reported(last: dict[str, float]) -> dict[str, Any]:
    """The losses, and apart from them how the experts were used."""
    loads = {name: value for name, value in last.items() if "_load/" in name or "/cover/" in name}
    return {"final": {name: value for name, value in last.items() if name not in loads}, "experts": loads}


def tuned(preset: Preset, side_px: int) -> dict[str, Any]:
    found: dict[str, Any] = {"edge_weight": 0.0 if preset.unet.edge_tokens == "none" else EDGE_WEIGHT}
    return found if side_px < LARGE_PX else {**found, "timestep_shift": 1.0}


SYSTEM = System(
    name="raphael",
    about="text to image in latents: mixtures of experts over space and time (arXiv 2305.18295)",
    settings=Preset,
    training=RaphaelTraining,
    check=check,
    fields=(("moments", "pixels"), "token_ids"),  # as in raphael/base/records.py
    more_fields=further,
    inputs=("models/autoencoder", "models/clip", "data/source/prompts.json"),
    carries={"autoencoder": "models/autoencoder", "text_encoder": "models/clip"},
    parts=(Part("denoiser", losses=("loss", "denoise", "edge", "balance")),),
    reported=reported,
    tuned=tuned,
    studied=STUDIED,
    imported=dict.fromkeys(("time_layer", "space_layer"), ("moe", "dense", "none")),
)
