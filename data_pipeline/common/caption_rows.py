"""The rows of captions.parquet in the order of their keys, in one pass and in the memory of a batch.

The stages write them in that order; a file that is in another order is sorted once, and then held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.schema import CAPTION, KEY, SHARD
from raphael.base.stage import StageError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8192


@dataclass(frozen=True)
class CaptionRow:
    key: str
    shard: str  # of data/shards, with or without .tar
    caption: str


class CaptionRows:
    """`for row in CaptionRows(path)`, as often as one likes; `len` of them. Opening reads the keys.

    Keys are numbers of a fixed width and come as such: by length, then by text, so that shard 100,000 follows 99,999.
    Raises StageError, one line, where the file is absent or damaged, or a key comes twice.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise StageError(f"{path}: no such file; run the stage captions first (dvc repro captions)")
        self.count, self.sorted, ascending, last = 0, None, True, (-1, "")
        for batch in self._batches([KEY]):
            self.count += len(batch)
            orders = [(len(key), key) for key in batch.column(0).to_pylist()]
            ascending = ascending and last < orders[0] and all(a < b for a, b in zip(orders, orders[1:], strict=False))
            last = orders[-1]
        if not ascending:
            self.sorted = self._in_order()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[CaptionRow]:
        columns = [KEY, SHARD, CAPTION]
        batches = self.sorted.to_batches(BATCH_ROWS) if self.sorted is not None else self._batches(columns)
        for batch in batches:
            yield from map(CaptionRow, *(batch.column(name).to_pylist() for name in columns))

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Batches with at least one row."""
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                    if len(batch):
                        yield batch.select(columns)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
            detail = " ".join(str(error).split())[:99]
            raise StageError(f"{self.path}: {detail}; delete it and run the stage captions") from None

    def _in_order(self) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        table = pa.Table.from_batches(list(self._batches([KEY, SHARD, CAPTION])))
        order = pa.table({"length": pc.utf8_length(table[KEY]), KEY: table[KEY]})
        table = table.take(pc.sort_indices(order, [("length", "ascending"), (KEY, "ascending")]))
        keys = table[KEY]
        if len(keys) > 1 and (same := pc.equal(keys[1:], keys[:-1])) and pc.any(same).as_py():
            raise StageError(
                f"{self.path}: got the key {keys[1:].filter(same)[0]} twice, expected unique keys; "
                "run the stages filter and captions again"
            )
        return table
