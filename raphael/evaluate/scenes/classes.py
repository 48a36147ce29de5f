"""Is the shape that was asked for by a label the one that is read? For models that know classes and no text.

An entry of images.json has `label`, a name; of drawn scenes that is the shape of their one object. The largest object
that is read counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from raphael.evaluate.metric import Found, Number
from raphael.evaluate.metrics.intervals import share
from raphael.evaluate.scenes.reader import MIN_SIDE_PX, SHAPES, SceneReading, read_scene
from raphael.evaluate.scenes.truth import READER
from raphael.evaluate.subject import Entry, Subject

NAME = "class_accuracy"
SUITE = "class"  # of the prompts


def label_prompts(labels: Sequence[str], seeds: Iterable[int]) -> list[Entry]:
    """The prompts of a class-conditional model in the form of prompts.json: each seed, of every label in turn.

    An entry's prompt is the name of its class, its label the same; the image is generated from its own seed.
    """
    return [
        {"prompt": label, "label": label, "suite": SUITE, "truth": None, "seed": int(seed)}
        for seed in seeds
        for label in labels
    ]


def class_accuracy(subject: Subject) -> Found:
    """The share of images whose largest object has the label's shape, and by label; chance as `chance_of` says."""
    if why := too_small(next(subject.images())):
        return Found(absent={NAME: why})
    rows = [(entry["label"], read) for entry, read in zip(subject.entries, subject.readings) if entry.get("label")]
    if strange := sorted({label for label, _ in rows} - set(SHAPES)):
        why = f"{strange[0]!r} is no shape that the scene reader knows ({', '.join(SHAPES)})"
        return Found(absent={NAME: f"labels: {why}; of other images no reader is here"})
    asked, read = [label for label, _ in rows], [shape_of(reading) for _, reading in rows]
    right = [one == other for one, other in zip(asked, read, strict=True)]
    told = share(NAME, right)
    ends = {"low": told[f"{NAME}_low"], "high": told[f"{NAME}_high"]}
    number = Number(NAME, told[NAME], READER, **ends, asked=len(right), chance=chance_of(asked, read))
    by_label = {name: share("value", [r for a, r in zip(asked, right) if a == name]) for name in sorted(set(asked))}
    return Found([number], {f"{NAME}_by_label": by_label})


def class_ceiling(subject: Subject) -> Found:
    """The same share of drawn scenes with one object, area-downsampled to the images' size: what the reader loses."""
    if why := too_small(next(subject.images())):
        return Found(absent={"class_ceiling": why})
    side, labels = next(subject.images()).shape[0], {entry.get("label") for entry in subject.entries}
    scenes = subject.scenes
    rows = [row for row, suite in enumerate(scenes.suites) if suite == "single"]
    rows = [row for row in rows if scenes.truths[row]["objects"][0]["shape"] in labels]
    right = [
        shape_of(read_scene(area_downsampled(scenes.images[row], side))) == scenes.truths[row]["objects"][0]["shape"]
        for row in rows
    ]
    if not right:
        return Found(absent={"class_ceiling": "no drawn scene with one object shows a label of these images"})
    name = f"{NAME}_ceiling"
    told = share(name, right)
    ends = {"low": told[f"{name}_low"], "high": told[f"{name}_high"]}
    return Found([Number(name, told[name], READER, **ends, asked=len(right))])


def too_small(image: np.ndarray) -> str:
    """Why the reader can make nothing of images (H, W, 3) of that size, "" where it can."""
    height, width = image.shape[:2]
    if min(height, width) >= MIN_SIDE_PX:
        return ""
    return f"images of {height} x {width} px are too small for the scene reader, which needs {MIN_SIDE_PX} px a side"


def shape_of(reading: SceneReading) -> str | None:
    """Of the largest object."""
    return reading.objects[0].shape if reading.objects else None


def chance_of(asked: Sequence[str], read: Sequence[str | None]) -> float | None:
    """The share of pairs of two different images, one's label and the other's shape, that agree: what a model that
    ignores its label would reach. None for a single image."""
    n = len(asked)
    if n < 2:
        return None
    shown, wanted = Counter(read), Counter(asked)
    own = sum(one == other for one, other in zip(asked, read, strict=True))
    return (sum(wanted[name] * shown[name] for name in wanted) - own) / (n * (n - 1))


def area_downsampled(image: np.ndarray, side_px: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (side, side, 3) by the means of areas; as it is where it is no larger."""
    import cv2

    if image.shape[0] <= side_px:
        return image
    return cv2.resize(image, (side_px, side_px), interpolation=cv2.INTER_AREA)
