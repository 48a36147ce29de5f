"""The order of samples: which samples a step sees is a function of (seed, step, global batch size) alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raphael.randomness import permutation


@dataclass
class Batches:
    """Global batches over an endless sequence of epochs, each epoch a permutation of its own.

    The last, partial batch of an epoch is filled from the next one: no sample is dropped, none comes twice in an epoch.
    Each rank takes a contiguous slice, so that the ranks' slices side by side are the batch of world size 1.
    """

    seed: int
    num_samples: int
    batch_size: int  # global
    rank: int = 0
    world_size: int = 1
    orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)  # of the last epochs asked for

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(
                "got a data set without samples, expected at least one; look at the reports of the earlier stages"
            )
        if self.batch_size % self.world_size:
            raise ValueError(
                f"got batch_size {self.batch_size} for {self.world_size} workers, expected a multiple of "
                f"{self.world_size}: each takes an equal slice; set loop.batch_size or num_workers in params.yaml"
            )

    def everyone(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices), int64 (batch_size,) each: the samples of the whole batch of step 0, 1, ..."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_samples)
        indices = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[within[here]]
        return epochs, indices

    def own(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices) of this rank's slice, int64 (batch_size / world_size,) each."""
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        epochs, indices = self.everyone(step)
        return epochs[mine], indices[mine]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self.orders:
            for old in [known for known in self.orders if known < epoch - 1]:
                del self.orders[old]
            self.orders[epoch] = permutation(self.seed, epoch, self.num_samples)
        return self.orders[epoch]
