"""The embedded corpus: small drawn images whose truth is known.

A scene is a function of (seed, row) and nothing else: `scene_of_row` decides what is in it,
data_pipeline/source/scene_captions.py says it in words, `draw` paints it. A fixed share of the (shape, colour,
background colour) combinations is held out: no training scene has an object of such a combination, every held-out
prompt has nothing else.

Layout, in shares of the side: one object of 0.38-0.60; two side by side of 0.37-0.42; three in quadrants of 0.36-0.41.
Nothing is smaller, so that every attribute is legible at 64 x 64 px (raphael/evaluate/scenes/reader.py reads them
back).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

from raphael.base.config.data import LayoutShares

# ring and diamond can be drawn and read, too; two cores have no minutes to learn them beside these
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {  # sRGB 0..255; pairwise at least 115 apart, so that shades stay nearest to their own name
    "red": (220, 30, 36),
    "orange": (255, 142, 8),
    "yellow": (255, 226, 30),
    "green": (34, 158, 64),
    "cyan": (64, 214, 232),
    "blue": (30, 76, 222),
    "purple": (128, 42, 168),
    "pink": (255, 134, 192),
    "white": (250, 250, 248),
    "black": (18, 18, 20),
}
SIZES = {"small": (0.38, 0.42), "large": (0.54, 0.60)}  # extent as a share of the image's side
TEXTURES = {"solid": 0.8, "striped": 0.1, "dotted": 0.1}
STYLES = {"flat": 0.4, "outline": 0.2, "ink": 0.2, "pixel": 0.2}  # with their shares
BACKGROUNDS = {"plain": 0.75, "gradient": 0.25}
RELATIONS = ("left of", "right of", "above", "below")
WORDS = ("CAT", "DOG", "SUN", "KEY", "FOX", "CUP", "MAP", "TOY", "ICE", "OWL", "BEE", "ZIP")
SUITES = ("single", "relation", "count", "text")

LAYOUTS = ("single", "relation", "count", "text", "pair", "three")
LAYOUT_SHARES = vars(LayoutShares())  # where nothing else is said
CELLS = 16  # of a pixel-style image, along a side: one per latent of a 4x autoencoder at 64 px
SUPERSAMPLING = 3

Combination = tuple[str, str, str]  # shape, colour, background colour


@dataclass(frozen=True)
class Thing:
    """One object. centre and extent are shares of the image's side; extent is the larger of width and height."""

    shape: str
    colour: str
    size: str | None  # "small", "large" or neither
    texture: str
    centre: tuple[float, float]
    extent: float


@dataclass(frozen=True)
class Scene:
    side_px: int
    style: str
    background: str
    background_kind: str
    things: tuple[Thing, ...]
    layout: str  # one of LAYOUTS
    relation: str | None  # of things[0] to things[1]
    word: str | None
    brush: str  # seed of everything that is hand-drawn: wobble, jitter, direction of the gradient

    def truth(self) -> dict[str, Any]:
        """All there is to know, in the form that prompts.json holds (see data_pipeline/source/scene_captions.py)."""
        return {
            "style": self.style,
            "background": {"colour": self.background, "kind": self.background_kind},
            "objects": [
                {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "texture": thing.texture}
                for thing in self.things
            ],
            "relation": {"kind": self.relation, "subject": 0, "object": 1} if self.relation else None,
            "count": len(self.things),
            "text": self.word,
        }


@functools.lru_cache(maxsize=8)
def heldout_combinations(seed: int, share: float) -> frozenset[Combination]:
    """At least `share` of all combinations, the same number on every background, no value held out altogether."""
    rng = random.Random(f"{seed}/heldout")
    heldout: set[Combination] = set()
    for background in COLOURS:
        choices = [(shape, colour, background) for shape in SHAPES for colour in COLOURS if colour != background]
        heldout.update(rng.sample(choices, math.ceil(share * len(choices))))
    kept = set(all_combinations()) - heldout
    for position, values in enumerate((SHAPES, COLOURS, COLOURS)):
        assert {combination[position] for combination in kept} == set(values), "a value was held out altogether"
    return frozenset(heldout)


@functools.cache
def all_combinations() -> tuple[Combination, ...]:
    return tuple(item for item in itertools.product(SHAPES, COLOURS, COLOURS) if item[1] != item[2])


