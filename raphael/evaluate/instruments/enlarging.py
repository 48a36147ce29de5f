"""A cascade's upsampler alone: drawn scenes, shrunk by the mean over areas, enlarged by it and by interpolation."""

from __future__ import annotations

from typing import Any

import numpy as np

from raphael.evaluate.metric import Found
from raphael.evaluate.metrics.intervals import bootstrap_mean, share
from raphael.evaluate.scenes.attributes import wrong_attributes
from raphael.evaluate.scenes.reader import read_scene
from raphael.evaluate.subject import Subject

SCENES, BATCH = 128, 32


def upsampler(subject: Subject) -> Found:
    """PSNR of the upsampler and of bilinear enlarging against the drawn scenes, and the share of scenes whose every
    attribute is read right in the drawn image and in each enlarged one; None of a model without an upsampler."""
    if not hasattr(subject.pipeline, "enlarge"):
        return Found(facts={"upsampler": None})
    asked = subject.scenes
    count = min(SCENES, len(asked))
    rows = [index * len(asked) // count for index in range(count)]
    true = np.stack([asked.images[row] for row in rows])
    with subject.progress(count, "images enlarged") as bar:
        made, plain = enlarged_both(subject.pipeline, true, [asked.captions[row] for row in rows], bar.update)
    entries, facts = [asked.entries()[row] for row in rows], {"n": count}
    for name, images in (("drawn", true), ("upsampler", made), ("bilinear", plain)):
        right = [not wrong_attributes(entry, read_scene(image)) for entry, image in zip(entries, images, strict=True)]
        facts |= share(f"{name}_read_right", right)
    gains = [psnr(one, image) - psnr(other, image) for one, other, image in zip(made, plain, true, strict=True)]
    facts |= {"psnr": mean(psnr(*pair) for pair in zip(made, true, strict=True))}
    facts |= {"psnr_bilinear": mean(psnr(*pair) for pair in zip(plain, true, strict=True))}
    ends = bootstrap_mean(gains) if count > 1 else (None, None)
    return Found(facts={"upsampler": {**facts, "gain_db": mean(gains), "gain_db_interval": list(ends)}})


def enlarged_both(pipeline: Any, images: np.ndarray, texts: list[str], advance: Any) -> tuple[np.ndarray, np.ndarray]:
    """(by the upsampler, bilinear) of images uint8 (n, H, W, 3) at the model's size, shrunk by its factor."""
    from raphael.diffusion.cascade import enlarged
    from raphael.diffusion.sampling import as_bytes
    from raphael.evaluate.instruments.timestep_loss import latents_of

    low, made = latents_of(pipeline, images), []
    for start in range(0, len(low), BATCH):
        part = slice(start, start + BATCH)
        seeds = [(0, index) for index in range(start, start + len(low[part]))]
        made.append(as_bytes(pipeline.enlarge(low[part], texts[part], seeds)))
        advance(len(made[-1]))
    return np.concatenate(made), as_bytes(enlarged(low, pipeline.upsampler.factor))


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Of bytes, in dB: 10 log10(255^2 / mean square error); equal images have 99."""
    error = float(np.square(np.asarray(image, np.float64) - np.asarray(truth, np.float64)).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 4)
