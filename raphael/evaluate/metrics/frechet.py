"""The Frechet distance between Gaussians fitted to two sets of features, in float64, without a matrix square root.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        (Heusel et al. 2017, arXiv 1706.08500, eq. 6)

The trace term is the nuclear norm of A1 A2^T for any A with S = A^T A: the singular values of A1 A2^T are the square
roots of the eigenvalues of S1 S2. With more samples than dimensions the eigenvalues of the symmetric F^T S2 F,
S1 = F F^T, give it; with fewer, the singular values of the small matrix Y X^T of centred features do, without forming
a covariance whose zero eigenvalues would come out as +-1e-13 and their roots as 3e-7 each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BLOCK_ROWS = 1000  # rows that are summed in one product; blocks merge in their order, whoever computed them


@dataclass(frozen=True)
class Block:
    """Sums over rows index * BLOCK_ROWS ... of a set: count, mean (D,), scatter (D, D) = sum (x - mean)(x - mean)^T."""

    index: int
    count: int
    mean: np.ndarray
    scatter: np.ndarray


class Features:
    """Streaming float64 mean and covariance of features; `update` takes (n, D) arrays in any number of calls.

    Rows are summed in blocks of BLOCK_ROWS that merge in their order (Chan et al. 1979, so that a large mean does not
    cancel the digits). The blocks depend on a row's place alone: the number is the same to the last bit whatever the
    sizes of the pieces, and however many workers computed blocks (`block_of`, `from_blocks`).
    Up to `keep_rows` rows are kept beside it: fewer samples than dimensions are compared by their singular values.
    """

    def __init__(self, dim: int, keep_rows: int | None = None):
        self.dim = dim
        self.count = 0  # rows taken, those that wait for their block to fill included
        self.keep_rows = dim if keep_rows is None else keep_rows
        self.rows: list[np.ndarray] | None = []
        self._merged = Block(-1, 0, np.zeros(dim), np.zeros((dim, dim)))
        self._waiting: list[np.ndarray] = []
        self._total: Block | None = None

    @classmethod
    def from_blocks(cls, dim: int, blocks: Iterable[Block]) -> Features:
        """From blocks in order of index, e.g. of several workers. Raises ValueError for one out of order or missing."""
        features = cls(dim, keep_rows=0)
        features.rows = None
        for block in blocks:
            if block.index != features._merged.index + 1 or features._merged.count % BLOCK_ROWS:
                raise ValueError(
                    f"got block {block.index} after {features._merged.index}, expected every block in order"
                )
            features._merge(block)
        features.count = features._merged.count
        return features

    def update(self, features: np.ndarray) -> Features:
        """Add (n, dim) features. Raises ValueError for another shape, NaN or infinity."""
        batch = checked_rows(features, self.dim)
        self.count += len(batch)
        self._total = None
        if self.rows is not None:
            self.rows = self.rows + [batch.copy()] if self.count <= self.keep_rows else None
        while len(batch):
            room = BLOCK_ROWS - sum(map(len, self._waiting))
            self._waiting.append(batch[:room].copy())
            batch = batch[room:]
            if sum(map(len, self._waiting)) == BLOCK_ROWS:
                self._merge(block_of(np.concatenate(self._waiting), self._merged.index + 1))
                self._waiting = []
        return self

    def _merge(self, block: Block) -> None:
        self._merged = merge(self._merged, block)

    @property
    def total(self) -> Block:
        """Everything taken so far, the block that is not full included."""
        if self._total is None:
            self._total = self._merged
            if self._waiting:
                last = block_of(np.concatenate(self._waiting), self._merged.index + 1)
                self._total = merge(self._merged, last)
        return self._total

    @property
    def mean(self) -> np.ndarray:
        return self.total.mean

    @property
    def covariance(self) -> np.ndarray:
        """(dim, dim), divisor n - 1 as in every public implementation. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"got {self.count} samples, expected at least 2 for a covariance")
        return self.total.scatter / (self.count - 1)

    def centred_factor(self) -> np.ndarray | None:
        """A (n, dim) with covariance = A^T A, where the rows were kept; None otherwise."""
        if self.rows is None:
            return None
        return (np.concatenate(self.rows) - self.mean) / np.sqrt(self.count - 1)

    def distance(self, other: Features) -> float:
        """The squared Frechet distance (what FID reports). Raises ValueError for other dims or too few samples."""
        self.same_dimensions(other.dim)
        return Reference.of(other).distance_to(self)

    def same_dimensions(self, dim: int) -> None:
        if dim != self.dim:
            raise ValueError(f"got features of {self.dim} and {dim} dimensions, expected the same feature network")


