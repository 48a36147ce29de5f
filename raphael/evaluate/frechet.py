"""The Frechet distance between Gaussians fitted to two sets of features, in float64, without a matrix square root.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        (Heusel et al. 2017, arXiv 1706.08500, eq. 6)

The trace term is the nuclear norm of A1 A2^T for any A with S = A^T A: the singular values of A1 A2^T are the square
roots of the eigenvalues of S1 S2. With at least as many samples as dimensions the eigenvalues of the symmetric F S2 F,
F = S1^(1/2), give it; with fewer, the singular values of the small matrix Y X^T of centred features do, without forming
a covariance whose zero eigenvalues would come out as +-1e-13 and their roots as 3e-7 each.
"""

from __future__ import annotations

import numpy as np


class Features:
    """Streaming float64 mean and covariance of features; `update` takes (n, D) arrays in any number of calls.

    Batches merge by Chan's update, so that a large mean does not cancel the digits of the covariance. Up to
    `keep_rows` rows are kept beside it: fewer samples than dimensions are compared by their singular values.
    """

    def __init__(self, dim: int, keep_rows: int | None = None):
        self.dim = dim
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # sum over rows of (x - mean)(x - mean)^T
        self.keep_rows = dim if keep_rows is None else keep_rows
        self.rows: list[np.ndarray] | None = []

    def update(self, features: np.ndarray) -> Features:
        """Add (n, dim) features. Raises ValueError for another shape, NaN or infinity."""
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features: got shape {batch.shape}, expected (n, {self.dim})")
        if not np.isfinite(batch).all():
            bad = int((~np.isfinite(batch).all(axis=1)).sum())
            raise ValueError(f"features: got NaN or infinity in {bad} of {len(batch)} rows, expected finite numbers")
        if not len(batch):
            return self
        batch_mean = batch.mean(axis=0)
        centred = batch - batch_mean
        total = self.count + len(batch)
        step = batch_mean - self.mean
        self.scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(batch) / total)
        self.mean = self.mean + step * (len(batch) / total)
        self.count = total
        if self.rows is not None:
            self.rows = self.rows + [batch] if total <= self.keep_rows else None
        return self

    @property
    def covariance(self) -> np.ndarray:
        """(dim, dim), divisor n - 1 as in every public implementation. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"got {self.count} samples, expected at least 2 for a covariance")
        return self.scatter / (self.count - 1)

    def centred_factor(self) -> np.ndarray | None:
        """A (n, dim) with covariance = A^T A, where the rows were kept; None otherwise."""
        if self.rows is None:
            return None
        return (np.concatenate(self.rows) - self.mean) / np.sqrt(self.count - 1)

    def distance(self, other: Features) -> float:
        """The squared Frechet distance (what FID reports). Raises ValueError for other dims or too few samples."""
        if self.dim != other.dim:
            raise ValueError(
                f"got features of {self.dim} and {other.dim} dimensions, expected the same feature network"
            )
        cov1, cov2 = self.covariance, other.covariance
        ours, theirs = self.centred_factor(), other.centred_factor()
        if ours is not None and theirs is not None:
            trace = float(np.linalg.svd(ours @ theirs.T, compute_uv=False).sum())
        elif ours is not None or theirs is not None:
            few, covariance = (ours, cov2) if ours is not None else (theirs, cov1)
            trace = float(np.linalg.svd(few @ covariance_root(covariance), compute_uv=False).sum())
        else:
            trace = _trace_of_root(covariance_root(cov1), cov2)
        return _assemble(self.mean, other.mean, float(np.trace(cov1) + np.trace(cov2)), trace)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The squared Frechet distance between N(mu1, sigma1) and N(mu2, sigma2): (D,), (D, D), (D,), (D, D) -> float.

    Raises ValueError for shapes that do not fit, NaN, infinity, or a covariance that is not symmetric.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(item, dtype=np.float64) for item in (mu1, sigma1, mu2, sigma2))
    dim = mu1.shape[0] if mu1.ndim == 1 else -1
    for name, item, shape in (
        ("mu1", mu1, (dim,)),
        ("mu2", mu2, (dim,)),
        ("sigma1", sigma1, (dim, dim)),
        ("sigma2", sigma2, (dim, dim)),
    ):
        if item.shape != shape:
            raise ValueError(f"{name}: got shape {item.shape}, expected {shape if dim >= 0 else 'a vector (D,)'}")
        if not np.isfinite(item).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
        if item.ndim == 2 and not np.allclose(
            item, item.T, rtol=1e-8, atol=1e-10 * max(1.0, float(np.abs(item).max()))
        ):
            raise ValueError(f"{name}: got a matrix that is not symmetric, expected a covariance")
    trace = _trace_of_root(covariance_root(sigma1), sigma2)
    return _assemble(mu1, mu2, float(np.trace(sigma1) + np.trace(sigma2)), trace)


def covariance_root(sigma: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance (D, D); computed once per reference, it is most of the cost."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _trace_of_root(root1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) from F = S1^(1/2): the roots of the eigenvalues of the symmetric F S2 F."""
    product = root1 @ sigma2 @ root1
    return float(np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum())


def _assemble(mu1: np.ndarray, mu2: np.ndarray, traces: float, trace_of_root: float) -> float:
    step = mu1 - mu2
    return max(0.0, float(step @ step) + traces - 2.0 * trace_of_root)
