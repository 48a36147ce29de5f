"""How a scene is painted: geometry, styles, textures, backgrounds, words. Pillow on a supersampled canvas.

Four styles. flat: filled shapes. outline: strokes in the object's colour. ink: filled, with a wobbly contour in ink
(black, or the first of white and grey that differs from the object and the background). pixel: a mosaic of 16 x 16
cells whose brightness jitters a little, like hand-set tiles.
"""

from __future__ import annotations

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.source.scenes import CELLS, COLOURS, SUPERSAMPLING, Scene, Thing

STROKE = 0.12  # width of an outline / extent of the object
RING_HOLE = 0.42  # inner / outer radius
INK_WIDTH = 0.036  # of the side
WORD_HEIGHT, WORD_CENTRE = 0.25, 0.80  # shares of the side
TILE_JITTER = 9.0  # standard brightness step of the pixel style's tiles, 0..255
CELL_SAMPLES = 8

XY = tuple[float, float]
Colour = tuple[int, int, int]


def draw(scene: Scene) -> Image.Image:
    rng = random.Random(scene.brush)
    if scene.style == "pixel":
        return _draw_tiles(scene, rng)
    side = scene.side_px * SUPERSAMPLING
    canvas = _background(scene, side, rng)
    for thing in scene.things:
        if scene.style == "ink":
            _ink(canvas, scene, thing, rng)
        elif scene.style == "outline":
            _outline(canvas, thing)
        else:
            _fill(canvas, thing, [_placed(loop, thing, side) for loop in _loops(thing.shape)])
    if scene.word:
        canvas.paste(_word_colour(scene.background), mask=_word_mask(scene.word, side))
    return canvas.reduce(SUPERSAMPLING)


def _draw_tiles(scene: Scene, rng: random.Random) -> Image.Image:
    """Objects are sprites on the grid of cells; words get cells of half the size to stay legible."""
    cells = np.asarray(_background(scene, CELLS, rng)).astype(np.float32)
    for thing in scene.things:
        covered = _sprite(thing.shape, _sprite_cells(scene, thing))
        n = len(covered)
        left, top = (min(max(round(centre * CELLS - n / 2), 1), CELLS - 1 - n) for centre in thing.centre)
        light, shade = _shades(thing.colour)
        pattern = _pattern(thing.texture, n, period=4)[:, :, None]
        window = cells[top : top + n, left : left + n]
        window[covered] = np.where(pattern, np.float32(shade), np.float32(light))[covered]
    jitter = np.array([rng.gauss(0, TILE_JITTER) for _ in range(CELLS * CELLS)], np.float32)
    cells = np.clip(cells + jitter.clip(-2 * TILE_JITTER, 2 * TILE_JITTER).reshape(CELLS, CELLS, 1), 0, 255)
    tiles = cells.round().astype(np.uint8).repeat(2, 0).repeat(2, 1)
    if scene.word:
        word = np.asarray(_word_mask(scene.word, 2 * CELLS * CELL_SAMPLES).reduce(CELL_SAMPLES)) >= 112
        tiles[word] = _word_colour(scene.background)
    return Image.fromarray(tiles).resize((scene.side_px, scene.side_px), Image.Resampling.NEAREST)


def _sprite_cells(scene: Scene, thing: Thing) -> int:
    """Two sprites in a row need a gap: six cells each. Alone, an odd number gives tips of one cell."""
    if len(scene.things) > 1:
        return 6
    return max(7, 2 * round((thing.extent * CELLS - 1) / 2) + 1)


STARS = {
    6: ("..##..", "..##..", "######", ".####.", ".####.", "##..##"),
    7: ("...#...", "...#...", "#######", ".#####.", "..###..", ".##.##.", ".#...#."),
    9: (
        "....#....",
        "....#....",
        "...###...",
        "#########",
        ".#######.",
        "..#####..",
        "..#####..",
        ".###.###.",
        ".#.....#.",
    ),
}


@functools.cache
def _sprite(shape: str, n: int) -> np.ndarray:
    """(n, n) bool: the cells that the shape covers by half; stars, which that would ruin, are set by hand."""
    if shape == "star" and n in STARS:
        return np.array([[cell == "#" for cell in row] for row in STARS[n]])
    samples = 4 * CELL_SAMPLES
    layer = Image.new("L", (n * samples,) * 2)
    half = n * samples / 2
    across, down = {"square": (1.1, 1.1), "triangle": (1.0, 1.1), "diamond": (1.3, 1.08)}.get(shape, (1.0, 1.0))
    loops = [[((1 + x * across) * half - 0.5, (1 + y * down) * half - 0.5) for x, y in loop] for loop in _loops(shape)]
    _paint_loops(layer, loops, 255, 0)
    covered = np.asarray(layer.reduce(samples)).astype(np.float32)
    return (covered + covered[:, ::-1]) / 2 >= 124


