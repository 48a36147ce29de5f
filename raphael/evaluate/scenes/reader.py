"""What is on a drawn scene? A classical detector without any training.

Colours are named by the nearest shade, objects are connected components, shapes and letters are told by overlap.

It knows the vocabulary of the embedded corpus and nothing of how that is drawn: colours, geometry and letters below
are its own. Pictures are read at 64 x 64 px whatever their size. On rendered scenes every attribute is right in >= 98
% of cases (tests/evaluate/scenes/test_scene_reader.py); soft or noisy pictures, as a latent model decodes them, are
read a little less well.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from raphael.evaluate.scenes.colours import common_name, distance_to_segment, read_background

SIDE = 64
MIN_SIDE_PX = 32  # of what can be read
FINE = 128  # masks are taken from the picture at twice the size: contours between pixels
FOREGROUND = 44.0  # RGB distance from every shade of the background
OBJECT, LETTER = 0.31, 0.14  # smallest extents, in shares of the side
TEMPLATES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart")
SHAPES = (*TEMPLATES, "ring")  # that an object can be read as
WORDS = ("CAT", "DOG", "SUN", "KEY", "FOX", "CUP", "MAP", "TOY", "ICE", "OWL", "BEE", "ZIP")
TILES = 6.0  # mean second difference of brightness between cells
WORD_SCORE = 0.45  # mean correlation of three letters with those of the best word
INKS = ((18.0, 16.0, 20.0), (248.0, 248.0, 248.0), (128.0, 128.0, 128.0))
ATTRIBUTES = ("background_colour", "shape_colour", "shape", "relation", "count", "text", "style")


@dataclass(frozen=True)
class ReadObject:
    """centre (x, y), extent and area are shares of the picture's side and area; score: overlap with the shape, 0..1."""

    shape: str
    colour: str
    centre: tuple[float, float]
    extent: float
    area: float
    style: str  # "flat", "outline" or "ink"
    score: float


@dataclass(frozen=True)
class SceneReading:
    background_colour: str
    objects: tuple[ReadObject, ...]  # the largest first
    style: str | None  # None: nothing to tell it by
    text: str | None

    @property
    def count(self) -> int:
        return len(self.objects)


