"""The order of samples: which samples a step sees is a function of (seed, step, global batch size) alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raphael.base.randomness import Shuffled, permutation

# Samples of a bucket, up to which an epoch's order is held; beyond, a place is computed when it comes
HELD = 1 << 22


@dataclass
class Batches:
    """Global batches over an endless sequence of epochs, each epoch a permutation of its own.

    The last, partial batch of an epoch is filled from the next one: no sample is dropped, none comes twice in an epoch.
    Each rank takes a contiguous slice, so that the ranks' slices side by side are the batch of world size 1.

    buckets: samples of each bucket where there are several (samples of one shape, side by side in the data set). Then
    every batch is of one bucket, the same on all ranks, and all of the above is true of each bucket by itself: its own
    endless sequence, its own epochs, its tail carried over. After e rounds through the data, bucket b of n_b samples
    has had floor(e n_b / batch_size) batches: buckets come in proportion to their samples, less than one batch of each
    is owed at the end of a round and comes in the next. The order of buckets within a round is a permutation. A bucket
    smaller than a batch has its turn in some rounds only; its samples then come several times in a batch, each time
    with noise of their own.
    """

    seed: int
    num_samples: int
    batch_size: int  # global
    rank: int = 0
    world_size: int = 1
    buckets: tuple[int, ...] = ()
    # Of the last epochs asked for
    orders: dict[tuple[int, int], np.ndarray | Shuffled] = field(default_factory=dict, repr=False)
    turns: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)  # of the last round

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
        self.buckets = tuple(self.buckets) or (self.num_samples,)
        if sum(self.buckets) != self.num_samples:
            raise ValueError(f"got buckets of {self.buckets} samples, expected {self.num_samples} in all")

    def everyone(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices), int64 (batch_size,) each: the samples of the whole batch of step 0, 1, ...

        An epoch is the bucket's own: how often its samples came before.
        """
        bucket, ordinal = self.turn(step)
        positions = np.arange(ordinal * self.batch_size, (ordinal + 1) * self.batch_size, dtype=np.int64)
        epochs, within = np.divmod(positions, self.buckets[bucket])
        indices = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(bucket, int(epoch))[within[here]]
        return epochs, indices + sum(self.buckets[:bucket])

    def own(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices) of this rank's slice, int64 (batch_size / world_size,) each."""
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        epochs, indices = self.everyone(step)
        return epochs[mine], indices[mine]

    def turn(self, step: int) -> tuple[int, int]:
        """(bucket, how many batches it had before) of a step."""
        first, *others = [bucket for bucket, count in enumerate(self.buckets) if count]
        if not others:  # its own turn every time: no order of turns to make, 4 million a round at a thousand million
            return first, step
        # sum_b floor(e n_b / B) <= e N / B: the search begins at or before the round and ends within a few
        round_ = step * self.batch_size // self.num_samples
        while self._steps_before(round_ + 1) <= step:
            round_ += 1
        if round_ not in self.turns:
            self.turns = {round_: self._turns(round_)}
        buckets, ordinals = self.turns[round_]
        place = step - self._steps_before(round_)
        return int(buckets[place]), int(ordinals[place])

    def _steps_before(self, round_: int) -> int:
        return sum(round_ * count // self.batch_size for count in self.buckets)

    def _turns(self, round_: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every step of a round: its bucket, and that bucket's batches before it."""
        firsts = [round_ * count // self.batch_size for count in self.buckets]
        nexts = [(round_ + 1) * count // self.batch_size for count in self.buckets]
        buckets = np.repeat(np.arange(len(self.buckets)), np.subtract(nexts, firsts))
        buckets = buckets[permutation(self.seed, round_, len(buckets), "buckets")]
        ordinals = np.empty_like(buckets)
        for bucket, (first, after) in enumerate(zip(firsts, nexts, strict=True)):
            ordinals[buckets == bucket] = np.arange(first, after)
        return buckets, ordinals

    def _order(self, bucket: int, epoch: int) -> np.ndarray | Shuffled:
        if (bucket, epoch) not in self.orders:
            for old in [known for known in self.orders if known[0] == bucket and known[1] < epoch - 1]:
                del self.orders[old]
            stream = f"order {bucket}" if bucket else "order"
            made = permutation if self.buckets[bucket] <= HELD else Shuffled
            self.orders[bucket, epoch] = made(self.seed, epoch, self.buckets[bucket], stream)
        return self.orders[bucket, epoch]
