"""Which of several sizes an image is brought to, and whether it would have to grow for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def nearest_sizes(heights: np.ndarray, widths: np.ndarray, sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 (n,): index of the size whose height/width is nearest on a logarithmic scale; of equals the first.

    |log a - log b| grows with max(a/b, b/a), the quotient of two whole numbers; of equal fractions it is the same
    float. heights, widths: (n,), whole px.
    """
    tall_wide = [(np.asarray(heights, np.float64) * width, np.asarray(widths, np.float64) * height)
                 for height, width in sizes]  # fmt: skip
    return np.argmin([np.maximum(tall, wide) / np.minimum(tall, wide) for tall, wide in tall_wide], axis=0)


def must_grow(heights: np.ndarray, widths: np.ndarray, sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """Bool (n,): whether the image, scaled to cover its nearest size, becomes larger than it is."""
    chosen = np.asarray(sizes, np.float64)[nearest_sizes(heights, widths, sizes)]
    return (np.asarray(heights) < chosen[:, 0]) | (np.asarray(widths) < chosen[:, 1])


def least_short_side(sizes: Sequence[Sequence[int]], max_aspect_ratio: float) -> int:
    """The least px to which short sides may be brought down so that no image of up to that ratio of its sides has to
    grow again for its nearest size (height, width).

    An image of width/height r that just covers (h, w) is max(h, w/r) high, and its short side min(1, r) of that. In
    between the shapes at which another size becomes the nearest one, r = 1 and r = w/h, it only rises or only falls.
    """
    shapes = sorted({width / height for height, width in sizes})
    turns = [math.sqrt(low * high) for low, high in zip(shapes, shapes[1:], strict=False)]
    ends = [1 / max_aspect_ratio, *turns, max_aspect_ratio]
    most = 0.0
    for height, width in sizes:
        place = shapes.index(width / height)
        low, high = ends[place], ends[place + 1]
        for ratio in (low, high, 1.0, width / height):
            if low <= ratio <= high:
                most = max(most, min(1.0, ratio) * max(height, width / ratio))
    return math.ceil(round(most, 6))
