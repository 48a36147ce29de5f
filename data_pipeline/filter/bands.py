"""Hashes of 64 bits that differ in at most r of them: every such pair, exactly, at a cost far below that of all pairs.

The pigeonhole principle: of r + k bands of bits, two hashes that differ in at most r bits agree in at least k bands. So
every pair meets under the key that some k bands make, and what shares a key is compared in full: nothing is missed and
nothing is guessed. That is the banding of locality-sensitive hashing without its chance (Manku, Jain and Das Sarma
2007, "Detecting near-duplicates for web crawling", section 3). A pair is counted under the first k bands in which it
agrees.

Wider keys are shared by fewer hashes and there are more of them, C(r + k, k) tables to sort: `bands_of_key` takes what
costs least for so many rows. With one band in a key, hashes of 4 bits' radius share it with a 7,000th of the rows: the
cost is quadratic. With two it is a 2,600,000th, with three a 180 millionth: up to a thousand million rows it is that of
sorting them 15 or 35 times.

Rows lie on disk, parted by key: memory is that of one partition, and a byte a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.common.hashes.phash import BITS

ROWS_A_PARTITION = 1_000_000
MAX_PARTITIONS = 1024  # a file each, opened one after the other
WIDEST = 4  # bands in a key
ROW_S, PAIR_S = 2e-7, 8e-9  # of one core: to bring a row to its place in a table, to compare a pair
PAIRS_AT_A_TIME = 65536
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def bands_of_key(radius: int, rows: int) -> int:
    """k: how many of radius + k bands make a key, for the least time with hashes that are spread evenly."""

    def seconds(count: int) -> float:
        tables, shared = math.comb(radius + count, count), 2.0 ** -(BITS * count / (radius + count))
        return tables * (rows * ROW_S + rows * rows / 2 * shared * PAIR_S)

    return min(range(1, WIDEST + 1), key=seconds)


class HashBands:
    """`add` hashes in the order of the rows; then `drop` says which rows go: those alike to an earlier one that stays.

    folder: empty, for this alone; 40 bytes a row of it are used. radius: bits that may differ, 0 to 15. max_rows: at
    least as many as will be added.
    """

    def __init__(self, folder: Path, radius: int, max_rows: int):
        assert 0 <= radius < 16
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.radius, self.rows = folder, radius, 0
        self.partitions = min(max(1, -(-max_rows // ROWS_A_PARTITION)), MAX_PARTITIONS)

    def add(self, hashes: np.ndarray) -> None:
        """hashes: uint64 (n,)."""
        rows = np.arange(self.rows, self.rows + len(hashes), dtype=np.uint64)
        hashes = hashes.astype(np.uint64)
        self._deal("all", np.stack([rows, hashes], axis=1), hashes)
        self.rows += len(hashes)

    def drop(self) -> list[int]:
        """Rows that are alike to an earlier one that stays, rising."""
        firsts = sum(self._first_of_equals(partition) for partition in range(self.partitions))
        if self.radius and firsts > 1:
            width = bands_of_key(self.radius, firsts)
            edges = [round(BITS * band / (self.radius + width)) for band in range(self.radius + width + 1)]
            bands = [(low, high - low) for low, high in itertools.pairwise(edges)]  # (shift, width)
            for key in itertools.combinations(range(len(bands)), width):
                self._table(bands, key)
        for path in self.folder.glob("first-*"):
            path.unlink()
        return np.flatnonzero(np.frombuffer(self._decide(), np.uint8)).tolist()

    def _first_of_equals(self, partition: int) -> int:
        """Sort out the repetitions of a hash. Such a row goes whatever becomes of the first of its kind: that stays, or
        what it is alike to does. So it is paired with itself, and the first alone is compared with others. Returns how
        many are first."""
        entries = self._take(f"all-{partition}")
        order = np.argsort(entries[:, 1], kind="stable")  # rows rise in a file
        entries = entries[order]
        first = np.r_[True, entries[1:, 1] != entries[:-1, 1]][: len(entries)]
        repeats = entries[~first, 0]
        self._found(repeats, repeats)
        entries[first].tofile(self.folder / f"first-{partition}")
        return int(first.sum())

    def _table(self, bands: list[tuple[int, int]], key: tuple[int, ...]) -> None:
        """Find the pairs that agree in the bands of `key` and in no band before the last of them."""
        for partition in range(self.partitions):
            entries = np.fromfile(self.folder / f"first-{partition}", np.uint64).reshape(-1, 2)
            if self.partitions == 1:
                self._compare(entries, bands, key)
            else:
                self._deal("table", entries, _keys(entries[:, 1], bands, key))
        for partition in range(self.partitions if self.partitions > 1 else 0):
            self._compare(self._take(f"table-{partition}"), bands, key)

    def _compare(self, entries: np.ndarray, bands: list[tuple[int, int]], key: tuple[int, ...]) -> None:
        """Each row with those behind it that have its key: with the next of all rows, then with the next but one."""
        keys = _keys(entries[:, 1], bands, key)
        order = np.argsort(keys)
        keys, rows, hashes = keys[order], entries[order, 0], entries[order, 1]
        ends = np.flatnonzero(np.r_[keys[1:] != keys[:-1], True][: len(keys)]) + 1
        behind = np.repeat(ends, np.diff(ends, prepend=0)) - np.arange(1, len(keys) + 1)
        others = [band for band in range(key[-1]) if band not in key]
        here, step = np.flatnonzero(behind), 1
        while len(here):
            near = here[np.bitwise_count(hashes[here] ^ hashes[here + step]) <= self.radius]
            differing = hashes[near] ^ hashes[near + step]
            for band in others:  # a pair that agrees there is found with that band in the key
                differs = _keys(differing, bands, (band,)) != 0
                near, differing = near[differs], differing[differs]
            self._found(rows[near], rows[near + step])
            step += 1
            here = here[behind[here] >= step]

    def _found(self, some: np.ndarray, others: np.ndarray) -> None:
        """Keep pairs of rows, by the later one."""
        if len(some):
            pairs = np.stack([np.maximum(some, others), np.minimum(some, others)], axis=1)
            self._spill("pairs", pairs, pairs[:, 0] // np.uint64(ROWS_A_PARTITION))

    def _decide(self) -> bytearray:
        """A byte a row: whether it goes. By the later row: what became of the earlier one is known by then."""
        gone = bytearray(self.rows)
        for part in range(-(-self.rows // ROWS_A_PARTITION)):
            pairs = self._take(f"pairs-{part}")
            pairs = pairs[np.argsort(pairs[:, 0])]
            for start in range(0, len(pairs), PAIRS_AT_A_TIME):
                for later, earlier in pairs[start : start + PAIRS_AT_A_TIME].tolist():
                    gone[later] |= not gone[earlier]
        return gone

    def _deal(self, name: str, entries: np.ndarray, keys: np.ndarray) -> None:
        """Entries into the partitions' files, equal keys into one."""
        self._spill(name, entries, (keys * _MIX >> np.uint64(32)) % np.uint64(self.partitions))

    def _spill(self, name: str, entries: np.ndarray, home: np.ndarray) -> None:
        """Append each entry to the file `name`-`home`, in their order."""
        for number, part in _parted(entries, home):
            with open(self.folder / f"{name}-{number}", "ab") as file:
                part.tofile(file)

    def _take(self, name: str) -> np.ndarray:
        """A file's entries, uint64 (n, 2), none where there is no such file; it is removed."""
        path = self.folder / name
        if not path.exists():
            return np.empty((0, 2), np.uint64)
        entries = np.fromfile(path, np.uint64).reshape(-1, 2)
        path.unlink()
        return entries


def _keys(hashes: np.ndarray, bands: list[tuple[int, int]], key: tuple[int, ...]) -> np.ndarray:
    """uint64 (n,): the bits of some bands, side by side. bands: (shift, width) each."""
    joined = np.zeros(len(hashes), np.uint64)
    for band in key:
        shift, width = bands[band]
        joined = joined << np.uint64(width) | hashes >> np.uint64(shift) & np.uint64((1 << width) - 1)
    return joined


def _parted(entries: np.ndarray, home: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number, entries of that home in their order), for each that has some."""
    if not len(home):
        return
    if home.min() == home.max():
        yield int(home[0]), entries
        return
    order = np.argsort(home.astype(np.uint16), kind="stable")  # of 16 bits: a radix sort
    entries, home = entries[order], home[order]
    starts = np.flatnonzero(np.r_[True, home[1:] != home[:-1]])
    for start, end in zip(starts, np.r_[starts[1:], len(home)], strict=True):
        yield int(home[start]), entries[start:end]