def _background(scene: Scene, side: int, rng: random.Random) -> Image.Image:
    """RGB: one colour, or shades of it along a direction or from the middle."""
    colour = COLOURS[scene.background]
    direction = rng.choice(("down", "up", "right", "left", "diagonal", "middle"))
    if scene.background_kind == "plain":
        return Image.new("RGB", (side, side), colour)
    base = np.float32(colour)
    light, dark = base + 0.22 * (255 - base), base * (0.74 if sum(colour) > 60 else 1.0)
    fine = scene.side_px if side > scene.side_px else side
    shades = light + (dark - light) * _share(direction, fine)[:, :, None]
    return Image.fromarray(shades.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


@functools.lru_cache(maxsize=64)
def _share(direction: str, side: int) -> np.ndarray:
    """(side, side) in 0..1: how far along the gradient a pixel lies."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / max(side - 1, 1)
    middle = np.minimum(np.hypot(x - 0.5, y - 0.5) * 1.4, 1)
    return {"down": y, "up": 1 - y, "right": x, "left": 1 - x, "diagonal": (x + y) / 2, "middle": middle}[direction]


@functools.cache
def _loops(shape: str) -> tuple[tuple[XY, ...], ...]:
    """Closed lines in the square from -1 to 1, y down, the outer one first; a second one is a hole."""
    turn = 2 * math.pi
    circle = tuple((math.cos(turn * i / 48), math.sin(turn * i / 48)) for i in range(48))
    if shape == "circle":
        return (circle,)
    if shape == "ring":
        return circle, tuple((x * RING_HOLE, y * RING_HOLE) for x, y in circle)
    if shape == "square":
        return (((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),)
    if shape == "diamond":
        return (((0, -1), (0.82, 0), (0, 1), (-0.82, 0)),)
    if shape == "triangle":
        return (((0, -0.92), (1, 0.82), (-1, 0.82)),)
    if shape == "cross":
        a, b = 1.0, 0.34
        corners = (
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        )
        return (corners,)
    if shape == "star":
        radii = (1.05, 0.44)
        return (
            tuple(
                (radii[i % 2] * math.sin(turn * i / 10), 0.06 - radii[i % 2] * math.cos(turn * i / 10))
                for i in range(10)
            ),
        )
    if shape == "heart":
        points = []
        for i in range(48):
            a = turn * i / 48
            x = 16 * math.sin(a) ** 3
            y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
            points.append((x / 16, -(y + 2.5) / 15.2))
        return (tuple(points),)
    raise ValueError(f"shape: got {shape}, expected one of the names in data_pipeline/source/scenes.py")


def _placed(loop, thing: Thing, side: int, shrink: float = 0.0) -> list[XY]:
    half = (thing.extent / 2 - shrink) * side
    return [(thing.centre[0] * side + x * half, thing.centre[1] * side + y * half) for x, y in loop]


def _paint_loops(image: Image.Image, loops: list[list[XY]], ink, hole_ink) -> None:
    pen = ImageDraw.Draw(image)
    for number, loop in enumerate(loops):
        pen.polygon(loop, fill=hole_ink if number else ink)


def _fill(canvas: Image.Image, thing: Thing, loops: list[list[XY]]) -> None:
    side = canvas.size[0]
    mask = Image.new("1", canvas.size)
    _paint_loops(mask, loops, 1, 0)
    light, shade = _shades(thing.colour)
    canvas.paste(light, mask=mask)
    if thing.texture != "solid":
        pattern = Image.fromarray(np.asarray(mask) & _pattern(thing.texture, side, round(side * 0.135)))
        canvas.paste(shade, mask=pattern)


def _outline(canvas: Image.Image, thing: Thing) -> None:
    side = canvas.size[0]
    share = STROKE * (0.72 if thing.shape == "ring" else 1.0)  # two strokes must fit where others have one
    for loop in _loops(thing.shape):
        _stroke(
            canvas, _placed(loop, thing, side, share * thing.extent / 2), COLOURS[thing.colour], share * thing.extent
        )


def _ink(canvas: Image.Image, scene: Scene, thing: Thing, rng: random.Random) -> None:
    side = canvas.size[0]
    taken = (thing.colour, scene.background)
    line = next(
        ink
        for name, ink in (("black", (16, 14, 18)), ("white", (248, 248, 250)), ("grey", (128, 128, 128)))
        if name not in taken
    )
    loops = [_wobbly(_placed(loop, thing, side, INK_WIDTH / 2), 0.004 * side, rng) for loop in _loops(thing.shape)]
    _fill(canvas, thing, loops)
    for loop in loops:
        _stroke(canvas, loop, line, INK_WIDTH)


def _stroke(canvas: Image.Image, loop: list[XY], ink: Colour, width: float) -> None:
    """A closed line with round corners; width is a share of the side."""
    pen, width_px = ImageDraw.Draw(canvas), max(1, round(width * canvas.size[0]))
    pen.line([*loop, loop[0]], fill=ink, width=width_px)
    r = width_px / 2
    for (x0, y0), (x, y), (x1, y1) in zip([loop[-1], *loop[:-1]], loop, [*loop[1:], loop[0]], strict=True):
        turn = math.atan2(y - y0, x - x0) - math.atan2(y1 - y, x1 - x)
        if abs((turn + math.pi) % (2 * math.pi) - math.pi) > 0.12:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)


def _wobbly(loop: list[XY], amplitude_px: float, rng: random.Random) -> list[XY]:
    """The line as a hand draws it: three slow waves along its length."""
    waves = [(rng.uniform(0.5, 1.0), k, rng.uniform(0, 6.28), rng.uniform(0, 6.28)) for k in (2, 3, 5)]
    dense: list[XY] = []
    for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        dense += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps)]
    out = []
    for i, (x, y) in enumerate(dense):
        a = 2 * math.pi * i / len(dense)
        dx = sum(s * math.sin(k * a + p) for s, k, p, _ in waves)
        dy = sum(s * math.sin(k * a + q) for s, k, _, q in waves)
        out.append((x + amplitude_px * dx, y + amplitude_px * dy))
    return out


def _shades(colour: str) -> tuple[Colour, Colour]:
    """The colour itself and the shade that its stripes and dots have."""
    base = COLOURS[colour]
    if colour in ("black", "blue", "purple"):
        return base, tuple(round(c + 0.30 * (255 - c)) for c in base)
    return base, tuple(round(c * (0.80 if colour == "white" else 0.68)) for c in base)


@functools.lru_cache(maxsize=32)
def _pattern(texture: str, side: int, period: int) -> np.ndarray:
    """(side, side) bool: where the shade goes."""
    y, x = np.mgrid[0:side, 0:side]
    if texture == "striped":
        return (x + y) % period < period * 0.45
    if texture == "dotted":
        if period <= 4:
            return (x % 2 == 0) & (y % 2 == 0)
        row = y // period
        return np.hypot((x + (row % 2) * period // 2) % period - period / 2, y % period - period / 2) < period * 0.30
    return np.zeros((side, side), bool)


def _word_colour(background: str) -> Colour:
    return (20, 20, 22) if background in ("white", "yellow", "cyan", "orange", "pink") else (250, 250, 250)


@functools.lru_cache(maxsize=256)
def _word_mask(word: str, side: int) -> Image.Image:
    """(side, side) L: letters of one height, spaced apart, centred in the lower part."""
    glyphs = [_glyph(letter, round(WORD_HEIGHT * side)) for letter in word]
    gap = round(0.05 * side)
    width = sum(glyph.size[0] for glyph in glyphs) + gap * (len(glyphs) - 1)
    mask = Image.new("L", (side, side))
    x, y = (side - width) // 2, round((WORD_CENTRE - WORD_HEIGHT / 2) * side)
    for glyph in glyphs:
        mask.paste(glyph, (x, y))
        x += glyph.size[0] + gap
    return mask


@functools.lru_cache(maxsize=256)
def _glyph(letter: str, height_px: int) -> Image.Image:
    """A capital of Pillow's own font, emboldened, cut to its ink and brought to the height asked for."""
    size = 160
    image = Image.new("L", (2 * size, 2 * size))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text((size // 2, size // 4), letter, fill=255, font=font, stroke_width=6)
    ink = image.crop(image.getbbox())
    width = max(round(ink.size[0] * height_px / ink.size[1]), round(0.25 * height_px))
    width = min(width, round(0.95 * height_px))
    return ink.resize((width, height_px), Image.Resampling.LANCZOS)
