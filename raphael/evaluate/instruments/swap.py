"""Whose colour, shape and background does an image show, when the pooled text is A's and all else is B's?

With `unet.pooled_text` every res-block reads one vector of the whole caption. Here that vector is A's, while attention,
masks and routes read B's tokens. An object in A's colour says that words bypass attention. Of a network without the
vector there is nothing to exchange: what attention alone gives is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raphael.base.precision import autocast
from raphael.diffusion.sampling import encode_texts, generate_images
from raphael.evaluate.metrics.intervals import share
from raphael.evaluate.scenes.reader import SceneReading, read_scene
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.unet import UNet

VERSION = "swap/v1"
FACTS = ("colour", "shape", "background")
Entry = dict[str, Any]  # prompt and truth, as prompts.json has them


def pairs_of(entries: Sequence[Entry], n: int) -> list[tuple[Entry, Entry]]:
    """The first n entries of the suite single as B, each with the next one as A that differs in all of FACTS."""
    single = [entry for entry in entries if entry["suite"] == "single"]
    found = []
    for index, b in enumerate(single):
        others = single[index + 1 :] + single[:index]
        a = next((a for a in others if all(_asked(a)[f] != _asked(b)[f] for f in FACTS)), None)
        if a is not None:
            found.append((a, b))
    return found[:n]


def swap(pipeline: RaphaelPipeline, pairs: Sequence[tuple[Entry, Entry]], seed: int = 0) -> dict[str, Any]:
    """Generate B's prompts with A's pooled text and read what they show; the model's own steps and guidance.

    -> {version, pooled_text, n, seed, steps, guidance_scale, facts: {fact: {pooled, attention, neither, each with _n,
    _low, _high}}}: the shares of images that show A's (pooled), B's (attention) or another. Raises ValueError without
    pairs.
    """
    if not pairs:
        raise ValueError("got no pairs of prompts, expected single objects that differ in colour, shape and background")
    settings = replace(pipeline.defaults, precision="auto")
    a, b = ([pair[side]["prompt"] for pair in pairs] for side in (0, 1))
    seeds, pooled = [(seed, index) for index in range(len(pairs))], pipeline.unet.config.pooled_text
    vectors = pooled_vectors(pipeline, a) if pooled else None
    with pooled_text_of(pipeline.unet, vectors):
        images = generate_images(pipeline.parts(), b, seeds, settings, batch_size=len(pairs))
    told = {"version": VERSION, "pooled_text": pooled, "n": len(pairs), "seed": seed, "steps": settings.steps}
    return {**told, "guidance_scale": settings.guidance_scale, "facts": whose(pairs, [read_scene(i) for i in images])}


def whose(pairs: Sequence[tuple[Entry, Entry]], readings: Sequence[SceneReading]) -> dict[str, Any]:
    """Fact -> shares of the readings that are A's, B's, neither's."""
    found = {}
    for fact in FACTS:
        read = [_read(reading)[fact] for reading in readings]
        a, b = ([_asked(pair[side])[fact] for pair in pairs] for side in (0, 1))
        is_a, is_b = ([x == y for x, y in zip(read, asked, strict=True)] for asked in (a, b))
        neither = [not (one or other) for one, other in zip(is_a, is_b, strict=True)]
        found[fact] = share("pooled", is_a) | share("attention", is_b) | share("neither", neither)
    return found


@torch.inference_mode()
def pooled_vectors(pipeline: RaphaelPipeline, prompts: list[str]) -> Tensor:
    """What `pooled_text` adds to the timestep's embedding for these prompts, (n, time_dim)."""
    parts, found = pipeline.parts(), []
    cond = encode_texts(parts, prompts)
    x = torch.zeros(len(prompts), *parts.latent_shape, device=pipeline.device)
    handle = pipeline.unet.text_embedding.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        with autocast("fp32", pipeline.device):
            pipeline.unet(x, torch.zeros(len(prompts), device=pipeline.device), cond)
    finally:
        handle.remove()
    return found[0]


@contextlib.contextmanager
def pooled_text_of(unet: UNet, vectors: Tensor | None) -> Iterator[None]:
    """Inside, the first len(vectors) samples of every batch have these pooled texts; None: nothing is exchanged.

    They are the conditional half: guidance puts the empty captions behind them (raphael/diffusion/guidance.py).
    """
    if vectors is None:
        yield
        return

    def exchanged(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.cat([vectors.to(output), output[len(vectors) :]])

    handle = unet.text_embedding.register_forward_hook(exchanged)
    try:
        yield
    finally:
        handle.remove()


def swap_text(measured: dict[str, Any]) -> str:
    """The numbers as text."""
    lines = [f"{measured['n']} pairs of prompts, {measured['steps']} steps, guidance {measured['guidance_scale']:g}"]
    if measured["pooled_text"]:
        lines.append("pooled text of A; attention, masks and routes of B")
    else:
        lines.append("no pooled text in this model (unet.pooled_text: false): attention alone, and A had no way in")
    lines.append(f"{'':<12}{'A, pooled':>12}{'B, attention':>14}{'neither':>10}")
    for fact, row in measured["facts"].items():
        shares = (100 * row[name] for name in ("pooled", "attention", "neither"))
        lines.append("{:<12}{:>10.0f} %{:>12.0f} %{:>8.0f} %".format(fact, *shares))
    return "\n".join(lines)


def _asked(entry: Entry) -> dict[str, Any]:
    (thing,), background = entry["truth"]["objects"], entry["truth"]["background"]["colour"]
    return {"colour": thing["colour"], "shape": thing["shape"], "background": background}


def _read(reading: SceneReading) -> dict[str, Any]:
    """Of the largest object."""
    thing = reading.objects[0] if reading.objects else None
    return {
        "colour": getattr(thing, "colour", None),
        "shape": getattr(thing, "shape", None),
        "background": reading.background_colour,
    }
