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
from raphael.objectives.probe import TIMES, VERSION, Network, Verdict, in_place, network_errors, probe

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


@torch.inference_mode()
def probe_pipeline(
    pipeline: RaphaelPipeline,
    asked: ProbeSet,
    seed: int = 0,
    precision: str = "auto",
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """-> {version, seed, precision, times (shares of T), facts: {fact: {win_share, _n, _low, _high, ties, margin}}}.

    margin: mean over scenes of the wrong caption's error of v minus the true one's. precision: of the network's
    products. advance: called with the number of captions judged (of `captions_of`).
    """
    latents = in_place(asked, mean_latents(pipeline, asked.images[asked.rows]))
    errors = network_errors(network_of(pipeline), latents, pipeline.encode, seed)
    with autocast(precision, pipeline.device):
        verdicts = probe(errors, asked, advance)
    told = {"version": VERSION, "seed": seed, "precision": precision, "times": list(TIMES)}
    return {**told, "facts": {name: numbers(verdict) for name, verdict in verdicts.items()}}


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
