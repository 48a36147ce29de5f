"""What a fine-tuning is going to do with somebody's images, decided and told before it starts.

What is used and why the rest is not (`raphael data check`); what is held out, and how often the model is measured and
shown; what fits into the memory there is; how long it takes.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.stage import StageError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from raphael.base.config.params import Config
    from raphael.base.config.preset import Preset
    from raphael.summary.need import Model, Setup

FEWEST = 4  # images: what the encoders' stages measure themselves on
FEWEST_TO_HOLD_OUT = 10  # images, below which each of them is needed for training
HELD_OUT_ONE_IN, MOST_HELD_OUT = 10, 64
POINTS = 20  # of the held-out loss and the grids, in a whole training
ROOM = 0.9  # of the memory there is
# From what costs nothing to what costs most: images in one pass, blocks computed again, EMA in main memory
LADDER: tuple[tuple[int, bool, bool], ...] = (
    (0, False, False), (4, False, False), (1, False, False), (4, True, False), (1, True, False), (1, True, True),
)  # fmt: skip
STAGES_S = 60.0  # of a CPU for the stages before the training, of a hundred images


@dataclass(frozen=True)
class Looked:
    """used: images. captions: the first few, cleaned. found, sheet: of `data check`; {} of a remote collection."""

    used: int
    captions: tuple[str, ...]
    found: dict[str, Any]
    sheet: Image.Image | None

    def write(self, out: Path) -> str:
        """Both files of `data check`; -> lines for a person."""
        from data_pipeline.tools.checking.check import write

        if not self.found:
            return f"{self.used:,} captioned images, streamed: none is looked at before it is downloaded"
        return write(self.found, self.sheet, out)


def look(config: Config) -> Looked:
    """What of the workspace's source is used, by its own settings. Raises StageError where that is too little."""
    from tqdm import tqdm

    from data_pipeline.common.tables import is_remote
    from data_pipeline.local_images.kinds import open_collection
    from data_pipeline.tools.checking.check import check

    if is_remote(config.source.path):
        rows = open_collection(config.source).find(Counter()).rows
        return Looked(len({row.name for row in rows}), tuple(row.caption for row in rows[:8]), {}, None)
    with tqdm(desc="check", unit=" images", leave=False, disable=not sys.stderr.isatty()) as bar:
        found, sheet = check(config, bar)
    used = found["used"]
    if used < FEWEST:
        why = ", ".join(f"{count} {reason}" for reason, count in found["dropped"].items()) or "all"
        raise StageError(
            f"{config.source.path}: got {used} images that can be used, expected at least {FEWEST}, better twenty and "
            f"more; of {found['total']}: {why}"
        )
    return Looked(used, tuple(found["captions_of_used"]["first"]), found, sheet)


