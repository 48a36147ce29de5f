"""Images that look alike: perceptual hashes, and an exact search for those that differ in at most r of 64 bits.

The hashes: data_pipeline/common/hashes/phash.py. The search uses the pigeonhole principle: two hashes that differ in at
most r bits agree in at least one of r + 1 bands. Rows are spilled to disk by band and value, so that memory is that of
one partition, and each pair that agrees in a band is compared in full: nothing is missed and nothing is guessed. The
cost grows with the square of how many share a band's value; at 4 bits of 64 there are five bands of some 8,000 values.

The first of several alike stays. A later one is dropped when it is alike to one that stays: chains of small changes do
not take everything with them.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.common.hashes.phash import BITS, BLOCK, near_any, phashes
from data_pipeline.common.rules import EVALUATION, NEAR
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from raphael.base.config.data import FilterConfig

ROWS_A_PARTITION = 1_000_000
MAX_PARTITIONS = 64  # of each band
READ_AHEAD = 8192  # pairs of each band in memory while merging


class HashBands:
    """`add` hashes in the order of the rows; then `drop` says which rows go. folder: empty, for this alone."""

    def __init__(self, folder: Path, radius: int, max_rows: int):
        """radius: bits that may differ, 0 to 15. max_rows: at least as many as will be added."""
        assert 0 <= radius < 16
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.radius, self.rows = folder, radius, 0
        self.partitions = min(max(1, -(-max_rows // ROWS_A_PARTITION)), MAX_PARTITIONS)
        edges = [round(BITS * band / (radius + 1)) for band in range(radius + 2)]
        self.bands = [(low, high - low) for low, high in zip(edges, edges[1:])]  # (shift, width)

    def add(self, hashes: np.ndarray) -> None:
        """hashes: uint64 (n,)."""
        rows = np.arange(self.rows, self.rows + len(hashes), dtype=np.uint64)
        pairs = np.stack([rows, hashes.astype(np.uint64)], axis=1)
        for band in range(len(self.bands)):
            home = self._values(hashes, band) % np.uint64(self.partitions)
            for partition in np.unique(home):
                with open(self.folder / f"{band}-{partition}", "ab") as file:
                    pairs[home == partition].tofile(file)
        self.rows += len(hashes)

    def drop(self) -> list[int]:
        """Rows that are alike to an earlier one that stays, rising."""
        streams = []
        for band in range(len(self.bands)):
            for partition in range(self.partitions):
                path = self.folder / f"{band}-{partition}"
                if path.exists():
                    found = self._alike(path, band)
                    path.unlink()
                    found.tofile(path.with_suffix(".pairs"))
                    streams.append(_pairs(path.with_suffix(".pairs")))
        dropped = np.zeros(self.rows, bool)
        for later, earlier in heapq.merge(*streams):  # by the later row: what became of the earlier is known by then
            dropped[later] |= not dropped[earlier]
        for path in self.folder.glob("*.pairs"):
            path.unlink()
        return np.flatnonzero(dropped).tolist()

    def _values(self, hashes: np.ndarray, band: int) -> np.ndarray:
        shift, width = self.bands[band]
        mask = np.uint64((1 << width) - 1)
        return (hashes >> np.uint64(shift)) & mask

    def _alike(self, path: Path, band: int) -> np.ndarray:
        """int64 (m, 2), sorted: (later row, earlier row) of the pairs that agree in this band and in no band before."""
        entries = np.fromfile(path, np.uint64).reshape(-1, 2)
        values = self._values(entries[:, 1], band)
        order = np.lexsort((entries[:, 0], values))
        entries, values = entries[order], values[order]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        found = [np.empty((0, 2), np.int64)]
        for start, end in zip(starts, np.r_[starts[1:], len(values)]):
            group = entries[start:end]
            # A repetition of a hash goes whatever becomes of the first: that stays, or what it is alike to does.
            # So it is paired with itself, and only the first is compared with others.
            first = np.unique(group[:, 1], return_index=True)[1]
            if band == 0:
                repeats = np.delete(group[:, 0], first).astype(np.int64)
                found.append(np.stack([repeats, repeats], axis=1))
            if len(first) > 1 and self.radius:
                found += self._compare(group[np.sort(first)], band)
        pairs = np.concatenate(found)
        return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]

    def _compare(self, group: np.ndarray, band: int) -> Iterator[np.ndarray]:
        """Pairs of different hashes of one band's value, block by block; rows rise in the group."""
        for late in range(0, len(group), BLOCK):
            for early in range(0, late + 1, BLOCK):
                a, b = group[late : late + BLOCK], group[early : early + BLOCK]
                differing = a[:, None, 1] ^ b[None, :, 1]
                near = (np.bitwise_count(differing) <= self.radius) & (a[:, None, 0] > b[None, :, 0])
                for before in range(band):  # found there already
                    near &= self._values(differing, before) != 0
                i, j = np.nonzero(near)
                yield np.stack([a[i, 0], b[j, 0]], axis=1).astype(np.int64)


