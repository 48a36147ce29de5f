"""Parquet tables of any size: only what is needed is decoded, and memory is that of a few batches.

Every page is written with its CRC-32 and compared when it is read: compressed text gives back a flipped bit without a
word. Pages without one, of foreign files, are taken as they are.

Addresses are paths of this machine or anything fsspec knows (`hf://`, `s3://`, `https://`, `memory://`).
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.stage import StageError

if TYPE_CHECKING:
    import pyarrow as pa

# Without it pyarrow takes a row group's column into memory whole, and foreign files have row groups of gigabytes.
BUFFER_BYTES, REMOTE_BUFFER_BYTES = 1 << 20, 8 << 20  # of each column that is read at a time
DEPTH = 4  # batches that wait to be judged, and to be written: a row group is written at once, several batches' time
GROUP_ROWS = 131_072  # a row group of the tables that we write


def keep_freed_memory() -> None:
    """Let Arrow's allocator use again what batches leave, for the rest of the process. By itself it hands memory back
    to the system after 10 ms and has it cleared again for the next batch, 8 % of a run of `select`. Counts only before
    pyarrow is loaded."""
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")


def is_remote(address: str | Path) -> bool:
    return "://" in str(address)


def open_file(address: str | Path):
    """The bytes at an address, to read from, in binary."""
    if not is_remote(address):
        return open(address, "rb")
    import fsspec

    return fsspec.open(str(address), "rb", block_size=REMOTE_BUFFER_BYTES).open()


def write_table(table: pa.Table, path: str | Path, **options: Any) -> None:
    """options: of pyarrow's write_table."""
    import pyarrow.parquet as pq

    pq.write_table(table, path, write_page_checksum=True, **options)


def table_writer(path: str | Path, schema: pa.Schema, **options: Any):
    """A pyarrow ParquetWriter. options: of it."""
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, schema, write_page_checksum=True, **options)