def measuring(looked: Looked, num_images: int, batch: int, asked: dict[str, int | None]) -> dict[str, Any]:
    """Settings of what is held out, of the pace of losses and grids, and of stopping early.

    asked: heldout (None: a tenth of the images, where there are ten), patience in points, sample_every in images (None:
    as the held-out loss).
    """
    held = asked["heldout"]
    if held is None:
        few = looked.used < FEWEST_TO_HOLD_OUT
        held = 0 if few else min(MOST_HELD_OUT, max(2, looked.used // HELD_OUT_ONE_IN))
    point = max(1, num_images // POINTS // batch) * batch
    every = asked["sample_every"]
    told = {
        "train.loop.log_every_images": point,
        "train.loop.checkpoint_every_images": point,
        "train.loop.sample_every_images": point if every is None else every,
        "train.sample_weights": ["ema"],
        "train.settings.num_probe": 0,
    }
    if held:
        told |= {
            "train.num_heldout": held,
            "train.loop.heldout_every_images": point,
            "train.patience": asked["patience"],
            "train.export": "best",
        }
    if looked.used < FEWEST_TO_HOLD_OUT:  # no caption is set apart for the grids
        told["train.sample_prompts"] = list(looked.captions)
    return told


@dataclass(frozen=True)
class Need:
    """settings: of the first step of the ladder that fits. memory: bytes by purpose."""

    settings: dict[str, Any]
    memory: dict[str, int]
    seconds: float
    has_bytes: int
    device: str

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    def line(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        about = f"about {minutes} minute{'s' if minutes > 1 else ''}" if minutes < 120 else f"about {minutes // 60} h"
        saved = {
            "train.parallel.micro_batch": "batches in passes of {}",
            "train.parallel.checkpoint_activations": "blocks computed twice",
            "train.loop.ema_on_cpu": "EMA in main memory",
        }
        spared = "; to fit: " + ", ".join(saved[name].format(value) for name, value in self.settings.items())
        return (
            f"needs {self.bytes / 1e9:.1f} GB and {about} (arithmetic and a timed step, not a promise); {self.device} "
            f"has {self.has_bytes / 1e9:.1f} GB" + (spared if self.settings else "")
        )


def need(config: Config, preset: Preset, folder: Path, looked: Looked, memory_gb: float | None) -> Need:
    """What the training will take on this machine. memory_gb: instead of what it has.

    Raises StageError where no step of the ladder fits.
    """
    from raphael.base.stage import device_of
    from raphael.summary import need as needs

    device = device_of(config)
    sizes = config.picture.sizes_px
    largest = max(sizes, key=lambda size: size[0] * size[1])
    model = needs.measured(preset, tuple(largest), _frozen(folder))
    has = int(memory_gb * 1e9) if memory_gb else needs.device_bytes(device)
    best: dict[str, int] = {}
    for step in LADDER:
        settings, setup = _settings(step, config, _trained(config, preset, model), device)
        if setup is None:
            continue
        memory = needs.memory_bytes(model, setup, device.type)
        if not best or sum(memory.values()) < sum(best.values()):
            best = memory
        if sum(memory.values()) <= ROOM * has:
            seconds = _seconds(config, model, setup, looked, device)
            return Need(settings, memory, seconds, has, "the GPU" if device.type == "cuda" else "this machine")
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in best.items())
    raise StageError(
        f"got {has / 1e9:.1f} GB, expected at least {sum(best.values()) / 1e9 / ROOM:.1f} for this model even with one "
        f"image a pass ({parts} GB); train an adapter instead (--lora 8), or on a larger machine"
    )


def _settings(step: tuple[int, bool, bool], config: Config, trained: int, device: torch.device) -> tuple[dict, Any]:
    """(settings of a step of the ladder, its Setup); None where the step is no other than the one before it."""
    from raphael.summary.need import Setup

    images, recompute, on_cpu = step
    loop = config.train.loop
    if images >= loop.batch_size or (on_cpu and device.type == "cpu") or (images and config.train.lora.dropout):
        return {}, None
    settings: dict[str, Any] = {"train.parallel.micro_batch": images} if images else {}
    settings |= {"train.parallel.checkpoint_activations": "blocks"} if recompute else {}
    settings |= {"train.loop.ema_on_cpu": True} if on_cpu else {}
    emas = 0 if on_cpu else len([decay for decay in loop.ema_decays.values() if decay])
    bf16 = loop.precision == "bf16" or (loop.precision == "auto" and device.type == "cuda")
    return settings, Setup(images or loop.batch_size, trained, loop.optimizer, emas, bf16, recompute)


def _trained(config: Config, preset: Preset, model: Model) -> int:
    if not config.train.lora.rank:
        return model.parameters
    import torch

    from raphael.net.lora.low_rank import attach
    from raphael.net.moe.unet import RaphaelUNet

    with torch.device("meta"):
        holder = torch.nn.ModuleDict({"unet": RaphaelUNet(preset.unet)})
        attach(holder, holder["unet"], config.train.lora, 0)
    return sum(parameter.numel() for parameter in holder.parameters() if parameter.requires_grad)


def _frozen(folder: Path) -> int:
    """Parameters of text encoder and autoencoder, by the size of their files."""
    files = [file for name in ("autoencoder", "text_encoder") for file in (folder / name).rglob("*.safetensors")]
    return sum(file.stat().st_size for file in files) // 4


def _seconds(config: Config, model: Model, setup: Setup, looked: Looked, device: torch.device) -> float:
    from raphael.summary.need import seconds_per_image

    train, loop = config.train, config.train.loop
    step_s, forward_s = seconds_per_image(model, min(setup.images, 16), device)
    again = 4 / 3 if setup.recompute else 1.0
    points = loop.num_images // loop.heldout_every_images + 1 if loop.heldout_every_images else 0
    grids = loop.num_images // loop.sample_every_images + 1 if loop.sample_every_images else 0
    prompts = len(train.sample_prompts) or min(train.num_sample_prompts, max(1, looked.used // 10))
    drawn_s = 2 * config.generate.steps * prompts * forward_s  # two branches of guidance
    held_s = 4 * train.num_heldout * 2 * forward_s  # four timesteps; EMA and raw weights
    stages_s = STAGES_S + looked.used * (0.05 if device.type == "cpu" else 0.01)
    return again * step_s * loop.num_images + grids * drawn_s + points * held_s + stages_s