class NearDuplicates:
    """What `filter` asks, shard by shard: which images look like one of the evaluation's, then which look alike."""

    def __init__(self, config: FilterConfig, folder: Path, max_rows: int):
        self.radius = config.near_duplicate_bits
        self.bands = HashBands(folder, self.radius, max_rows) if self.radius else None
        self.evaluation = folder_phashes(config.evaluation_pictures) if config.evaluation_pictures else None

    def look(self, keys: Sequence[str], tar: Path, alive: np.ndarray, dropped: dict[str, int]) -> np.ndarray:
        """The rows still alive, bool (n,), without those that look like the evaluation's; the others are remembered."""
        from data_pipeline.common.images import Shard

        rows, shard = np.flatnonzero(alive), Shard(tar)
        try:
            parts = [phashes([shard.image(keys[row])]) for row in rows]
        finally:
            shard.close()
        hashes = np.concatenate([np.empty(0, np.uint64), *parts])
        alive = alive.copy()
        if self.evaluation is not None:
            alike = near_any(hashes, self.evaluation, self.radius)
            dropped[EVALUATION] = dropped.get(EVALUATION, 0) + int(alike.sum())
            alive[rows[alike]] = False
            hashes = hashes[~alike]
        if self.bands:
            self.bands.add(hashes)
        return alive

    def take_out(self, images: Path, dropped: dict[str, int]) -> int:
        """Rewrite the table of those looked at, in that order, without near duplicates. Returns how many went."""
        import pyarrow as pa

        from data_pipeline.common.tables import open_parquet, table_writer

        if not self.bands:
            return 0
        rows, start = np.sort(np.asarray(self.bands.drop(), dtype=np.int64)), 0
        file = open_parquet(images)
        partial = images.with_suffix(".partial")
        with table_writer(partial, file.schema_arrow, compression="zstd") as writer:
            for batch in file.iter_batches():
                keep, end = np.ones(len(batch), bool), start + len(batch)
                keep[rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start] = False
                writer.write_table(pa.Table.from_batches([batch]).filter(pa.array(keep)))
                start = end
        os.replace(partial, images)
        dropped[NEAR] = len(rows)
        return len(rows)


def folder_phashes(folder: str) -> np.ndarray:
    """uint64 (m,) of every image below the folder. Raises StageError where it has none or one is broken."""
    from PIL import Image

    from data_pipeline.common.images import EXTENSIONS, FORMATS
    from raphael.base.images.colours import as_seen

    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower().lstrip(".") in EXTENSIONS)
    if not files:
        raise StageError(f"filter.evaluation_pictures: {folder}: got no image there, expected a folder of images")
    parts = []
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                parts.append(phashes([as_seen(image)]))
        except (OSError, ValueError, SyntaxError) as error:
            raise StageError(f"filter.evaluation_pictures: {file}: not readable ({str(error)[:80]})") from None
    return np.concatenate(parts)


def _pairs(path: Path) -> Iterator[tuple[int, int]]:
    with open(path, "rb") as file:
        while len(piece := np.fromfile(file, np.int64, 2 * READ_AHEAD)):
            yield from map(tuple, piece.reshape(-1, 2).tolist())
