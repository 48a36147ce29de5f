"""Names of colours for the reader of drawn scenes: a pixel has the name of the colour whose shades it is nearest to."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

COLOURS = {  # a representative and how far its shades go towards black and towards white
    "red": (221, 28, 35), "orange": (255, 143, 10), "yellow": (254, 227, 28), "green": (36, 157, 66),
    "cyan": (65, 213, 230), "blue": (31, 78, 220), "purple": (127, 44, 166), "pink": (254, 135, 190),
    "white": (249, 249, 249), "black": (20, 20, 22),
}  # fmt: skip
NAMES = tuple(COLOURS)
DARKEST, LIGHTEST = 0.74, 0.24


def distance_to_segment(pixels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of pixels (..., 3) from the line between two colours (3,)."""
    along = b - a
    share = np.clip(((pixels - a) @ along) / max(float(along @ along), 1e-6), 0, 1)
    return np.linalg.norm(pixels - (a + share[..., None] * along), axis=-1)


@functools.cache
def _shades() -> np.ndarray:
    """(10, 24, 3): each colour's shades, on the lines between its own value, its darkest and its lightest shade."""
    base = np.array(list(COLOURS.values()), np.float32)
    darkest = np.where(np.array(NAMES)[:, None] == "black", 0.4, DARKEST).astype(np.float32)  # black has hardly any
    dark, light = base * darkest, base + LIGHTEST * (255 - base)
    share = np.linspace(0, 1, 8, dtype=np.float32)[:, None, None]
    lines = ((base, dark), (base, light), (dark, light))
    return np.concatenate([a + share * (b - a) for a, b in lines]).transpose(1, 0, 2)


def _squares(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(N, K) squared distances of pixels (N, 3) from colours (K, 3), without what all K have in common: |pixel|^2."""
    return pixels @ (-2 * colours.T) + (colours * colours).sum(1)


def _distances(pixels: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """(N,) distances from least squares of the above."""
    return np.sqrt(np.maximum(nearest + np.einsum("nc,nc->n", pixels, pixels), 0))


def _distance_to_shades(pixels: np.ndarray, name: str) -> np.ndarray:
    """Distance of pixels (..., 3) from the nearest of a colour's shades."""
    flat = pixels.reshape(-1, 3)
    return _distances(flat, _squares(flat, _shades()[NAMES.index(name)]).min(1)).reshape(pixels.shape[:-1])


def _name_pixels(pixels: np.ndarray) -> np.ndarray:
    """Index into NAMES of the nearest colour for pixels (N, 3): to its shades, but its own value counts too."""
    shades = _shades()
    squares = _squares(pixels, shades.reshape(-1, 3)).reshape(len(pixels), *shades.shape[:2])
    own = (pixels * pixels).sum(1)[:, None]
    to_shades, to_base = (np.sqrt(np.maximum(part + own, 0)) for part in (squares.min(2), squares[:, :, 0]))
    return (to_shades + 0.35 * to_base).argmin(1)


def common_name(pixels: np.ndarray) -> str:
    """The name that most of the pixels (N, 3) have."""
    pixels = pixels[:: max(1, len(pixels) // 300)]  # a vote of 300 is as good as one of 3,000
    return NAMES[np.bincount(_name_pixels(pixels), minlength=len(NAMES)).argmax()]


@dataclass(frozen=True)
class Background:
    """The colour of most of the frame. flat: its one value (3,) where it has hardly any shades, else None."""

    colour: str
    flat: np.ndarray | None

    def distance(self, pixels: np.ndarray) -> np.ndarray:
        if self.flat is None:
            return _distance_to_shades(pixels, self.colour)
        return np.linalg.norm(pixels - self.flat, axis=-1)


def read_background(small: np.ndarray) -> Background:
    """The background of a picture (H, W, 3) uint8, judged by its frame of 3 px."""
    sides = (small[:3], small[-3:], small[3:-3, :3], small[3:-3, -3:])
    frame = np.concatenate([side.reshape(-1, 3) for side in sides]).astype(np.float32)
    frame = frame[::2]
    names = _name_pixels(frame)
    index = int(np.bincount(names, minlength=len(NAMES)).argmax())
    own = frame[names == index]
    middle = np.median(own, axis=0)
    spread = np.quantile(np.linalg.norm(own - middle, axis=1), 0.9)
    return Background(NAMES[index], middle if spread < 9 else None)
