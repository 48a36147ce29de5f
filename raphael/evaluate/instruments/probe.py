"""`probe/v1` of a pipeline: the share of held-out scenes whose true caption has the lower loss, by fact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.precision import autocast
from raphael.base.probe_set import ProbeSet
from raphael.diffusion.prediction import prediction_of
from raphael.encoders.autoencoder import encode_images
from raphael.evaluate.metrics.intervals import share
from raphael.generate.pipeline import RaphaelPipeline, default_size
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


class Probing:
    """The probe of one pipeline, pass by pass; a pass is the same whatever passes were before it, here or elsewhere.

    precision: of the network's products.
    """

    def __init__(self, pipeline: RaphaelPipeline, asked: ProbeSet, seed: int = 0, precision: str = "auto"):
        self.passes, self.precision, self.pipeline = passes(asked), precision, pipeline
        latents = in_place(asked, mean_latents(pipeline, asked.images[asked.rows]))
        self.errors = network_errors(network_of(pipeline), latents, pipeline.encode, seed)

    @torch.inference_mode()
    def __call__(self, number: int) -> list[float]:
        """The errors of v of the captions of that pass."""
        with self.pipeline.unet.remembering(), autocast(self.precision, self.pipeline.device):  # a text, five times
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
    pipeline: RaphaelPipeline,
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


def network_of(pipeline: RaphaelPipeline) -> Network:
    return Network(pipeline.unet, pipeline.schedule, prediction_of(pipeline.diffusion))


def mean_latents(pipeline: RaphaelPipeline, images: np.ndarray) -> Tensor:
    """Scaled mean latents (M, C, h, w) of images uint8 (M, H, W, 3), scaled and cropped to the model's size."""
    return encode_images(pipeline.autoencoder, images, default_size(pipeline.meta["picture"]))