def read_scene(image: np.ndarray) -> SceneReading:
    """Read a picture.

    image: uint8 (H, W, 3) RGB, at least 32 px on a side; scaled to cover 64 x 64 and cropped to its middle.
    Raises ValueError for another type or shape.
    """
    import cv2

    small = _at_reading_size(image)
    background = read_background(small)
    picture = cv2.resize(small, (FINE, FINE), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    distance = background.distance(picture)
    foreground = cv2.morphologyEx((distance > FOREGROUND).astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    bodies, writing = _components(foreground)
    objects = sorted((_read_object(picture, foreground, body) for body in bodies), key=lambda item: -item.area)
    styles = [item.style for item in objects]
    style = max(sorted(set(styles)), key=styles.count) if styles else None
    ground = cv2.dilate((distance > FOREGROUND).astype(np.uint8), np.ones((3, 3), np.uint8))[::2, ::2] == 0
    if _is_tiled(small, ground):
        style = "pixel"
    return SceneReading(background.colour, tuple(objects), style, _read_word(distance, writing))


def judge(reading: SceneReading, truth: dict[str, Any]) -> dict[str, bool | None]:
    """For each of ATTRIBUTES: is the reading what the truth (the form of prompts.json) asks for? None: it does not ask.

    shape_colour and shape ask for all objects of the truth at once; the pairing of asked and read objects that suits
    best counts. relation finds its two objects by colour (by shape where the colours are equal).
    """
    asked = truth.get("objects") or []
    pairs = pairing(asked, reading.objects)
    verdict: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
    colour = (truth.get("background") or {}).get("colour")
    if colour:
        verdict["background_colour"] = reading.background_colour == colour
    for attribute, name in (("shape_colour", "colour"), ("shape", "shape")):
        wanted = [(index, item[name]) for index, item in enumerate(asked) if item.get(name)]
        if wanted:
            verdict[attribute] = all(index in pairs and getattr(pairs[index], name) == value for index, value in wanted)
    if truth.get("relation"):
        verdict["relation"] = _holds(truth["relation"], asked, reading.objects)
    if truth.get("count") is not None:
        verdict["count"] = reading.count == truth["count"]
    if truth.get("text"):
        verdict["text"] = reading.text == truth["text"]
    if truth.get("style"):
        verdict["style"] = reading.style == truth["style"]
    return verdict


def pairing(asked: list[dict[str, Any]], read: tuple[ReadObject, ...]) -> dict[int, ReadObject]:
    """Asked object -> read object, each used once, with the most agreeing attributes.

    Larger objects first among equals.
    """
    read = read[:6]
    size = min(len(asked), len(read))
    best: tuple[int, dict[int, ReadObject]] = (-1, {})
    for wanted in itertools.combinations(range(len(asked)), size):
        for found in itertools.permutations(read, size):
            agree = sum(
                (item.colour == asked[index].get("colour")) + (item.shape == asked[index].get("shape"))
                for index, item in zip(wanted, found, strict=True)
            )
            if agree > best[0]:
                best = (agree, dict(zip(wanted, found, strict=True)))
    return best[1]


def _holds(relation: dict[str, Any], asked: list[dict[str, Any]], read: tuple[ReadObject, ...]) -> bool:
    subject, other = asked[relation["subject"]], asked[relation["object"]]
    name = "colour" if subject["colour"] != other["colour"] else "shape"
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation["kind"]]
    for a, b in itertools.permutations(read, 2):
        if getattr(a, name) == subject[name] and getattr(b, name) == other[name]:
            along, across = sign * (a.centre[axis] - b.centre[axis]), abs(a.centre[1 - axis] - b.centre[1 - axis])
            if along > 0.1 and along > across:
                return True
    return False


def _at_reading_size(image: np.ndarray) -> np.ndarray:
    import cv2

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < MIN_SIDE_PX:
        expected = f"uint8 (H, W, 3) of at least {MIN_SIDE_PX} px a side"
        raise ValueError(f"image: got {image.dtype} {image.shape}, expected {expected}")
    height, width = image.shape[:2]
    crop = min(height, width)
    top, left = (height - crop) // 2, (width - crop) // 2
    image = np.ascontiguousarray(image[top : top + crop, left : left + crop])
    if crop == SIDE:
        return image
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA if crop > SIDE else cv2.INTER_CUBIC)


# ---- objects -------------------------------------------------------------------------------------------------------