class Reference:
    """A Gaussian that many others are compared with: the factor of its covariance, most of the cost, is made once.

    rows: A (n, D) with covariance = A^T A where there are no more samples than dimensions, else None.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray, rows: np.ndarray | None = None):
        self.mean, self.covariance, self.rows = mean, covariance, rows

    @classmethod
    def of(cls, features: Features) -> Reference:
        return cls(features.mean, features.covariance, features.centred_factor())

    @cached_property
    def factor(self) -> np.ndarray:
        """F (D, D) with covariance = F F^T."""
        return covariance_factor(self.covariance)

    def distance_to(self, features: Features) -> float:
        """The squared Frechet distance. Raises ValueError for other dimensions or too few samples."""
        features.same_dimensions(len(self.mean))
        covariance, few = features.covariance, features.centred_factor()
        if few is not None:
            theirs = self.rows.T if self.rows is not None else self.factor
            trace = _nuclear_norm(few @ theirs)
        elif self.rows is not None:
            trace = _nuclear_norm(self.rows @ covariance_factor(covariance))
        else:
            trace = _trace_of_root(self.factor, covariance)
        return self._assemble(features.mean, covariance, trace)

    def distance_to_gaussian(self, mean: np.ndarray, covariance: np.ndarray) -> float:
        """The squared Frechet distance to N(mean, covariance), both checked by the caller."""
        return self._assemble(mean, covariance, _trace_of_root(self.factor, covariance))

    def _assemble(self, mean: np.ndarray, covariance: np.ndarray, trace_of_root: float) -> float:
        step = self.mean - mean
        traces = float(np.trace(self.covariance) + np.trace(covariance))
        return max(0.0, float(step @ step) + traces - 2.0 * trace_of_root)


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
    return Reference(mu1, sigma1).distance_to_gaussian(mu2, sigma2)


def covariance_factor(sigma: np.ndarray) -> np.ndarray:
    """F (D, D) with sigma = F F^T: Cholesky's, the cheapest; where sigma is singular, the symmetric root."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def checked_rows(features: np.ndarray, dim: int) -> np.ndarray:
    """(n, dim) as float64. Raises ValueError for another shape, NaN or infinity."""
    batch = np.asarray(features, dtype=np.float64)
    if batch.ndim != 2 or batch.shape[1] != dim:
        raise ValueError(f"features: got shape {batch.shape}, expected (n, {dim})")
    if not np.isfinite(batch).all():
        bad = int((~np.isfinite(batch).all(axis=1)).sum())
        raise ValueError(f"features: got NaN or infinity in {bad} of {len(batch)} rows, expected finite numbers")
    return batch


def block_of(rows: np.ndarray, index: int) -> Block:
    """The sums of one block of at most BLOCK_ROWS rows (n, D), n >= 1."""
    rows = checked_rows(rows, rows.shape[1])
    assert 0 < len(rows) <= BLOCK_ROWS, f"a block of {len(rows)} rows"
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Block(index, len(rows), mean, centred.T @ centred)


def blocks_of(rows: np.ndarray, worker: int = 0, workers: int = 1) -> Iterator[Block]:
    """The blocks of one of `workers` workers over rows (n, D): every workers-th."""
    for index in range(worker, -(-len(rows) // BLOCK_ROWS), workers):
        yield block_of(rows[index * BLOCK_ROWS : (index + 1) * BLOCK_ROWS], index)


def merge(left: Block, right: Block) -> Block:
    """The sums over both: Chan, Golub, LeVeque 1979, eq. 1.5. The order matters to the last bit."""
    total = left.count + right.count
    step = right.mean - left.mean
    scatter = left.scatter + right.scatter
    scatter += np.outer(step, step) * (left.count * right.count / total)
    return Block(right.index, total, left.mean + step * (right.count / total), scatter)


def _trace_of_root(factor1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) from S1 = F F^T: the roots of the eigenvalues of the symmetric F^T S2 F, those of S1 S2.

    By torch: its LAPACK (MKL on Intel) takes two thirds of the time of NumPy's for products and half for eigenvalues.
    """
    import torch

    factor, sigma = torch.from_numpy(factor1), torch.from_numpy(sigma2)
    values = torch.linalg.eigvalsh(factor.T @ sigma @ factor)  # reads one triangle
    return float(values.clamp(min=0.0).sqrt().sum())


def _nuclear_norm(matrix: np.ndarray) -> float:
    """The sum of the singular values."""
    import torch

    return float(torch.linalg.svdvals(torch.from_numpy(matrix)).sum())
