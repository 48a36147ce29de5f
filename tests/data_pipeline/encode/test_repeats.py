"""How often an image comes is carried from the list's column to the records' facts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common.caption_rows import CaptionRows
from data_pipeline.encode.repeats import has_repeats, read_repeats

KEYS = {"000000000": 1, "000000002": 3, "000010000": 4}  # key -> row of the list


@pytest.fixture
def listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/source", "data/captions", "data/shards"):
        (tmp_path / folder).mkdir(parents=True)
    for shard in ("00000", "00001"):
        mine = [key for key in KEYS if key[4] == shard[4]]
        pq.write_table(pa.table({"key": mine, "id": [KEYS[key] for key in mine]}), f"data/shards/{shard}.parquet")
    rows = [{"key": key, "shard": f"0000{key[4]}.tar", "caption": "a word"} for key in KEYS]
    pq.write_table(pa.Table.from_pylist(rows), "data/captions/captions.parquet")

    def write(**columns):
        pq.write_table(pa.table({"TEXT": ["a"] * 5, **columns}), "data/source/metadata.parquet")
        return CaptionRows(tmp_path / "data/captions/captions.parquet")

    return write


def test_images_that_come_more_than_once_are_facts_by_their_keys(listed):
    rows = listed(repeats=pa.array([9, 10, 9, 1, 3], pa.int32()))
    assert has_repeats() and read_repeats(rows) == {"repeats": {"000000000": 10, "000010000": 3}}


def test_a_list_without_the_column_has_no_such_fact(listed):
    assert read_repeats(listed()) == {} and not has_repeats()
