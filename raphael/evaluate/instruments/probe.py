"""`probe/v1` of a pipeline: the share of held-out scenes whose true caption has the lower loss, by fact.

Of any model that is told captions (`CaptionModel`), whatever it diffuses and however it reads: latents by the frozen
tokens of a CLIP, pixels by those of a T5, or by token ids. Of a cascade it asks the first network, which settles what
is shown; images are shrunk to that one's size as its training shrinks them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raphael.base.images.fit import fit
from raphael.base.precision import autocast
from raphael.base.probe_set import ProbeSet
from raphael.diffusion.prediction import prediction_of
from raphael.diffusion.schedule import Noise
from raphael.encoders.autoencoder import ENCODED_AT_ONCE
from raphael.evaluate.metrics.intervals import share
from raphael.generate.pipeline import default_size
from raphael.net.condition import Condition
from raphael.objectives.probe import TIMES, VERSION, Network, Verdict, in_place, network_errors, passes, verdicts

LABELS = {
    "shape": "shape",
    "colour": "colour",
    "background": "background",
    "style": "style",
    "count": "number of objects",
    "pair_shape": "shape of a pair",
    "side": "side of a relation",
    "binding": "binding of colours",
    "word": "printed word",
}


class CaptionModel(Protocol):
    """What the probe asks of a model. Every pipeline has it whose prompts are captions."""

    meta: dict[str, Any]  # "picture": its sizes
    unet: Any  # the network that is told the text
    schedule: Noise
    diffusion: Any  # what `prediction_of` reads
    space: str  # "pixels", or another one

    @property
    def device(self) -> torch.device: ...

    def encode(self, texts: list[str]) -> Condition:
        """What the network is told of captions."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what it diffuses, (B, C, h, w): the mean of it."""


class Probing:
    """The probe of one pipeline, pass by pass; a pass is the same whatever passes were before it, here or elsewhere.

    precision: of the network's products.
    """

    def __init__(self, pipeline: CaptionModel, asked: ProbeSet, seed: int = 0, precision: str = "auto"):
        self.passes, self.precision, self.pipeline = passes(asked), precision, pipeline
        latents = in_place(asked, mean_latents(pipeline, asked.images[asked.rows]))
        self.errors = network_errors(network_of(pipeline), latents, pipeline.encode, seed)

    @torch.inference_mode()
    def __call__(self, number: int) -> list[float]:
        """The errors of v of the captions of that pass."""
        remembering = getattr(self.pipeline.unet, "remembering", contextlib.nullcontext)  # a text, five times
        with remembering(), autocast(self.precision, self.pipeline.device):
            return self.errors(*self.passes[number]).double().tolist()


def told(found: list[list[float]], asked: ProbeSet, seed: int = 0, precision: str = "auto") -> dict[str, Any]:
    """What the passes say, in their order -> {version, seed, precision, times (shares of T), facts: {fact: {win_share,
    _n, _low, _high, ties, margin}}}.

    margin: mean over scenes of the wrong caption's error of v minus the true one's.
    """
    judged = verdicts(torch.tensor([error for errors in found for error in errors], dtype=torch.float64), asked)
    said = {"version": VERSION, "seed": seed, "precision": precision, "times": list(TIMES)}
    return {**said, "facts": {name: numbers(verdict) for name, verdict in judged.items()}}


def probe_pipeline(
    pipeline: CaptionModel,
    asked: ProbeSet,
    seed: int = 0,
    precision: str = "auto",
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """`told` of all passes. advance: called with the number of captions judged (of `captions_of`)."""
    probing, found = Probing(pipeline, asked, seed, precision), []
    for number in range(len(probing.passes)):
        found.append(probing(number))
        advance(len(found[-1]))
    return told(found, asked, seed, precision)


def numbers(verdict: Verdict) -> dict[str, Any]:
    found = share("win_share", verdict.outcomes)
    return {**found, "ties": verdict.ties, "margin": round(float(verdict.margins.mean()), 6)}


def probe_table(measured: dict[str, Any]) -> str:
    """The numbers as text."""
    lines = [f"{'fact':<24}{'true caption wins':>18}{'95 % interval':>18}{'n':>6}{'margin':>10}"]
    for name, row in measured["facts"].items():
        interval = f"{100 * row['win_share_low']:.1f} to {100 * row['win_share_high']:.1f}"
        wins, n, margin = 100 * row["win_share"], row["win_share_n"], row["margin"]
        lines.append(f"{LABELS[name]:<24}{wins:>16.1f} %{interval:>18}{n:>6}{margin:>10.5f}")
    return "\n".join(lines)


def network_of(pipeline: CaptionModel) -> Network:
    return Network(pipeline.unet, pipeline.schedule, prediction_of(pipeline.diffusion))


@torch.inference_mode()
def mean_latents(pipeline: CaptionModel, images: np.ndarray) -> Tensor:
    """What is diffused of images uint8 (M, H, W, 3), scaled and cropped to the model's size: scaled means (M, C, h, w).

    Pixels are shrunk by area, as records of pixels are.
    """
    size = default_size(pipeline.meta["picture"])
    if images.shape[1:3] != tuple(size):
        by_area = pipeline.space == "pixels"
        images = np.stack([fit(Image.fromarray(image), *size, by_area) for image in images])
    found = []
    for first in range(0, len(images), ENCODED_AT_ONCE):
        part = torch.from_numpy(images[first : first + ENCODED_AT_ONCE]).to(pipeline.device).permute(0, 3, 1, 2)
        found.append(pipeline.encode_images(part.float() / 127.5 - 1).float())
    return torch.cat(found)