def _components(foreground: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Filled masks of the objects, and one mask of what has the size and place of letters."""
    import cv2

    closed = cv2.morphologyEx(foreground, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    bodies, writing = [], np.zeros_like(foreground)
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        filled = np.zeros_like(foreground)
        cv2.drawContours(filled, [contour], -1, 1, cv2.FILLED)
        low = height < 0.295 * FINE and y > 0.60 * FINE  # letters, single or run into each other
        if max(width, height) >= OBJECT * FINE and min(width, height) >= 0.12 * FINE and not low:
            bodies.append(filled)
        elif height >= LETTER * FINE and y > 0.55 * FINE:
            writing |= filled & closed
    return bodies, writing


def _read_object(picture: np.ndarray, foreground: np.ndarray, body: np.ndarray) -> ReadObject:
    import cv2

    painted = foreground & body
    rows, columns = np.nonzero(body)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    extent = max(bottom - top, right - left)
    depth = cv2.distanceTransform(painted, cv2.DIST_L2, 5)
    deepest = float(depth.max())
    core = picture[depth >= max(0.72 * deepest, 1.0)]
    colour = common_name(core)
    box = (slice(top, bottom), slice(left, right))
    shape, score = _shape(body[box])
    hollow = 1 - painted.sum() / body.sum() > 0.07 and deepest < 0.14 * extent
    if shape == "circle":
        shape, hollow = _disc_or_ring(painted[box])
    style = "flat"
    if hollow:
        style = "outline"
    elif _is_inked(picture, body, painted, np.median(core, axis=0)):
        style = "ink"
    centre = ((left + right) / 2 / FINE, (top + bottom) / 2 / FINE)
    return ReadObject(shape, colour, centre, extent / FINE, float(body.mean()), style, score)


def _is_inked(picture: np.ndarray, body: np.ndarray, painted: np.ndarray, own: np.ndarray) -> bool:
    """Is there, just inside the contour, a line of black, white or grey that is no mixture of object and background?"""
    import cv2

    around = cv2.dilate(body, np.ones((9, 9), np.uint8)) - cv2.dilate(body, np.ones((5, 5), np.uint8))
    ground = np.median(picture[around > 0], axis=0) if around.any() else own
    depth = np.where(painted > 0, cv2.distanceTransform(body, cv2.DIST_L2, 5), 0)
    lines = [picture[(depth >= nearest) & (depth < nearest + 1)] for nearest in (1.5, 2.5, 3.5)]
    lines = [line for line in lines if len(line)]
    for ink in INKS:
        reach = np.linalg.norm(own - ink)
        if min(reach, np.linalg.norm(ground - ink)) < 60:
            continue  # not visible on this object or this background
        on_the_way = (
            distance_to_segment(np.float32(ink), own, ground) < 40
        )  # grey between black and white: any edge has it
        share = []
        for line in lines:
            near = np.linalg.norm(line - ink, axis=1) < 0.55 * reach
            share.append((near & (on_the_way | (distance_to_segment(line, own, ground) >= 40))).mean())
        if share and (min(share) if on_the_way else max(share)) > 0.6:
            return True
    return False


def _shape(body: np.ndarray) -> tuple[str, float]:
    """The template that overlaps the filled body best, both stretched to a square, and by how much."""
    import cv2

    stretched = cv2.resize(body.astype(np.float32), (48, 48), interpolation=cv2.INTER_AREA) > 0.5
    names, masks = _templates()
    flat = stretched.ravel().astype(np.float32)
    both = masks @ flat
    scores = both / (masks.sum(1) + flat.sum() - both)
    best = int(scores.argmax())
    return names[best], float(scores[best])


def _disc_or_ring(painted: np.ndarray) -> tuple[str, bool]:
    """Round things by what is painted along the radius: (name, is it an outline drawing).

    A disc is painted throughout, or at its contour alone (outline). A ring's middle is empty; it is a broad band, or
    two strokes with nothing between them (outline).
    """
    height, width = painted.shape
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot((x + 0.5) / width * 2 - 1, (y + 0.5) / height * 2 - 1)
    middle, inner, outer = (
        painted[(radius >= a) & (radius < b)].mean() for a, b in ((0, 0.20), (0.31, 0.46), (0.51, 0.66))
    )
    if outer >= 0.5:
        return ("ring" if middle < 0.4 else "circle"), False
    return ("ring" if inner > 0.5 and middle < 0.6 else "circle"), True


@functools.cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Names, and (K, 48 * 48) filled shapes stretched to a square, drawn smoothly and from coarse cells."""
    names, masks = [], []
    for name in TEMPLATES:
        smooth = _inside(name, 240)
        variants = [smooth]
        for cells in (6, 7, 8, 9):
            step = 240 // cells
            coarse = smooth[: step * cells, : step * cells].reshape(cells, step, cells, step).mean((1, 3)) >= 0.45
            variants.append(coarse.repeat(step, 0).repeat(step, 1))
        names += [name] * len(variants)
        masks += [_stretched(mask).ravel() for mask in variants]
    return names, np.array(masks, np.float32)


def _stretched(mask: np.ndarray) -> np.ndarray:
    import cv2

    rows, columns = np.nonzero(mask)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32)
    return cv2.resize(cut, (48, 48), interpolation=cv2.INTER_AREA) > 0.5


def _inside(name: str, side: int) -> np.ndarray:
    """(side, side) bool of an implicit shape; y grows downwards."""
    y, x = np.mgrid[0:side, 0:side]
    x, y = (x + 0.5) / side * 2 - 1, (y + 0.5) / side * 2 - 1
    if name == "circle":
        return x * x + y * y <= 1
    if name == "square":
        return np.full((side, side), True)
    if name == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if name == "cross":
        return (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)
    if name == "diamond":
        return np.abs(x) + np.abs(y) <= 1
    if name == "heart":
        u, v = x * 1.2, 0.15 - y * 1.12
        return (u * u + v * v - 1) ** 3 - u * u * v**3 <= 0
    angle, radius = np.arctan2(x, -(y - 0.05)), np.hypot(x, y - 0.05)  # a star of five points
    wedge = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    inner = 0.42  # radius of the notches; the edge runs from a notch (wedge = pi/5) to a tip (wedge = 0)
    edge = (
        inner
        * np.sin(np.pi / 5)
        / (inner * np.sin(np.pi / 5) * np.cos(wedge) + np.sin(wedge) * (1 - inner * np.cos(np.pi / 5)))
    )
    return radius <= 1.05 * edge


