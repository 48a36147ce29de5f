"""What was read in images as plain values, for whoever deals the reading out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from raphael.evaluate.scenes.reader import ReadObject, SceneReading, read_scene
from raphael.evaluate.subject import Pieces, Subject

READ_AT_ONCE = 50  # images a piece


def read_plainly(images: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """Images uint8 (H, W, 3) -> their readings, of values that JSON keeps."""
    return [plain(read_scene(image)) for image in images]


def plain(reading: SceneReading) -> dict[str, Any]:
    told = asdict(reading)
    for item in told["objects"]:
        item |= {"centre": [float(at) for at in item["centre"]], "extent": float(item["extent"])}
    return told


def reading_of(told: dict[str, Any]) -> SceneReading:
    """The inverse of `plain`, to the bit."""
    objects = tuple(ReadObject(**{**item, "centre": tuple(item["centre"])}) for item in told["objects"])
    return SceneReading(**{**told, "objects": objects})


def _of_images(subject: Subject, number: int) -> list[dict[str, Any]]:
    first = number * READ_AT_ONCE
    return read_plainly(subject.images_at(slice(first, first + READ_AT_ONCE)))


READINGS = Pieces(lambda subject: -(-len(subject.entries) // READ_AT_ONCE), _of_images)
