"""Where an image's edges are: the targets of edge-supervised learning.

The published model takes its targets from a learned detector, HED (raphael/encoders/edges/hed.py). The classical ones
here, sobel and canny, need no weights and are exact on drawn scenes; pidinet (raphael/encoders/edges/pidinet.py) is
learned, too, and a twentieth of HED's size. The records name the detector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# 4 grey levels across one pixel, times Sobel's weight of 4: below it a strongest response is noise, not an edge
WEAKEST_RESPONSE = 16.0
CANNY_LOW = 0.4  # lower / upper threshold of the hysteresis
LEARNED = ("pidinet", "hed")  # detectors that come with weights


def edge_map(
    images: np.ndarray,
    side: int | tuple[int, int],
    detector: str = "sobel",
    threshold: float = 0.3,
    weights: str | Path = "",
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """uint8 (B,H,W,3) -> uint8 (B,h,w), 255 on an edge and 0 elsewhere.

    side: h = w, or (h, w): each cell is the maximum over its pixels, so that thin edges survive. threshold: share of
    the image's strongest response; learned, the probability itself, and at 0 its probabilities times 255 are the
    map. weights, device: the file of a learned detector, and where it computes. Raises ValueError.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: got {images.dtype} {images.shape}, expected uint8 (B, H, W, 3)")
    if detector not in (*DETECTORS, *LEARNED):
        raise ValueError(f"edge detector: got {detector!r}, expected one of {', '.join((*DETECTORS, *LEARNED))}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"edge threshold: got {threshold}, expected a share from 0 to 1")
    height, width = (side, side) if isinstance(side, int) else side
    if detector in LEARNED:
        detected = learned(images, detector, threshold, weights, device) if len(images) else []
    else:
        detected = (DETECTORS[detector](image, threshold) for image in images)
    maps = [max_pool(edges, height, width) for edges in detected]
    return np.stack(maps) if maps else np.zeros((0, height, width), np.uint8)


def sobel(image: np.ndarray, threshold: float) -> np.ndarray:
    """Gradient magnitude, in each pixel the largest of the three colours': red beside green is an edge, grey or not."""
    dx, dy = _gradients(image)
    strength = np.hypot(dx.astype(np.float32), dy.astype(np.float32)).max(axis=-1)  # (H,W)
    strongest = float(strength.max())
    if strongest < WEAKEST_RESPONSE:
        return np.zeros(strength.shape, np.uint8)
    return np.where(strength >= max(threshold * strongest, WEAKEST_RESPONSE), 255, 0).astype(np.uint8)


def canny(image: np.ndarray, threshold: float) -> np.ndarray:
    """Canny (1986) over the same gradients: thin lines, weak ones kept where they continue strong ones."""
    import cv2

    dx, dy = _gradients(image)
    strongest = float(np.hypot(dx.astype(np.float32), dy.astype(np.float32)).max())
    if strongest < WEAKEST_RESPONSE:
        return np.zeros(image.shape[:2], np.uint8)
    high = max(threshold * strongest, WEAKEST_RESPONSE)
    return cv2.Canny(dx, dy, CANNY_LOW * high, high, L2gradient=True)  # takes each pixel's strongest colour


def learned(
    images: np.ndarray, detector: str, threshold: float, weights: str | Path, device: torch.device | str = "cpu"
) -> np.ndarray:
    """A learned detector's probability, cut at the threshold or, at 0, as it is: (B,H,W,3) -> uint8 (B,H,W)."""
    # one image at a time: what an image gives does not depend on the others, and memory stays small
    probability = _loaded(detector, str(weights), str(device))
    maps = np.concatenate([probability(image[None]) for image in images])
    return np.where(maps >= threshold, 255, 0).astype(np.uint8) if threshold else np.uint8((maps * 255).round())


@functools.lru_cache(maxsize=1)
def _loaded(detector: str, weights: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    if detector == "hed":
        from raphael.encoders.edges import hed

        return functools.partial(hed.edge_probability, hed.load_hed(weights).to(device))
    from raphael.encoders.edges import pidinet

    return functools.partial(pidinet.edge_probability, pidinet.load_pidinet(weights).to(device))


def max_pool(edges: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H,W) -> (height,width), each cell the maximum over the pixels it touches; repeats pixels to enlarge."""
    starts_y, ends_y = _cells(edges.shape[0], height)
    starts_x, ends_x = _cells(edges.shape[1], width)
    rows = np.stack([edges[a:b].max(axis=0) for a, b in zip(starts_y, ends_y, strict=True)])
    return np.stack([rows[:, a:b].max(axis=1) for a, b in zip(starts_x, ends_x, strict=True)], axis=1)


def _cells(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(cells)
    return index * pixels // cells, -(-(index + 1) * pixels // cells)


def _gradients(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's 3 x 3 derivatives of each colour, int16 (H,W,3) each; the border is repeated, so it makes no edge."""
    import cv2

    return tuple(
        cv2.Sobel(image, cv2.CV_16S, x, y, ksize=3, borderType=cv2.BORDER_REPLICATE) for x, y in ((1, 0), (0, 1))
    )


DETECTORS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"sobel": sobel, "canny": canny}
