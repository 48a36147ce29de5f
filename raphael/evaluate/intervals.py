"""Counts with their uncertainty."""

from __future__ import annotations

import math
from typing import Any

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
