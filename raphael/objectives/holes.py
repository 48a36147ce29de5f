"""Random holes in images, for a network that learns to inpaint.

As GLIDE (arXiv 2112.10741, section 2.4): random regions are erased, and the network is told what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raphael.base.randomness import SampleRng

NOTHING_KNOWN, INSIDE_KNOWN = 0.2, 0.15  # shares: text to image goes on being learned; outpainting
SMALLEST, LARGEST = 0.25, 0.75  # side of a rectangle / of the image


def known_masks(rng: SampleRng, height: int, width: int) -> Tensor:
    """(B, 1, h, w) float32 on the CPU, 1 where an image is known: nothing, one rectangle, or all but two of them."""
    one, two = (_rectangles(rng.uniform(f"hole {number}", (4,)), height, width) for number in (1, 2))
    kind = rng.uniform("hole")[:, None, None, None]
    known = torch.where(kind < NOTHING_KNOWN + INSIDE_KNOWN, one, ~(one | two))
    return (known & (kind >= NOTHING_KNOWN)).float()


def _rectangles(u: Tensor, height: int, width: int) -> Tensor:
    """u (B, 4) uniform: two sides, two places -> (B, 1, h, w) bool."""
    sides = SMALLEST + (LARGEST - SMALLEST) * u[:, :2]
    first = (1 - sides) * u[:, 2:]
    inside = []
    for axis, length in enumerate((height, width)):
        middle = (torch.arange(length) + 0.5) / length
        low, high = first[:, axis, None], (first + sides)[:, axis, None]
        inside.append((low <= middle) & (middle < high))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
