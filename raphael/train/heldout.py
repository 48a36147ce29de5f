"""A held-out loss that is the same number whenever it is asked of the same weights.

Records are kept out of training by a rule about their keys alone. Each is judged at four timesteps, one in each quarter
of T, with noise of its own that never changes; together the timesteps are strata of T, so that no part of the schedule
is left to chance. The loss is the plain mean square error of the prediction, without weights, noise offset or dropped
captions, so that trainings with other settings can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.precision import autocast
from raphael.base.randomness import SampleRng, permutation
from raphael.base.record_files.keys import Chosen
from raphael.base.stage import StageError
from raphael.train.distributed.world import World

SEED = 0  # not the training's: another seed of a training is judged by the same noise
QUARTERS = 4
BATCH = 16  # records in one pass; the same for any number of workers, since kernels may round by batch size


def chosen(keys: Sequence[str], count: int) -> np.ndarray:
    """The `count` records that are kept out, int64, in the order of the records: those of the smallest sha256 of
    "heldout/<key>". A function of the keys: more records, another order or seed move none of the others."""
    if not 0 <= count < len(keys):
        raise StageError(
            f"train.num_heldout: got {count} of {len(keys)} records, expected at least one to be left for training"
        )
    names = [hashlib.sha256(f"heldout/{key}".encode()).digest() for key in keys]
    return np.sort(np.array(sorted(range(len(keys)), key=names.__getitem__)[:count], dtype=np.int64))


class Subset:
    """Some records of a data set (raphael/base/records.py), in its order, as one of its own."""

    def __init__(self, data: Any, rows: np.ndarray):
        self.data, self.rows = data, np.asarray(rows, dtype=np.int64)
        self.keys = Chosen(data.keys, self.rows)
        if (whole := getattr(data, "sha256", None)) is not None:
            self.sha256 = hashlib.sha256(whole.encode() + self.rows.tobytes()).hexdigest()
        ends = np.cumsum(getattr(data, "bucket_counts", (len(data),)))
        held = np.searchsorted(ends, self.rows, side="right")
        self.bucket_counts = tuple(np.bincount(held, minlength=len(ends)).tolist())

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.data.batch(self.rows[indices])

    def ahead(self, indices: np.ndarray) -> None:
        """Say which will be asked for next, where the data set has to fetch them."""
        if (ahead := getattr(self.data, "ahead", None)) is not None:
            ahead(self.rows[indices])


def split(data: Any, count: int) -> tuple[Any, Subset | None]:
    """(records to train on, records kept out); the data itself and None where none is kept out."""
    if not count:
        return data, None
    out = chosen(data.keys, count)
    return Subset(data, np.setdiff1d(np.arange(len(data)), out)), Subset(data, out)


class Heldout:
    """Call it for the loss of the weights that the objective has now. Every rank must.

    objective.heldout(batch, rng, place) -> (B,) losses; place (B,) in [0, 1) is the share of T, and all noise comes
    from the rng. Passes are dealt out to the ranks, and every loss is one rank's alone: the mean over records is taken
    in one order, so any number of workers gives the same bits for the same weights.
    """

    def __init__(self, objective: Any, data: Subset, world: World, precision: str):
        self.objective, self.data, self.world, self.precision = objective, data, world, precision
        self.passes: list[tuple[int, np.ndarray]] = []  # (quarter, records, all of one bucket)
        first = 0
        for count in data.bucket_counts:
            rows = np.arange(first, first + count)
            first += count
            self.passes += [(q, rows[i : i + BATCH]) for q in range(QUARTERS) for i in range(0, count, BATCH)]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """{"denoise": the mean loss, "denoise_t/0" ... "denoise_t/3": of each quarter of T, the cleanest first}."""
        losses = torch.zeros(QUARTERS, len(self.data), device=self.world.device)
        size, count = self.world.size, len(self.passes)
        for turn in range(-(-count // size)):
            number = turn * size + self.world.rank
            if number >= count and not self.world.sharded:
                continue  # where weights are sharded, a forward needs every rank
            quarter, rows = self.passes[min(number, count - 1)]
            found = self._losses(quarter, rows)
            if number < count:
                losses[quarter, torch.from_numpy(rows).to(losses.device)] = found.float()
        losses = self.world.sum(losses).cpu().double()
        return {"denoise": float(losses.mean()), **{f"denoise_t/{q}": float(losses[q].mean()) for q in range(QUARTERS)}}

    def _losses(self, quarter: int, rows: np.ndarray) -> Tensor:
        strata = permutation(SEED, quarter, len(self.data), "heldout")[rows]
        place = torch.from_numpy((quarter + (strata + 0.5) / len(self.data)) / QUARTERS).to(self.world.device)
        batch = {name: torch.from_numpy(array).to(self.world.device) for name, array in self.data.batch(rows).items()}
        with autocast(self.precision, self.world.device):
            return self.objective.heldout(batch, SampleRng(SEED, quarter, rows), place)
