"""A cascade's upsampler alone: drawn scenes, shrunk by the mean over areas, enlarged by it and by interpolation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from raphael.evaluate.metric import Found, Number
from raphael.evaluate.metrics.intervals import bootstrap_mean, share
from raphael.evaluate.scenes.attributes import wrong_attributes
from raphael.evaluate.scenes.reader import read_scene
from raphael.evaluate.scenes.truth import READER
from raphael.evaluate.subject import Subject

SCENES, BATCH = 128, 32
GAIN, READ = "psnr_over_bilinear", "enlarged_read_right"  # the numbers' names


def upsampler(subject: Subject) -> Found:
    """GAIN: dB of PSNR against the drawn scenes that the upsampler has over bilinear enlarging; READ: share of scenes
    whose every attribute is read right after enlarging. Both without augmentation, since a drawn scene has none of the
    base's errors. In the facts the same at the augmentation that the model samples with, bilinear's, and the drawn
    scenes' own. Absent of a model without an upsampler."""
    pipeline = subject.pipeline
    if not hasattr(pipeline, "enlarge"):
        return Found(absent={"upsampler": "the model has no upsampler"})
    rows = chosen(len(subject.scenes))
    true = np.stack([subject.scenes.images[row] for row in rows])
    entries, texts = ([all_of[row] for row in rows] for all_of in (subject.scenes.entries(), subject.scenes.captions))
    low, plain = shrunk_and_bilinear(pipeline, true)
    levels = sorted({0.0, pipeline.defaults.augmentation})
    told = {
        "n": len(rows),
        "drawn": judged(true, true, plain, entries),
        "bilinear": judged(plain, true, plain, entries),
    }
    with subject.progress(len(rows) * len(levels), "images enlarged") as bar:
        made = {level: enlarged_by(pipeline, low, texts, level, bar.update) for level in levels}
    told["by_augmentation"] = [{"level": level, **judged(made[level], true, plain, entries)} for level in levels]
    gains, right = gains_of(made[0.0], true, plain), read_right(made[0.0], entries)
    ends, told_right = bootstrap_mean(gains) if len(rows) > 1 else (None, None), share(READ, right)
    numbers = [Number(GAIN, float(np.mean(gains)), pipeline.identity, *ends)]
    within = {end: told_right[f"{READ}_{end}"] for end in ("low", "high")}
    numbers.append(Number(READ, told_right[READ], READER, **within, asked=len(right)))
    return Found(numbers, {"upsampler": told})


def chosen(count: int) -> list[int]:
    """At most SCENES rows, spread over all."""
    taken = min(SCENES, count)
    return [index * count // taken for index in range(taken)]


def shrunk_and_bilinear(pipeline: Any, images: np.ndarray) -> tuple[Any, np.ndarray]:
    """Of images uint8 (n, H, W, 3) at the model's size: shrunk by its factor (n, 3, h, w), and bilinearly back."""
    from raphael.diffusion.cascade import enlarged
    from raphael.diffusion.sampling import as_bytes
    from raphael.evaluate.instruments.timestep_loss import latents_of

    low = latents_of(pipeline, images)
    return low, as_bytes(enlarged(low, pipeline.upsampler.factor))


def enlarged_by(pipeline: Any, low: Any, texts: list[str], level: float, advance: Any) -> np.ndarray:
    """By the upsampler, at a level of augmentation, uint8 (n, H, W, 3). The noise of image i is that of seed (0, i)."""
    from raphael.diffusion.sampling import as_bytes

    how, made = replace(pipeline.defaults, augmentation=level), []
    for start in range(0, len(low), BATCH):
        part = slice(start, start + BATCH)
        seeds = [(0, index) for index in range(start, start + len(low[part]))]
        made.append(as_bytes(pipeline.enlarge(low[part], texts[part], seeds, how)))
        advance(len(made[-1]))
    return np.concatenate(made)


def judged(images: np.ndarray, true: np.ndarray, plain: np.ndarray, entries: list[dict[str, Any]]) -> dict[str, Any]:
    told = {"psnr": mean(psnr(*pair) for pair in zip(images, true, strict=True))}
    return told | {"gain_db": mean(gains_of(images, true, plain))} | share("read_right", read_right(images, entries))


def gains_of(images: np.ndarray, true: np.ndarray, plain: np.ndarray) -> list[float]:
    """dB of each image above the bilinear one."""
    return [psnr(one, image) - psnr(other, image) for one, other, image in zip(images, plain, true, strict=True)]


def read_right(images: np.ndarray, entries: list[dict[str, Any]]) -> list[bool]:
    return [not wrong_attributes(entry, read_scene(image)) for entry, image in zip(entries, images, strict=True)]


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Of bytes, in dB: 10 log10(255^2 / mean square error); equal images have 99."""
    error = float(np.square(np.asarray(image, np.float64) - np.asarray(truth, np.float64)).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 4)
