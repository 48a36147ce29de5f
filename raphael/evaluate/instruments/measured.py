"""The instruments as metrics of the model that generated the images: the ceilings, the probe, knock-outs and the swap.

Each tells its facts under its own key; where it has nothing to ask, `absent` says why.
"""

from __future__ import annotations

from typing import Any

from raphael.evaluate.metric import Found, Number
from raphael.evaluate.subject import Subject

INSTRUMENTS = ("ceiling", "probe", "knockouts", "swap")
COUNTS = {"ceiling": "num_probe", "probe": "num_probe", "knockouts": "num_knockout_images", "swap": "num_swaps"}


def ceiling(subject: Subject) -> Found:
    """The numbers of true images, as drawn and after the autoencoder (raphael/evaluate/scenes/breakdown.py)."""
    if not _count(subject, "ceiling"):
        return _none("ceiling")
    import numpy as np
    import torch

    from raphael.diffusion.sampling import decode_images
    from raphael.encoders.autoencoder import ENCODED_AT_ONCE
    from raphael.evaluate.instruments.probe import mean_latents
    from raphael.evaluate.scenes.breakdown import ceiling as ceiling_of

    asked, pipeline = subject.scenes, subject.pipeline
    latents, parts = mean_latents(pipeline, asked.images), pipeline.parts()
    with torch.inference_mode():
        decoded = [decode_images(parts, part) for part in latents.split(ENCODED_AT_ONCE)]
    reached = ceiling_of(asked.entries(), list(asked.images), list(np.concatenate(decoded)))
    return Found(facts={"ceiling": {"n": len(asked), **reached}})


def probe(subject: Subject) -> Found:
    if not (count := _count(subject, "probe")):
        return _none("probe")
    from raphael.evaluate.instruments.probe import probe_pipeline
    from raphael.objectives.probe import captions_of

    asked = subject.scenes.take(count)
    with subject.progress(captions_of(asked), "captions probed") as bar:
        return Found(facts={"probe": probe_pipeline(subject.pipeline, asked, advance=bar.update)})


def knockouts(subject: Subject) -> Found:
    if not (count := _count(subject, "knockouts")):
        return _none("knockouts")
    from raphael.evaluate.instruments import knockouts as ko

    pipeline = subject.pipeline
    images = ko.images_of_scenes(pipeline, subject.scenes, count)
    with subject.progress(ko.passes_of(pipeline.unet, ko.BY_BLOCK), "knock-outs") as bar:
        measured = ko.knockouts(pipeline, images, every_block=ko.BY_BLOCK, advance=bar.update)
    return Found(facts={"knockouts": measured})


def swap(subject: Subject) -> Found:
    if not (count := _count(subject, "swap")):
        return _none("swap")
    from raphael.evaluate.instruments.swap import pairs_of
    from raphael.evaluate.instruments.swap import swap as swap_of

    pairs = pairs_of(subject.scenes.entries(), count)
    return Found(facts={"swap": swap_of(subject.pipeline, pairs) if pairs else None})


def timestep_loss(subject: Subject) -> Found:
    """The mean over timesteps with its interval over images; beside it the loss at each timestep."""
    from raphael.evaluate.instruments import timestep_loss as by_timestep
    from raphael.evaluate.metrics.intervals import bootstrap_mean

    pipeline = subject.pipeline
    images, texts = by_timestep.chosen(pipeline, subject.scenes)
    with subject.progress(len(images) * by_timestep.BINS, "losses") as bar:
        losses = by_timestep.timestep_losses(pipeline, images, texts, advance=bar.update)
    by_image = losses.double().mean(1).tolist()
    low, high = bootstrap_mean(by_image) if len(by_image) > 1 else (None, None)
    facts = by_timestep.told(losses, by_timestep.timesteps(pipeline))
    number = Number("timestep_loss", float(sum(by_image) / len(by_image)), pipeline.identity, low, high)
    return Found([number], {"timestep_losses": facts})


def _count(subject: Subject, name: str) -> int:
    return subject.counts().get(COUNTS[name], 0)


def _none(name: str) -> Found:
    return Found(facts={name: None}, absent={name: f"evaluate.{COUNTS[name]} is 0"})


def tracked(facts: dict[str, Any]) -> dict[str, float]:
    """The instruments' numbers under their keys in MLflow, behind evaluate/."""
    numbers: dict[str, float] = {}
    for fact, row in (facts.get("probe") or {}).get("facts", {}).items():
        numbers[f"probe/{fact}"] = row["win_share"]
    for row in (facts.get("knockouts") or {}).get("parts", ()):
        if row["block"] is None:
            numbers[f"knockouts/{row['part']}"] = row["cost"]
    for fact, row in (facts.get("swap") or {}).get("facts", {}).items():
        numbers |= {f"swap/{fact}_{name}": row[name] for name in ("pooled", "attention")}
    if by_timestep := facts.get("timestep_losses"):
        pairs = zip(by_timestep["timesteps"], by_timestep["losses"], strict=True)
        numbers |= {f"timestep_loss/t{timestep:04d}": loss for timestep, loss in pairs}
    parts = {"relation_parts": facts.get("relation_parts") or {}}
    for images in ("drawn", "decoded"):
        reached = (facts.get("ceiling") or {}).get(images, {})
        parts[f"ceiling/{images}"] = {key: value for key, value in reached.items() if key.endswith("_accuracy")}
    for name, rows in parts.items():
        ends = ("_n", "_low", "_high")
        numbers |= {f"{name}/{key}": v for key, v in rows.items() if v is not None and not key.endswith(ends)}
    return numbers
