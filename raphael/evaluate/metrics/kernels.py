"""Maximum mean discrepancy between two sets of features, in float64: KID (polynomial kernel), CMMD (Gaussian kernel).

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                                  (Gretton et al. 2012, JMLR 13, eq. 2)

Kernel matrices are summed in blocks of rows: memory grows with n, not n^2.
"""

from __future__ import annotations

import numpy as np

BLOCK_ROWS = 1000
KID_DEGREE, KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 3, 100, 1000, 2020  # torch-fidelity's, after the authors' code
CMMD_SIGMA, CMMD_FACTOR = 10.0, 1000.0  # arXiv 2401.09603, section 4


def kid(
    features: np.ndarray,
    reference: np.ndarray,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = KID_SEED,
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al., arXiv 1801.01401): mean and standard deviation over random subsets.

    features (n, D), reference (m, D). The unbiased estimate with k(x, y) = (x.y / D + 1)^3: it may be negative.
    The subsets are those that torch-fidelity draws for the same seed. Raises ValueError where a set is smaller than a
    subset, for other shapes and for NaN.
    """
    features, reference = checked_pair(features, reference)
    smaller = min(len(features), len(reference))
    if not 2 <= subset_size <= smaller or subsets < 1:
        raise ValueError(
            f"KID: got {subsets} subsets of {subset_size} from sets of {len(features)} and {len(reference)}, "
            f"expected at least 1 of 2 to {smaller}"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        ours = features[rng.choice(len(features), subset_size, replace=False)]
        theirs = reference[rng.choice(len(reference), subset_size, replace=False)]
        values.append(polynomial_mmd(ours, theirs))
    return float(np.mean(values)), float(np.std(values))


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of (n, D) and (m, D), n, m >= 2, with k(x, y) = (x.y / D + 1)^3."""

    def kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
        return sum(
            float(((a[start : start + BLOCK_ROWS] @ b.T / a.shape[1] + 1.0) ** KID_DEGREE).sum())
            for start in range(0, len(a), BLOCK_ROWS)
        )

    def own_sum(a: np.ndarray) -> float:
        return kernel_sum(a, a) - float((((a * a).sum(1) / a.shape[1] + 1.0) ** KID_DEGREE).sum())

    n, m = len(x), len(y)
    return own_sum(x) / (n * (n - 1)) + own_sum(y) / (m * (m - 1)) - 2.0 * kernel_sum(x, y) / (n * m)


def cmmd(features: np.ndarray, reference: np.ndarray, sigma: float = CMMD_SIGMA, factor: float = CMMD_FACTOR) -> float:
    """CMMD (Jayasumana et al., arXiv 2401.09603): 1000 MMD^2 with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    (n, D) and (m, D), of unit norm where they are CLIP's. The minimum-variance estimate, diagonals included, as in the
    authors' code: never negative, above the unbiased one by at most factor (1 - min k) (1/n + 1/m).
    """
    x, y = checked_pair(features, reference)
    centre = y.mean(0)  # distances keep their digits when the common part is gone
    x, y = x - centre, y - centre
    mmd = _gauss_mean(x, x, sigma) + _gauss_mean(y, y, sigma) - 2.0 * _gauss_mean(x, y, sigma)
    return factor * max(0.0, mmd)


def _gauss_mean(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    """The mean of expm1(-|a_i - b_j|^2 / 2 sigma^2): the ones cancel in MMD^2, and with them eight digits."""
    total = 0.0
    for start in range(0, len(a), BLOCK_ROWS):
        total += float(np.expm1(squared_distances(a[start : start + BLOCK_ROWS], b) / (-2.0 * sigma * sigma)).sum())
    return total / (len(a) * len(b))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 of (n, D) and (m, D) -> (n, m), by one product; rounding below zero is cut."""
    distances = a @ b.T
    distances *= -2.0
    distances += (a * a).sum(1)[:, None]
    distances += (b * b).sum(1)[None, :]
    return np.maximum(distances, 0.0, out=distances)


def checked_pair(features: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64. Raises ValueError for other shapes, fewer than two rows, NaN or infinity."""
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"got features {x.shape} and {y.shape}, expected (n, D) and (m, D) with n, m at least 2")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("got NaN or infinity among the features, expected finite numbers")
    return x, y