# ---- style and words -----------------------------------------------------------------------------------------------


def _roughness(small: np.ndarray, ground: np.ndarray) -> tuple[float, float]:
    """Jumps of brightness from cell to cell of a 16 x 16 grid, and on the same grid moved by half a cell.

    small: (64, 64, 3); ground: (64, 64) bool, True on the background, where alone jumps count. Second differences, so
    that a gradient is no jump; the middle 2 x 2 px of each cell, which a blur leaves alone.
    """
    grey = small.astype(np.float32).mean(-1)

    def measure(offset: int) -> float:
        cut = (slice(offset, offset + 60),) * 2
        part = grey[cut].reshape(15, 4, 15, 4)[:, 1:3, :, 1:3].mean((1, 3))
        free = ground[cut].reshape(15, 4, 15, 4).all((1, 3))
        jumps = []
        for values, where in ((part, free), (part.T, free.T)):
            three = where[:-2] & where[1:-1] & where[2:]
            jumps.append(np.abs(np.diff(values, 2, axis=0))[three])
        jumps = np.concatenate(jumps)
        return float(jumps.mean()) if len(jumps) >= 12 else 0.0

    return measure(0), measure(2)


def _is_tiled(small: np.ndarray, ground: np.ndarray) -> bool:
    on, off = _roughness(small, ground)
    return on > TILES and on > 1.15 * off


def _read_word(distance: np.ndarray, writing: np.ndarray) -> str | None:
    """The word of the list that the letters resemble most, or None. distance: of each pixel from the background."""
    import cv2

    if not writing.any():
        return None
    rows, columns = np.nonzero(writing)
    ink = np.quantile(distance[writing > 0], 0.9)
    sharp = np.zeros_like(writing)  # half way between ink and background: letters that a blur has joined come apart
    window = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    sharp[window] = (distance[window] > 0.5 * ink) & (cv2.dilate(writing, np.ones((3, 3), np.uint8))[window] > 0)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(sharp, connectivity=8)
    letters = [
        (stats[i, cv2.CC_STAT_LEFT], labels == i)
        for i in range(1, len(stats))
        if stats[i, cv2.CC_STAT_HEIGHT] >= LETTER * FINE
    ]
    if len(letters) != 3:
        return None
    read = [_letter_box(mask) for _, mask in sorted(letters, key=lambda item: item[0])]
    likeness = [
        {letter: _letter_score(*box, letter) for letter in {word[place] for word in WORDS}}
        for place, box in enumerate(read)
    ]
    scores = {word: sum(likeness[place][letter] for place, letter in enumerate(word)) / 3 for word in WORDS}
    best = max(scores, key=scores.get)
    return best if scores[best] >= WORD_SCORE else None


def _letter_box(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """A letter cut to its ink at 24 x 24, less its mean and of norm 1, and its width / height."""
    import cv2

    rows, columns = np.nonzero(mask)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32)
    box = cv2.GaussianBlur(cv2.resize(cut, (24, 24), interpolation=cv2.INTER_AREA), (0, 0), 1.2)
    box = box - box.mean()
    return box / max(float(np.linalg.norm(box)), 1e-6), cut.shape[1] / cut.shape[0]


@functools.cache
def _letter_templates(letter: str) -> list[tuple[np.ndarray, float]]:
    import cv2

    out = []
    for font in (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX):
        for thickness in (12, 18):
            canvas = np.zeros((200, 200), np.uint8)
            cv2.putText(canvas, letter, (40, 150), font, 4.0, 255, thickness, cv2.LINE_AA)
            out.append(_letter_box(canvas > 127))
    return out


def _letter_score(box: np.ndarray, aspect: float, letter: str) -> float:
    """Correlation with the best template, less for another proportion."""
    templates = _letter_templates(letter)
    return max(float((box * mask).sum()) - 0.5 * abs(math.log(aspect / proportion)) for mask, proportion in templates)
