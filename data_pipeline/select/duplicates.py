"""Rows whose link came before: exact, by spilling to disk.

Every row goes to one of so many partitions on disk by a hash of its url, so that equal urls meet in one partition,
and each partition is compared by itself, by the urls themselves: a hash decides where, never whether. What is dropped
is written as sorted row numbers, one file a partition, and merged while the rows are read again. Memory is that of
one partition: constant up to 256 million rows (512 partitions of 500,000), beyond that a 512th of the urls.

One url may stand in a list with several captions (COCO gives five to an image; LAION has re-used images). The first
row of a url is kept. A later row with the same caption is a "duplicate url"; one with another caption is counted as
"another caption of a kept url", so that no list loses captions silently. Captions are compared by 64 bits of a hash:
these bits decide under which of the two names a dropped row is counted, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.schema import CAPTION, URL

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

DUPLICATE, OTHER_CAPTION = "duplicate url", "another caption of a kept url"
ROWS_A_PARTITION = 500_000
MAX_PARTITIONS = 512  # files open at a time
PIECE_ROWS = 131_072  # rows in memory before they are parted: small pieces would be mostly headers
READ_AHEAD = 8192  # row numbers of each partition in memory while merging


def text_hashes(texts: pa.Array) -> np.ndarray:
    """64-bit hashes of strings without nulls, uint64 (n,), eight bytes of all of them at a time: about as dear as one
    expression asked of each."""
    import numpy as np

    factor, shift = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    data = np.zeros(ends[-1] - ends[0] + 8, np.uint8)  # so that the last string's last word can be read whole
    if len(data) > 8:
        data[:-8] = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
    words = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))  # one begins at every byte
    sizes = np.diff(ends)
    order = np.argsort(sizes if sizes.max(initial=0) > 65535 else sizes.astype(np.uint16), kind="stable")[::-1]
    at, left = (ends[:-1] - ends[0])[order], sizes[order]  # longest first: rows with a word left are the first `some`
    mixed = left.astype(np.uint64) * factor
    some = len(left)
    while some := int(np.searchsorted(-left[:some], 0)):
        word = words[at[:some]]
        whole = int(np.searchsorted(-left[:some], -7))
        word[whole:] &= (np.uint64(1) << (8 * left[whole:some]).astype(np.uint64)) - np.uint64(1)
        word ^= mixed[:some]
        word *= factor
        word ^= word >> shift
        mixed[:some] = word
        at[:some] += 8
        left[:some] -= 8
    hashes = np.empty_like(mixed)
    hashes[order] = mixed
    return hashes ^ hashes >> np.uint64(29)


class UrlPartitions:
    """`add` every batch in order; then `drop` says which rows go. folder: empty, for this alone."""

    def __init__(self, folder: Path, max_rows: int):
        """max_rows: at least as many rows as will be added; it decides the number of partitions."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.number = min(max(1, -(-max_rows // ROWS_A_PARTITION)), MAX_PARTITIONS)
        self.rows = 0
        self.waiting: list[pa.RecordBatch] = []
        self.writers: list = []

    def add(self, table: pa.Table) -> None:
        """table: url and caption, neither null."""
        import numpy as np
        import pyarrow as pa

        if not len(table):
            return
        urls, captions = (table[name].combine_chunks() for name in (URL, CAPTION))
        columns = [pa.array(np.arange(self.rows, self.rows + len(table))), urls, pa.array(text_hashes(captions))]
        self.waiting.append(pa.record_batch(columns, names=["row", "url", "caption"]))
        self.rows += len(table)
        if sum(map(len, self.waiting)) >= PIECE_ROWS:
            self._part()

    def _part(self) -> None:
        """Write what waits to its partitions."""
        import numpy as np
        import pyarrow as pa

        batch = pa.Table.from_batches(self.waiting).combine_chunks().to_batches()[0]
        self.waiting = []
        home = (text_hashes(batch.column("url")) >> np.uint64(40)) % np.uint64(self.number)
        if not self.writers:
            paths = [str(self.folder / f"{number:03d}.arrow") for number in range(self.number)]
            self.writers = [pa.ipc.new_file(path, batch.schema) for path in paths]
        order = np.argsort(home.astype(np.uint16), kind="stable")  # of 16 bits: a radix sort
        bounds = np.searchsorted(home[order], np.arange(self.number + 1, dtype=np.uint64))
        batch = batch.take(pa.array(order))
        for number, writer in enumerate(self.writers):
            if bounds[number] < bounds[number + 1]:
                writer.write_batch(batch.slice(bounds[number], bounds[number + 1] - bounds[number]))

    def drop(self) -> tuple[Keep, dict[str, int]]:
        """(which rows stay, in the order in which they were added; how many go, by reason)."""
        import numpy as np

        if self.waiting:
            self._part()
        counts = {DUPLICATE: 0, OTHER_CAPTION: 0}
        lists = []
        for number, writer in enumerate(self.writers):
            writer.close()
            path = self.folder / f"{number:03d}.arrow"
            dropped, same_caption = _later_rows(path)
            path.unlink()
            counts[DUPLICATE] += same_caption
            counts[OTHER_CAPTION] += len(dropped) - same_caption
            if len(dropped):
                lists.append(path.with_suffix(".rows"))
                dropped.astype(np.int64).tofile(lists[-1])
        return Keep(lists), counts


def _later_rows(path: Path) -> tuple[np.ndarray, int]:
    """Row numbers of a partition whose url stood in an earlier row, and how many of them repeat its caption too."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    if not len(table):
        return np.empty(0, np.int64), 0
    rows, captions = table["row"].to_numpy(), table["caption"].to_numpy()
    codes = pc.dictionary_encode(table["url"].combine_chunks()).indices.to_numpy()
    first = np.empty(codes.max() + 1, np.int64)  # of each url, by its code; rows rise within a partition
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    later = np.flatnonzero(first[codes] != np.arange(len(codes)))
    return rows[later], int((captions[later] == captions[first[codes[later]]]).sum())


class Keep:
    """Which rows of the next batch stay, from files of the row numbers to drop, each rising."""

    def __init__(self, lists: list[Path]):
        self.lists = [_Numbers(path) for path in lists]
        self.start = 0

    def next(self, size: int) -> np.ndarray:
        """Bool (size,)."""
        import numpy as np

        keep = np.ones(size, bool)
        end = self.start + size
        for numbers in self.lists:
            for piece in numbers.below(end):
                keep[piece - self.start] = False
        self.start = end
        return keep


class _Numbers:
    """A file of rising row numbers, handed out piece by piece. It is opened anew for every piece: 512 stay closed."""

    def __init__(self, path: Path):
        self.path, self.read, self.piece, self.is_done = path, 0, None, False

    def below(self, end: int) -> Iterator[np.ndarray]:
        """Pieces, int64, of the numbers that are smaller than `end` and were not handed out before."""
        import numpy as np

        while not self.is_done:
            if self.piece is None or not len(self.piece):
                self.piece = np.fromfile(self.path, np.int64, READ_AHEAD, offset=8 * self.read)
                self.read += len(self.piece)
                self.is_done = not len(self.piece)
            count = int(np.searchsorted(self.piece, end))
            piece, self.piece = self.piece[:count], self.piece[count:]
            if count:
                yield piece
            if len(self.piece):
                return
