"""Watermarks as stock agencies, photographers and sites put them on images, drawn over clean ones.

Five kinds: a line of text, text repeated over the whole image, a logo, a large translucent veil, a small stamp in a
corner. `draw` also says where it drew, so that a detector can be taught place by place. The fonts are those that come
with matplotlib: nothing is downloaded, and some are held back for the examination.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import random
import string
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

KINDS = ("text", "tiled", "logo", "veil", "stamp")
TAUGHT_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif.ttf",
)
UNSEEN_FONTS = ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "DejaVuSans-Oblique.ttf")
TAUGHT_WORDS = ("sample", "preview", "photo", "images", "copyright", "studio", "stock", "gallery", "proof", "by")
UNSEEN_WORDS = ("watermark", "draft", "agency", "licence", "press", "archive", "rights", "picture", "demo", "via")
# Share of the image's own colour that is covered: a veil is hardly seen, a stamp is opaque.
OPACITY = {"text": (0.4, 1.0), "tiled": (0.15, 0.6), "logo": (0.35, 1.0), "veil": (0.12, 0.4), "stamp": (0.55, 1.0)}


def draw(image: Image.Image, kind: str, rng: random.Random, unseen: bool = False) -> tuple[Image.Image, Image.Image]:
    """(the RGB image with a watermark of `kind` on it, where it is: mode L of the same size, 0 to 255).

    unseen: fonts and words of the examination instead of those that are taught. Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    mask = _MASKS[kind](image.size, rng, unseen)
    low, high = OPACITY[kind]
    opacity = rng.uniform(low, high)
    marked = image.convert("RGB")
    if kind != "veil" and rng.random() < 0.3:  # a shadow below, as most programs offer
        shift = max(1, round(min(image.size) / 200))
        shadow = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0, -shift, 0, 1, -shift))
        marked.paste((0, 0, 0), mask=shadow.point(lambda value: round(value * opacity * 0.7)))
    marked.paste(_ink(rng), mask=mask.point(lambda value: round(value * opacity)))
    return marked, mask


def _ink(rng: random.Random) -> tuple[int, int, int]:
    """White mostly, then black, then a colour."""
    lot = rng.random()
    if lot < 0.7:
        return (rng.randint(225, 255),) * 3
    if lot < 0.85:
        return (rng.randint(0, 30),) * 3
    return tuple(rng.choice((0, 60, 200, 255)) for _ in range(3))


def _phrase(rng: random.Random, unseen: bool, longest: int = 3) -> str:
    """Words, names, years, addresses: what watermarks say."""
    words = UNSEEN_WORDS if unseen else TAUGHT_WORDS
    name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))
    parts = [rng.choice((rng.choice(words), name, str(rng.randint(1990, 2025)), f"{name}.com"))]
    parts += [rng.choice((rng.choice(words), name)) for _ in range(rng.randint(0, longest - 1))]
    text = rng.choice(("", "", "\u00a9 ")) + " ".join(parts)
    return rng.choice((str, str.upper, str.title))(text)


def _text(phrase: str, width_px: float, rng: random.Random, unseen: bool) -> Image.Image:
    """The phrase in a random font, mode L, about `width_px` wide (at least 6 px high)."""
    name = rng.choice(UNSEEN_FONTS if unseen else TAUGHT_FONTS)
    probe = _font(name, 64)
    left, top, right, bottom = probe.getbbox(phrase)
    size = max(8, round(64 * width_px / max(right - left, 1)))
    font = _font(name, min(size, 400))
    left, top, right, bottom = font.getbbox(phrase)
    canvas = Image.new("L", (max(1, right - left + 2), max(1, bottom - top + 2)))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), phrase, 255, font)
    return canvas


def _line(size: tuple[int, int], rng: random.Random, unseen: bool) -> Image.Image:
    width, height = size
    text = _text(_phrase(rng, unseen), rng.uniform(0.35, 0.85) * width, rng, unseen)
    if rng.random() < 0.4:
        text = text.rotate(rng.uniform(-40, 40), Image.Resampling.BILINEAR, expand=True)
    return _placed(text, size, rng.uniform(0.25, 0.75) * width, rng.uniform(0.15, 0.9) * height)


