"""The order of learning: for its first images a training may see some timesteps and captions only (`phases` of a
system that reads texts, in `train.settings`).

    phases:
      - until_images: 24000
        timesteps: [0.9, 1.0]          # shares of T, 0 the cleanest
        timestep_shift: 1.0
        captions: '\\b(left of|right of)\\b'   # a regular expression, found anywhere, any case; "": all

After the last phase, and everywhere without phases, training is as the rest says. Why one would want it: what a layout
needs is read from the text only where the noise hides the image, and there it drowns in the rest (docs/learning.md).

Which records a phase has is said by their captions (data/records/captions.json): a caption is the only truth that every
data set has, drawn or photographed, so no column has to be carried through the stages, and no truth about drawn scenes
reaches a training that a photograph would not have.

A sample of phase p is numbered p N + i, i of the N records: an index of its own, so that its randomness stays a
function of (seed, epoch, sample index), and a batch one of (seed, step). A phase has epochs of its own, over its
records alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.config.params import PhaseConfig
from raphael.base.records import CAPTIONS, PHASE
from raphael.base.stage import StageError, read_json
from raphael.train.batches import Batches


class Phased:
    """A data set whose samples are (phase, record) pairs; what raphael/train/loop.py asks of one.

    captions: of the records, in their order. Raises StageError where a phase has no record.
    """

    def __init__(self, data: Any, phases: Sequence[PhaseConfig], captions: Sequence[str]):
        assert len(captions) == len(data), (len(captions), len(data))
        self.data, self.phases = data, tuple(phases)
        self.keys = _Keys(data.keys)
        self.bucket_counts = tuple(getattr(data, "bucket_counts", (len(data),)))
        self.rows = [_matching(phase, captions, number) for number, phase in enumerate(self.phases)]
        self.rows.append(np.arange(len(data), dtype=np.int64))
        digest = hashlib.sha256(getattr(data, "sha256", "").encode())
        for phase, rows in zip(self.phases, self.rows[:-1], strict=True):
            digest.update(f"/{phase.until_images}/".encode() + rows.tobytes())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, seed: int, batch_size: int, rank: int = 0, world_size: int = 1) -> PhasedBatches:
        return PhasedBatches(self, seed, batch_size, rank, world_size)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The records of numbered samples, and their phase."""
        phases, rows = np.divmod(np.asarray(indices, dtype=np.int64), len(self.data))
        return {**self.data.batch(rows), PHASE: phases}

    def ahead(self, indices: np.ndarray) -> None:
        """As raphael/train/heldout.py: Subset."""
        if (ahead := getattr(self.data, "ahead", None)) is not None:
            ahead(np.asarray(indices, dtype=np.int64) % len(self.data))

    def describe(self) -> list[str]:
        """A line a phase, for a person."""
        lines, first = [], 0
        for number, (phase, rows) in enumerate(zip(self.phases, self.rows, strict=False)):
            low, high = phase.timesteps
            lines.append(
                f"phase {number}, images {first:,} to {phase.until_images:,}: {len(rows):,} of {len(self):,} records, "
                f"timesteps {low:g} to {high:g} of T"
            )
            first = phase.until_images
        return lines


@dataclass(frozen=True)
class _Keys:
    """The record's key of a numbered sample, for messages."""

    keys: Sequence[str]

    def __getitem__(self, number: int) -> str:
        return self.keys[number % len(self.keys)]


class PhasedBatches:
    """The order of a Phased data set's samples: Batches of the phase that a step lies in, counted from its first."""

    def __init__(self, data: Phased, seed: int, batch_size: int, rank: int, world_size: int):
        self.data, self.batch_size = data, batch_size
        self.firsts = [0]  # step with which a phase begins
        for phase in data.phases:
            assert phase.until_images % batch_size == 0, (phase.until_images, batch_size)  # the system checks it
            self.firsts.append(phase.until_images // batch_size)
        ends = np.cumsum(data.bucket_counts)
        self.orders = []
        for rows in data.rows:
            buckets = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends))
            self.orders.append(Batches(seed, len(rows), batch_size, rank, world_size, tuple(buckets.tolist())))

    def everyone(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, numbers of the samples), int64 (batch_size,) each."""
        phase = self.phase(step)
        return self._numbered(phase, *self.orders[phase].everyone(step - self.firsts[phase]))

    def own(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Of this rank's slice."""
        phase = self.phase(step)
        return self._numbered(phase, *self.orders[phase].own(step - self.firsts[phase]))

    def phase(self, step: int) -> int:
        return int(np.searchsorted(self.firsts, step, side="right")) - 1

    def _numbered(self, phase: int, epochs: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return epochs, phase * len(self.data) + self.data.rows[phase][places]


def in_phases(data: Any, phases: Sequence[PhaseConfig], folder: Path) -> Any:
    """Records of `folder`, or a Subset of them, in phases; as they are where there are none."""
    if not phases:
        return data
    captions = read_json(folder / CAPTIONS)
    return Phased(data, phases, [captions[key] for key in data.keys])


def _matching(phase: PhaseConfig, captions: Sequence[str], number: int) -> np.ndarray:
    """The records whose caption the phase asks for, int64, in their order."""
    pattern = re.compile(phase.captions, re.IGNORECASE)
    rows = np.array([row for row, caption in enumerate(captions) if pattern.search(caption)], dtype=np.int64)
    if not len(rows):
        raise StageError(
            f"train.settings.phases[{number}].captions: got {phase.captions!r}, which is found in none of "
            f"{len(captions)} captions; expected an expression that some have, or an empty one: all"
        )
    return rows
