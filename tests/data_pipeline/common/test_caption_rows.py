import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common import caption_rows
from data_pipeline.common.caption_rows import CaptionRow, CaptionRows
from raphael.base.stage import StageError


def write(path, keys):
    rows = [{"key": key, "caption": f"of {key}", "width": 1, "shard": f"{key[:-4]}.tar"} for key in keys]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return [CaptionRow(key, f"{key[:-4]}.tar", f"of {key}") for key in keys]


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_rows_come_in_the_order_of_their_keys_as_often_as_one_likes(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(caption_rows, "BATCH_ROWS", batch_rows)
    expected = write(tmp_path / "a", [f"{3 * number:09d}" for number in range(30)])
    rows = CaptionRows(tmp_path / "a")
    assert len(rows) == 30 and list(rows) == expected and list(rows) == expected
    assert rows.sorted is None  # one batch at a time


def test_a_file_in_another_order_is_sorted(tmp_path):
    keys = [f"{number:09d}" for number in range(40)]
    write(tmp_path / "a", random.Random(0).sample(keys, 40))
    assert [row.key for row in CaptionRows(tmp_path / "a")] == keys


def test_keys_of_a_shard_beyond_five_digits_come_after_the_others(tmp_path):
    keys = ["099990000", "099990001", "999990000", "999999999", "1000000000", "1000000001"]
    write(tmp_path / "ascending", keys)
    rows = CaptionRows(tmp_path / "ascending")
    assert [row.key for row in rows] == keys and rows.sorted is None
    write(tmp_path / "as_text", sorted(keys))
    assert [row.key for row in CaptionRows(tmp_path / "as_text")] == keys


def test_a_key_that_comes_twice_is_named(tmp_path):
    for keys in (["1", "2", "2"], ["2", "1", "2"]):
        write(tmp_path / "a", keys)
        with pytest.raises(StageError, match="got the key 2 twice"):
            CaptionRows(tmp_path / "a")


def test_no_rows_are_no_error_here(tmp_path):
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ("key", "shard", "caption")}), tmp_path / "a")
    assert len(CaptionRows(tmp_path / "a")) == 0 and list(CaptionRows(tmp_path / "a")) == []
