"""Random prompts of one or two objects, and what is measured in images of them; for edits.py and inpainting.py."""

from __future__ import annotations

import random

import numpy as np

from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import Scene, Thing
from raphael.evaluate.scenes.reader import read_scene
from raphael.generate.pipeline import Pipeline

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
Subject = tuple[str, str, str, str, str]  # colour, shape, another colour, another shape, background


def subjects(n: int) -> list[Subject]:
    rng = random.Random(0)
    chosen = [(rng.sample(COLOURS, 3), rng.sample(SHAPES, 2)) for _ in range(n)]
    return [(colours[0], shapes[0], colours[1], shapes[1], colours[2]) for colours, shapes in chosen]


def scene(colour: str, shape: str, background: str) -> str:
    return f"a {colour} {shape} on a {background} background, flat style"


def read(image: np.ndarray) -> tuple[str | None, str | None]:
    """Colour and shape of the largest object."""
    objects = read_scene(image).objects
    return (objects[0].colour, objects[0].shape) if objects else (None, None)


def drawn(pipeline: Pipeline, prompt: str, seed: int) -> np.ndarray:
    return np.asarray(pipeline(prompt, seed=seed).images[0])


def pictured(subject: Subject, seed: int) -> np.ndarray:
    """A picture of the first object that no model has drawn: the corpus' program did, somewhere and of some size."""
    (colour, shape, _, _, background), rng = subject, random.Random(f"picture {seed}")
    extent = rng.uniform(0.35, 0.55)
    centre = tuple(rng.uniform(extent / 2 + 0.05, 0.95 - extent / 2) for _ in range(2))
    thing = Thing(shape, colour, None, "solid", centre, extent)
    made = Scene(64, "flat", background, "plain", (thing,), "single", None, None, f"picture {seed}")
    return np.asarray(draw(made).convert("RGB"))


def body(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: far from the frame's median colour."""
    pixels = image.astype(float)
    frame = np.concatenate([side.reshape(-1, 3) for side in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])])
    return np.linalg.norm(pixels - np.median(frame, 0), axis=2) > 44


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def outside(one: np.ndarray, other: np.ndarray) -> float:
    import cv2

    away = ~cv2.dilate(body(one).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    return float(np.abs(one.astype(float) - other)[away].mean())


def change(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(64, 64) bool."""
    mask = np.zeros((64, 64), bool)
    mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return mask


def step(image: np.ndarray, mask: np.ndarray) -> float:
    """The seam: mean absolute difference of neighbours of which one lies in the mask."""
    found, pixels = [], image.astype(float)
    for axis in (0, 1):
        across = np.diff(mask.astype(int), axis=axis) != 0
        found.append(np.abs(np.diff(pixels, axis=axis))[across].mean(-1))
    return float(np.concatenate(found).mean())


def other(c1: str, s1: str, c2: str, s2: str, b: str) -> tuple[str, str]:
    """A colour and a shape that neither object nor the ground has."""
    colour = next(c for c in ("green", "red", "blue", "yellow") if c not in (c1, c2, b))
    return colour, next(s for s in ("circle", "square", "star") if s not in (s1, s2))


def two_objects(pipeline: Pipeline, subject: Subject, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A picture of both and the bounding square of the right one with 3 px around it; None where they are not read."""
    c1, s1, c2, s2, b = subject
    source = drawn(pipeline, f"a {c1} {s1} left of a {c2} {s2} on a plain {b} background, flat style", seed)
    masked = [thing for thing in read_scene(source).objects if thing.colour == c2]
    if len(masked) != 1:
        return None
    (x, y), half = masked[0].centre, masked[0].extent / 2 + 3 / 64
    return source, box(*(round(64 * edge) for edge in (y - half, y + half, x - half, x + half)))
