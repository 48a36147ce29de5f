"""Counts and means with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal


def wilson(hits: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927): both roots p of (hits/n - p)^2 = z^2 p (1 - p) / n.

    Lies in [0, 1] and is honest at 0 and n hits. n = 0 says nothing: (0, 1). Raises ValueError unless 0 <= hits <= n.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"got {hits} hits of {n}, expected 0 <= hits <= n")
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def share(name: str, outcomes: list[bool]) -> dict[str, Any]:
    """{name, name_n, name_low, name_high}: the share of True with its 95 % interval; null where there is no outcome."""
    hits, n = sum(outcomes), len(outcomes)
    low, high = wilson(hits, n)
    return {
        name: round(hits / n, 6) if n else None,
        f"{name}_n": n,
        f"{name}_low": round(low, 6) if n else None,
        f"{name}_high": round(high, 6) if n else None,
    }


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean: percentiles of the means of resamples, drawn with replacement.

    groups: one label per value; whole groups are drawn (images of one prompt are alike, so they count together).
    Deviations are widened by sqrt(g / (g - 1)), g groups, since a resample's variance is too small by that (Hesterberg
    2015, arXiv 1411.5279, section 3.2). Raises ValueError for fewer than two groups, NaN or infinity.
    """
    values = np.asarray(values, np.float64)
    labels = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if values.ndim != 1 or len(labels) != len(values) or not np.isfinite(values).all():
        raise ValueError(f"got {values.shape} values and {len(labels)} groups, expected as many, finite")
    sums, counts = np.bincount(labels, values), np.bincount(labels)
    number = len(sums)
    if number < 2:
        raise ValueError(f"got {number} groups of values, expected at least 2 for an interval")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for turn in range(resamples):
        drawn = rng.integers(0, number, number)
        means[turn] = sums[drawn].sum() / counts[drawn].sum()
    centre = float(values.mean())
    low, high = centre + (np.percentile(means, (2.5, 97.5)) - centre) * math.sqrt(number / (number - 1))
    return float(low), float(high)