def _tiled(size: tuple[int, int], rng: random.Random, unseen: bool) -> Image.Image:
    """Repeated along slanted lines, every second line shifted by half a step."""
    reach = math.ceil(math.hypot(*size))
    text = _text(_phrase(rng, unseen, 2), rng.uniform(0.12, 0.35) * size[0], rng, unseen)
    step, line = round(text.width * rng.uniform(1.2, 1.9)), round(max(text.height, 6) * rng.uniform(2.0, 5.0))
    canvas = Image.new("L", (reach, reach))
    for number, top in enumerate(range(0, reach, line)):
        for left in range(-(step // 2) * (number % 2), reach, step):
            canvas.paste(text, (left, top))
    canvas = canvas.rotate(rng.uniform(-45, 45), Image.Resampling.BILINEAR)
    left, top = (reach - size[0]) // 2, (reach - size[1]) // 2
    return canvas.crop((left, top, left + size[0], top + size[1]))


def _logo(size: tuple[int, int], rng: random.Random, unseen: bool) -> Image.Image:
    """A ring, a shield of straight lines or a disc with its letters cut out, at a random place."""
    side = max(14, round(rng.uniform(0.14, 0.4) * min(size)))
    canvas = Image.new("L", (side, side))
    pen, thick = ImageDraw.Draw(canvas), max(1, side // rng.randint(9, 20))
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
    form = rng.choice(("ring", "polygon", "disc"))
    box = (1, 1, side - 2, side - 2)
    if form == "ring":
        pen.ellipse(box, outline=255, width=thick)
    elif form == "polygon":
        pen.regular_polygon((side / 2, side / 2, side / 2 - 1), rng.randint(3, 6), rng.randint(0, 90), None, 255, thick)
    else:
        pen.ellipse(box, fill=255)
    text = _text(letters, side * 0.55, rng, unseen)
    text.thumbnail((round(side * 0.6), round(side * 0.5)))
    canvas.paste(0 if form == "disc" else 255, ((side - text.width) // 2, (side - text.height) // 2), text)
    return _placed(canvas, size, rng.uniform(0.1, 0.9) * size[0], rng.uniform(0.1, 0.9) * size[1])


def _veil(size: tuple[int, int], rng: random.Random, unseen: bool) -> Image.Image:
    """Large letters over the middle, some of them on a band from side to side."""
    width, height = size
    text = _text(_phrase(rng, unseen, 2), rng.uniform(0.7, 1.0) * width, rng, unseen)
    if rng.random() < 0.4:
        band = Image.new("L", size)
        top = round(rng.uniform(0.3, 0.7) * height - text.height)
        ImageDraw.Draw(band).rectangle((0, top, width, top + 2 * text.height), fill=150)
        band.paste(255, ((width - text.width) // 2, top + text.height // 2), text)
        return band
    text = text.rotate(rng.choice((0.0, rng.uniform(-45, 45))), Image.Resampling.BILINEAR, expand=True)
    return _placed(text, size, width / 2, height / 2)


def _stamp(size: tuple[int, int], rng: random.Random, unseen: bool) -> Image.Image:
    """A name in a corner; some in a box."""
    width, height = size
    text = _text(_phrase(rng, unseen, 2), rng.uniform(0.15, 0.38) * width, rng, unseen)
    if rng.random() < 0.25:
        framed = Image.new("L", (text.width + 6, text.height + 6), 255)
        framed.paste(0, (3, 3), text)
        text = framed
    gap = rng.uniform(0.01, 0.04) * min(size)
    x = rng.choice((gap + text.width / 2, width - gap - text.width / 2))
    return _placed(text, size, x, rng.choice((gap + text.height / 2, height - gap - text.height / 2)))


def _placed(mark: Image.Image, size: tuple[int, int], x: float, y: float) -> Image.Image:
    """The mark with its middle at (x, y), moved inwards where it would leave the image."""
    left = min(max(round(x - mark.width / 2), 0), max(size[0] - mark.width, 0))
    top = min(max(round(y - mark.height / 2), 0), max(size[1] - mark.height, 0))
    canvas = Image.new("L", size)
    canvas.paste(mark, (left, top))
    return canvas


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    package = importlib.util.find_spec("matplotlib")  # found, not imported: that takes a second
    folder = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / name), size)


_MASKS = {"text": _line, "tiled": _tiled, "logo": _logo, "veil": _veil, "stamp": _stamp}
