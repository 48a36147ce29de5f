"""Precision and recall, density and coverage: how much of each set lies within the other's nearest-neighbour balls.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2, k = 3. Density and coverage: Naeem et al.
2020, arXiv 2002.09797, eq. 4 and 5, k = 5. Balls are closed; a point is no neighbour of itself. float64, in blocks.
"""

from __future__ import annotations

import numpy as np

from raphael.evaluate.metrics.kernels import BLOCK_ROWS, checked_pair, squared_distances

PRECISION_K, DENSITY_K = 3, 5


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = PRECISION_K) -> dict[str, float]:
    """{precision, recall} of generated features (n, D) against real ones (m, D).

    precision: share of generated ones in some real one's ball; recall: share of real ones in some generated one's.
    Raises ValueError unless both have more than k rows.
    """
    generated, real = _centred(features, reference, k)
    real_radii, generated_radii = squared_radii(real, k), squared_radii(generated, k)
    precise = np.zeros(len(generated), bool)
    recalled = np.zeros(len(real), bool)
    for start in range(0, len(generated), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        distances = squared_distances(generated[rows], real)
        precise[rows] = (distances <= real_radii).any(1)
        recalled |= (distances <= generated_radii[rows, None]).any(0)
    return {"precision": float(precise.mean()), "recall": float(recalled.mean())}


def density_coverage(features: np.ndarray, reference: np.ndarray, k: int = DENSITY_K) -> dict[str, float]:
    """{density, coverage} of generated features (n, D) against real ones (m, D).

    density: real balls that a generated one lies in, over k, on average (above 1 where these huddle); coverage:
    share of real balls with a generated one in them. Raises ValueError unless both have more than k rows.
    """
    generated, real = _centred(features, reference, k)
    radii = squared_radii(real, k)
    inside = 0
    covered = np.zeros(len(real), bool)
    for start in range(0, len(generated), BLOCK_ROWS):
        within = squared_distances(generated[start : start + BLOCK_ROWS], real) <= radii
        inside += int(within.sum())
        covered |= within.any(0)
    return {"density": inside / (k * len(generated)), "coverage": float(covered.mean())}


def squared_radii(rows: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each row (n, D) to its k-th nearest other row -> (n,)."""
    radii = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK_ROWS):
        distances = squared_distances(rows[start : start + BLOCK_ROWS], rows)
        here = np.arange(len(distances))
        distances[here, here + start] = np.inf  # itself
        radii[start : start + BLOCK_ROWS] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _centred(features: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    generated, real = checked_pair(features, reference)
    if k < 1 or min(len(generated), len(real)) <= k:
        raise ValueError(f"got k = {k} with sets of {len(generated)} and {len(real)}, expected 1 <= k < both")
    centre = real.mean(0)  # distances keep their digits when the common part is gone
    return generated - centre, real - centre
