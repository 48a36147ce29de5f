"""Rows whose link came before: exact, by spilling to disk.

Every row goes to one of so many partitions on disk by a hash of its url, so that equal urls meet in one partition,
and each partition is compared by itself, by the urls themselves: a hash decides where, never whether. What is dropped
is written as sorted row numbers, one file a partition, and merged while the rows are read again. Memory is that of
one partition: constant up to 256 million rows (512 partitions of 500,000), beyond that a 512th of the urls.

One url may stand in a list with several captions (COCO gives five to a picture; LAION has re-used pictures). The first
row of a url is kept. A later row with the same caption is a "duplicate url"; one with another caption is counted as
"another caption of a kept url", so that no list loses captions silently.
"""

from __future__ import annotations

import hashlib
import heapq
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.schema import CAPTION, URL

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

DUPLICATE, OTHER_CAPTION = "duplicate url", "another caption of a kept url"
ROWS_A_PARTITION = 500_000
MAX_PARTITIONS = 512  # files open at a time
READ_AHEAD = 8192  # row numbers of each partition in memory while merging


class UrlPartitions:
    """`add` every batch in order; then `drop` says which rows go. folder: empty, for this alone."""

    def __init__(self, folder: Path, max_rows: int):
        """max_rows: at least as many rows as will be added; it decides the number of partitions."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.number = min(max(1, -(-max_rows // ROWS_A_PARTITION)), MAX_PARTITIONS)
        self.rows = 0
        self.writers: list = []

    def add(self, table: pa.Table) -> None:
        """table: url and caption, neither null."""
        import numpy as np
        import pyarrow as pa

        urls, captions = table[URL].to_pylist(), table[CAPTION].to_pylist()
        home = np.array([zlib.crc32(url.encode()) % self.number for url in urls], np.int32)
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in captions]
        columns = [pa.array(np.arange(self.rows, self.rows + len(urls))), pa.array(urls, pa.string())]
        batch = pa.record_batch([*columns, pa.array(digests, pa.binary(16))], names=["row", "url", "caption"])
        if not self.writers:
            paths = [str(self.folder / f"{number:03d}.arrow") for number in range(self.number)]
            self.writers = [pa.ipc.new_file(path, batch.schema) for path in paths]
        order = np.argsort(home, kind="stable")
        bounds = np.searchsorted(home[order], np.arange(self.number + 1))
        batch = batch.take(pa.array(order))
        for number, writer in enumerate(self.writers):
            if bounds[number] < bounds[number + 1]:
                writer.write_batch(batch.slice(bounds[number], bounds[number + 1] - bounds[number]))
        self.rows += len(urls)

    def drop(self) -> tuple[Iterator[int], dict[str, int]]:
        """(row numbers to drop, rising; how many by reason). The rows are numbered as they were added, from 0."""
        import numpy as np

        counts = {DUPLICATE: 0, OTHER_CAPTION: 0}
        streams = []
        for number, writer in enumerate(self.writers):
            writer.close()
            path = self.folder / f"{number:03d}.arrow"
            dropped, same_caption = _later_rows(path)
            path.unlink()
            counts[DUPLICATE] += same_caption
            counts[OTHER_CAPTION] += len(dropped) - same_caption
            if len(dropped):
                dropped.astype(np.int64).tofile(path.with_suffix(".rows"))
                streams.append(_numbers(path.with_suffix(".rows")))
        return heapq.merge(*streams), counts


def _later_rows(path: Path) -> tuple[np.ndarray, int]:
    """Row numbers of a partition whose url stood in an earlier row, and how many of them repeat its caption too."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    if not len(table):
        return np.empty(0, np.int64), 0
    rows = table["row"].to_numpy()
    codes = pc.dictionary_encode(table["url"].combine_chunks()).indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]  # of each url, by its code; rows rise within a partition
    later = np.flatnonzero(first[codes] != np.arange(len(codes)))
    captions = table["caption"].combine_chunks()
    same = pc.equal(captions.take(pa.array(later)), captions.take(pa.array(first[codes[later]])))
    return rows[later], int(pc.sum(same).as_py() or 0)


def _numbers(path: Path) -> Iterator[int]:
    import numpy as np

    with open(path, "rb") as file:
        while len(piece := np.fromfile(file, np.int64, READ_AHEAD)):
            yield from piece.tolist()


class Keep:
    """Which rows of the next batch stay, from the row numbers to drop, rising."""

    def __init__(self, drop: Iterator[int]):
        self.drop, self.start = drop, 0
        self.ahead = next(drop, None)

    def next(self, size: int) -> np.ndarray:
        """Bool (size,)."""
        import numpy as np

        keep = np.ones(size, bool)
        while self.ahead is not None and self.ahead < self.start + size:
            keep[self.ahead - self.start] = False
            self.ahead = next(self.drop, None)
        self.start += size
        return keep