class ParquetTable:
    """A pyarrow ParquetFile of which a damaged page is one line with the file's address, a StageError."""

    def __init__(self, address: str | Path, file: Any):
        self.address, self.file = address, file
        self.metadata, self.schema_arrow = file.metadata, file.schema_arrow

    def read(self, columns: list[str] | None = None) -> pa.Table:
        with self._named():
            return self.file.read(columns=columns)

    def iter_batches(self, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        batches = self.file.iter_batches(*arguments, **options)
        while True:
            with self._named():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise StageError(f"{self.address}: damaged ({' '.join(str(error).split())[:120]}); make it again") from None

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def open_parquet(address: str | Path) -> ParquetTable:
    """Raises StageError, one line, where the file is missing or no parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = REMOTE_BUFFER_BYTES if is_remote(address) else BUFFER_BYTES
    try:
        # pre_buffer, pyarrow's default, fetches a row group whole, whatever buffer_size says
        source = open_file(address) if is_remote(address) else address
        file = pq.ParquetFile(source, buffer_size=size, pre_buffer=False, page_checksum_verification=True)
        return ParquetTable(address, file)
    except FileNotFoundError:
        raise StageError(f"{address}: no such file; run the stage that makes it (dvc repro)") from None
    except (pa.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())
        raise StageError(f"{address}: not a readable parquet file ({detail}); make it again") from None
    except (ImportError, ValueError) as error:  # fsspec: no such protocol, or its package is not installed
        raise StageError(f"{address}: {' '.join(str(error).split())}") from None


class Statistics:
    """What a file's footer says about its row groups: lowest, highest and nulls of a column."""

    def __init__(self, metadata):
        self.metadata = metadata
        first = metadata.row_group(0) if metadata.num_row_groups else None
        self.places = {first.column(i).path_in_schema: i for i in range(first.num_columns)} if first else {}

    def low_high(self, group: int, column: str) -> tuple[float, float] | None:
        """(lowest, highest) of a column of numbers in a row group, nulls and NaN aside; None where it is not said."""
        said = self._of(group, column)
        if said is None or not said.has_min_max or not isinstance(said.min, int | float):
            return None
        return float(said.min), float(said.max)

    def nulls(self, group: int, column: str) -> int | None:
        said = self._of(group, column)
        return said.null_count if said is not None and said.has_null_count else None

    def lowest(self, column: str) -> float | None:
        """The lowest value of the whole file; None where one row group does not say, or all of them are null."""
        lows = []
        for group in range(self.metadata.num_row_groups):
            rows = self.metadata.row_group(group).num_rows
            if rows and self.nulls(group, column) != rows:
                pair = self.low_high(group, column)
                if pair is None or pair[0] != pair[0]:
                    return None
                lows.append(pair[0])
        return min(lows, default=None)

    def is_null(self, column: str) -> bool:
        """Whether the footer says that the whole column is null."""
        groups = range(self.metadata.num_row_groups)
        said = [self.nulls(group, column) == self.metadata.row_group(group).num_rows for group in groups]
        return bool(said) and all(said)

    def _of(self, group: int, column: str):
        if column not in self.places:
            return None
        return self.metadata.row_group(group).column(self.places[column]).statistics


def batches(
    file, rows: int, columns: list[str], few: list[str], is_hopeless: Callable[[int], bool]
) -> Iterator[pa.RecordBatch]:
    """Batches of at most `rows` rows in the file's order: `columns`, but only `few` of a row group that is hopeless."""
    threads = has_threads()
    for group in range(file.metadata.num_row_groups):
        wanted = few if is_hopeless(group) else columns
        yield from file.iter_batches(batch_size=rows, row_groups=[group], columns=wanted, use_threads=threads)


def has_threads() -> bool:
    """Whether there is a core for a second thread. On one core it cost 7 % more processor time, for nothing."""
    import pyarrow as pa

    return pa.cpu_count() > 1  # what OMP_NUM_THREADS or the process's affinity leaves


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items in their order, the next DEPTH being made by a thread while one is worked on."""
    if not has_threads():
        yield from items
        return
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        upcoming = deque(pool.submit(next, iterator, end) for _ in range(DEPTH))
        while (item := upcoming.popleft().result()) is not end:
            upcoming.append(pool.submit(next, iterator, end))
            yield item


class Behind:
    """`with Behind(function) as later: later(item)`: calls one after the other in a thread, DEPTH waiting at most.

    After a call that failed no other is made; its error is raised by the next that is asked for, or at the end.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.pool = ThreadPoolExecutor(1, "behind") if has_threads() else None
        self.waiting: deque[Future] = deque()
        self.error: BaseException | None = None

    def __call__(self, *items: Any) -> None:
        if self.pool is None:
            self.function(*items)
            return
        if len(self.waiting) > DEPTH:
            self.waiting.popleft().result()
        if self.error is not None:
            raise self.error
        self.waiting.append(self.pool.submit(self._call, *items))

    def _call(self, *items: Any) -> None:
        if self.error is None:
            try:
                self.function(*items)
            except BaseException as error:
                self.error = error

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None and self.error is not None:
            raise self.error


class GroupWriter:
    """A parquet file whose row groups have GROUP_ROWS rows, however the rows arrive: equal rows give equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema, integers: list[str]):
        """integers: columns stored by their differences. Dictionaries, parquet's default, cost a third of the
        writing where most values are distinct; scores byte by byte are compressed better and sooner; the least and
        the greatest text of a row group, which nobody asks for, cost 7 %."""
        import pyarrow as pa

        self.schema = schema
        scores = [field.name for field in schema if pa.types.is_floating(field.type)]
        encoding = dict.fromkeys(integers, "DELTA_BINARY_PACKED") | dict.fromkeys(scores, "BYTE_STREAM_SPLIT")
        self.writer = table_writer(
            path,
            schema,
            compression={field.name: "lz4" if field.name in scores else "zstd" for field in schema},
            use_dictionary=False,
            column_encoding=encoding,
            write_statistics=[field.name for field in schema if not pa.types.is_string(field.type)],
        )
        self.waiting: list[pa.Table] = []
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        import pyarrow as pa

        self.waiting.append(table)
        self.rows += len(table)
        if self.rows >= GROUP_ROWS:
            joined = pa.concat_tables(self.waiting)
            while len(joined) >= GROUP_ROWS:
                self.writer.write_table(joined.slice(0, GROUP_ROWS), row_group_size=GROUP_ROWS)
                joined = joined.slice(GROUP_ROWS)
            self.waiting, self.rows = [joined], len(joined)

    def __enter__(self) -> GroupWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        import pyarrow as pa

        if kind is None and self.rows:
            self.writer.write_table(pa.concat_tables(self.waiting), row_group_size=GROUP_ROWS)
        self.writer.close()
