"""A trained DDPM: a prompt is the name of a class, "" the unconditional image."""

from __future__ import annotations

import re
from pathlib import Path

from raphael.base.checkpoint.folder import load_weights, read_checkpoint
from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.strict import load
from raphael.net.condition import Condition
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet
from raphael.systems.ddpm.labels import named
from raphael.systems.pipeline import Pipeline


class DdpmPipeline(Pipeline):
    system = "ddpm"

    @classmethod
    def load(cls, folder: Path, weights: str) -> DdpmPipeline:
        groups, meta = read_checkpoint(folder, [weights])
        unet = UNet(load(PlainUNetConfig, meta["unet"], str(folder / "meta.json"), "unet"), PlainBlock)
        load_weights(unet, groups[weights], folder)
        return cls(unet, load(DiffusionConfig, meta["diffusion"], str(folder / "meta.json"), "diffusion"), meta)

    @property
    def classes(self) -> tuple[str, ...]:
        """What it may be asked for; () of an unconditional model."""
        return tuple(self.meta["classes"])

    @property
    def reads_prompts(self) -> bool:
        return bool(self.classes)

    def encode(self, texts: list[str]) -> Condition:
        return named(self.classes, texts, self.device)

    def asked_for(self, captions: list[str]) -> list[str]:
        """The class that a caption names, "" where it names none or several."""
        found = [[name for name in self.classes if _names(caption, name)] for caption in captions]
        return [names[0] if len(names) == 1 else "" for names in found]


def _names(caption: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", caption, re.IGNORECASE) is not None


PIPELINE = DdpmPipeline