def scene_of_row(
    seed: int,
    row: int,
    sides_px: tuple[int, int],
    heldout_share: float,
    shares: dict[str, float] = LAYOUT_SHARES,
) -> Scene:
    """Training scene number `row`; sides_px: smallest and largest side; shares: how often each layout comes."""
    rng = random.Random(f"{seed}/row/{row}")
    layout = rng.choices(LAYOUTS, [shares[layout] for layout in LAYOUTS])[0]
    heldout = heldout_combinations(seed, heldout_share)
    return _compose(rng, layout, sides_px, lambda combination: combination not in heldout, f"{seed}/brush/{row}")


def heldout_scene(seed: int, suite: str, number: int, side_px: int, heldout_share: float, stream: str = "") -> Scene:
    """Scene number `number` of a held-out suite: every object in it is a held-out combination.

    stream: of other scenes over the same combinations; "" is that of the reporting prompts.
    """
    rng = random.Random(f"{seed}/{stream}{suite}/{number}")
    heldout = heldout_combinations(seed, heldout_share)
    count = 1 + number % 3 if suite == "count" else None
    brush = f"{seed}/{stream}brush/{suite}/{number}"
    return _compose(rng, suite, (side_px, side_px), heldout.__contains__, brush, count)


def _compose(rng, layout, sides_px, allowed, brush, count=None) -> Scene:
    low, high = sides_px
    sides = [side for side in range(low, high + 1) if side % 16 == 0] or [low]
    style, kind = _draw_from(rng, STYLES), _draw_from(rng, BACKGROUNDS)
    if layout == "count":
        count = count or rng.choice((2, 3))
    number_of_kinds = {"relation": 2, "pair": 2, "three": 3}.get(layout, 1)
    while True:
        background = rng.choice(list(COLOURS))
        shapes = rng.sample(SHAPES, number_of_kinds)
        colours = rng.sample([colour for colour in COLOURS if colour != background], number_of_kinds)
        if all(allowed((shape, colour, background)) for shape, colour in zip(shapes, colours, strict=True)):
            break
    relation = rng.choice(RELATIONS) if layout in ("relation", "pair") else None
    places, sizes = _places(rng, layout, relation, count)
    if layout == "count":
        shapes, colours = shapes * len(places), colours * len(places)
    texture = "solid" if style == "outline" else _draw_from(rng, TEXTURES)
    textures = [texture] * len(places) if layout == "count" else [texture, "solid", "solid"][: len(places)]
    things = tuple(
        Thing(shape, colour, size, texture, (x, y), extent)
        for shape, colour, size, texture, (x, y, extent) in zip(shapes, colours, sizes, textures, places, strict=True)
    )
    word = rng.choice(WORDS) if layout == "text" else None
    if layout == "pair":
        relation = None
    return Scene(rng.choice(sides), style, background, kind, things, layout, relation, word, brush)


def _draw_from(rng, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _places(rng, layout: str, relation: str | None, count: int | None):
    """Centres and extents, and the named size of each (None where a size is not one of the named)."""
    if layout == "single" or count == 1:
        size = rng.choices((None, "small", "large"), (0.4, 0.3, 0.3))[0] if layout == "single" else None
        extent = rng.uniform(*SIZES[size]) if size else rng.uniform(0.44, 0.52)
        room = (0.93 - extent) / 2
        offset = min(room, 0.05)
        return [(0.5 + rng.uniform(-offset, offset), 0.5 + rng.uniform(-offset, offset), extent)], [size]
    if layout == "text":
        return [(0.5 + rng.uniform(-0.12, 0.12), 0.34 + rng.uniform(-0.02, 0.02), rng.uniform(0.42, 0.50))], [None]
    if count == 3 or layout == "three":
        corners = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
        chosen = rng.sample(corners, 3)
        places = [
            (x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.015, 0.015), rng.uniform(0.36, 0.41)) for x, y in chosen
        ]
        return places, [None] * 3
    if relation is None:
        relation = rng.choice(RELATIONS)
    first, second = (0.255, 0.745) if relation in ("left of", "above") else (0.745, 0.255)
    places = []
    for along in (first, second):
        across = 0.5 + rng.uniform(-0.08, 0.08)
        along += rng.uniform(-0.012, 0.012)
        x, y = (along, across) if relation in ("left of", "right of") else (across, along)
        places.append((x, y, rng.uniform(0.37, 0.42)))
    return places, [None] * 2


def at_side(scene: Scene, side_px: int) -> Scene:
    return replace(scene, side_px=side_px)
