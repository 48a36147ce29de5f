import random
from types import SimpleNamespace

import pytest

from data_pipeline.common import shard_rows
from data_pipeline.common.shard_rows import shard_tables
from raphael.base.stage import StageError


def test_two_hundred_thousand_shards_come_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    """Names alone: so many files take two minutes to make."""
    count = 200_000
    names = [f"{number:05d}{suffix}" for number in range(count) for suffix in (".tar", ".parquet")]
    random.Random(0).shuffle(names)
    monkeypatch.setattr(shard_rows.os, "scandir", lambda folder: [SimpleNamespace(name=name) for name in names])
    tables = shard_tables(tmp_path)
    assert len(tables) == count and all(int(table.stem) == number for number, table in enumerate(tables))
    names.remove("123456.tar")
    with pytest.raises(StageError, match="shard 123456 is not whole"):
        shard_tables(tmp_path)
    names.remove("10001.parquet")
    with pytest.raises(StageError, match="shard 10001 is not whole"):
        shard_tables(tmp_path)


def test_a_table_of_another_name_is_no_shard(tmp_path):
    for name in ("00000.tar", "00000.parquet", "abcdef.tar", "abcdef.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(StageError, match="shard 00001 is not whole"):
        shard_tables(tmp_path)
