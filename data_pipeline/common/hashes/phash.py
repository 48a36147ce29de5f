"""Perceptual hashes: imagehash's `phash` (32 x 32 greys, the 8 x 8 lowest frequencies of their cosine transform, each
above the median or not), many images at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE, KEPT = 32, 8
BITS = 64
BLOCK = 2048  # rows compared with as many others at a time: 32 MB


def phashes(images: Sequence[Image.Image]) -> np.ndarray:
    """uint64 (n,): imagehash.phash of each image, its first bit the highest."""
    from PIL import Image

    if not images:
        return np.empty(0, np.uint64)
    greys = [np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for image in images]
    k, x = np.arange(KEPT)[:, None], np.arange(SIDE)[None]
    cosines = 2 * np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE))  # DCT-II, its first rows; scale does not matter
    low = cosines @ np.stack(greys).astype(np.float64) @ cosines.T  # (n, 8, 8)
    low = low.reshape(len(low), -1)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def near_any(hashes: np.ndarray, others: np.ndarray, radius: int) -> np.ndarray:
    """Bool (n,): at most `radius` bits from one of `others` (m,). Compares all with all: m is an evaluation set."""
    near = np.zeros(len(hashes), bool)
    for start in range(0, len(hashes), BLOCK):
        mine = hashes[start : start + BLOCK, None]
        for other in range(0, len(others), BLOCK):
            differing = np.bitwise_count(mine ^ others[None, other : other + BLOCK])
            near[start : start + BLOCK] |= (differing <= radius).any(1)
    return near
