"""Reading ahead and writing behind change when things are done, not what is done, nor in which order."""

from __future__ import annotations

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common import tables


@pytest.fixture(params=[False, True], ids=["one core", "two cores"])
def cores(request, monkeypatch):
    monkeypatch.setattr(tables, "has_threads", lambda: request.param)
    return request.param


@pytest.mark.parametrize("count", [0, 1, tables.DEPTH, 50])
def test_items_come_in_their_order_and_are_written_in_it(cores, count):
    written = []
    with tables.Behind(written.append) as later:
        for item in tables.ahead(iter(range(count))):
            later(item)
    assert written == list(range(count))


def test_no_more_than_so_many_items_are_made_before_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(tables, "has_threads", lambda: True)
    made = []
    items = tables.ahead(made.append(number) or number for number in range(100))
    assert next(items) == 0
    items.close()  # waits for its thread
    assert 1 <= len(made) <= tables.DEPTH + 1


def test_an_error_while_reading_comes_where_its_item_would(cores):
    def three():
        yield from (0, 1, 2)
        raise OSError("cut")

    seen = []
    with pytest.raises(OSError, match="cut"):
        seen.extend(tables.ahead(three()))
    assert seen == [0, 1, 2]


def test_after_a_write_that_failed_none_follows_and_its_error_is_raised(cores):
    written = []

    def write(item: int) -> None:
        if item == 2:
            raise OSError("disk full")
        written.append(item)

    with pytest.raises(OSError, match="disk full"), tables.Behind(write) as later:
        for item in range(20):
            later(item)
    assert written == [0, 1]


def test_an_error_between_writes_leaves_no_thread_and_is_the_one_raised(cores):
    started = threading.active_count()
    with pytest.raises(KeyError), tables.Behind(lambda item: None) as later:
        later(1)
        raise KeyError
    assert threading.active_count() == started


def test_a_row_group_is_not_fetched_whole(tmp_path, monkeypatch):
    """A foreign file may be one row group of many gigabytes: no read may be larger than a buffer or a page."""
    table = pa.table({"a": [f"{number:0100d}" for number in range(100_000)]})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=len(table), compression="none", use_dictionary=False)
    asked = []

    class File:
        """A file elsewhere, which says how much of it is asked for at a time."""

        def __init__(self):
            self.file = open(tmp_path / "one.parquet", "rb")  # noqa: SIM115  closed by close()

        def read(self, size=-1):
            asked.append(size)
            return self.file.read(size)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(tables, "REMOTE_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(tables, "open_file", lambda address: File())
    file = tables.open_parquet("memory://one.parquet")
    rows = sum(len(batch) for batch in tables.batches(file, 1000, ["a"], [], lambda group: False))
    assert rows == 100_000 and sum(asked) > 10e6 and max(asked) <= 2 << 20
