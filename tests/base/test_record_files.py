"""Keys, shards and hashes of records: read where they lie, a bounded number of files open."""

import os

import numpy as np
import pytest
import xxhash

from raphael.base.record_files import keys as keys_module
from raphael.base.record_files.keys import Chosen, Keys
from raphael.base.records import Records, RecordsError, RecordWriter

FIELDS = {"moments": ("float16", (2, 3, 3)), "label": ("int32", ()), "edges": ("uint8", (5,))}


def write(folder, count=50, shard_records=4, **settings):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 200, (count, *shape)).astype(dtype) for name, (dtype, shape) in FIELDS.items()}
    with RecordWriter(folder, FIELDS, {}, shard_records, **settings) as writer:
        writer.append([f"key {number}" for number in range(count)], arrays)
    return arrays


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("hashed_whole", [0, 64])
@pytest.mark.parametrize("most_files", [1, 3, 7, 384])
def test_records_are_the_same_however_many_files_may_be_open(tmp_path, hashed_whole, most_files):
    arrays = write(tmp_path, hashed_whole=hashed_whole)
    records, order = Records(tmp_path, most_files=most_files), np.random.default_rng(1).permutation(50)
    for start in range(0, 50, 8):
        part = order[start : start + 8]
        for name, batch in records.batch(part).items():
            assert batch.dtype == FIELDS[name][0]
            np.testing.assert_array_equal(batch, arrays[name][part])


@pytest.mark.parametrize("verify", [True, False])
def test_no_more_files_are_open_than_were_allowed_and_none_when_the_records_are_gone(tmp_path, verify):
    write(tmp_path, count=400, hashed_whole=0)
    before, most = descriptors(), 0
    records = Records(tmp_path, verify=verify, most_files=12)
    for start in range(0, 400, 25):
        records.batch(range(start, start + 25))
        most = max(most, descriptors() - before)
    assert 9 <= most <= 12 + verify  # the file of the records' hashes
    del records
    assert descriptors() == before


def test_few_shards_have_a_hash_each_and_many_have_one_for_each_record(tmp_path):
    arrays = write(tmp_path / "few", count=8, shard_records=4, hashed_whole=2)
    assert not list((tmp_path / "few").glob("*hashes*"))
    arrays = write(tmp_path / "many", count=9, shard_records=4, hashed_whole=2)
    found = np.fromfile(tmp_path / "many/all.hashes.bin", "<u8")
    naive = [
        xxhash.xxh3_64_intdigest(b"".join(arrays[name][row].tobytes() for name in sorted(FIELDS))) for row in range(9)
    ]
    assert found.tolist() == naive
    assert "all.hashes.bin" in Records(tmp_path / "many").manifest["files"]
    assert not list((tmp_path / "many").glob(".*"))


def test_the_shards_keys_and_manifest_of_few_shards_do_not_know_of_the_hashes(tmp_path):
    """Data sets of before have the same bytes."""
    write(tmp_path / "a")
    write(tmp_path / "b", hashed_whole=0)
    shared = {path.name for path in (tmp_path / "a").iterdir()} - {"manifest.json"}
    assert shared == {path.name for path in (tmp_path / "b").iterdir()} - {"manifest.json", "all.hashes.bin"}
    for name in shared:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_record_is_compared_each_time_it_is_read(tmp_path):
    write(tmp_path, hashed_whole=0)
    records = Records(tmp_path)
    records.batch([5, 6])
    path = tmp_path / "all.00001.edges.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1  # of record 5, the second of its shard
    with open(path, "r+b") as file:
        file.write(data)
    with pytest.raises(RecordsError, match="all.00001.edges.bin: damaged: the hash of record 5"):
        records.batch([5])
    records.batch([6])


@pytest.mark.parametrize("hashed_whole", [0, 64])
def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error_and_not_the_end_of_the_process(
    tmp_path, hashed_whole
):
    write(tmp_path, hashed_whole=hashed_whole)
    records = Records(tmp_path, most_files=3)
    records.batch([0])
    os.truncate(tmp_path / "all.00000.moments.bin", 20)
    with pytest.raises(RecordsError, match="all.00000.moments.bin: damaged: it ends before a record"):
        records.batch([1])
    (tmp_path / "all.00003.edges.bin").unlink()
    with pytest.raises(RecordsError, match="all.00003.edges.bin: no such file"):
        records.batch([12])


def test_keys_that_the_caller_knows_to_be_unique_are_not_held(tmp_path):
    with RecordWriter(tmp_path, {"label": ("int32", ())}, {}, unique=True) as writer:
        for key in ("a", "b"):
            writer.append([key], {"label": np.zeros(1, np.int32)})
        assert not writer.seen
    assert Records(tmp_path).keys == ["a", "b"]


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 50])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_keys_are_a_list_that_is_read_where_it_lies(tmp_path, monkeypatch, count, chunk):
    monkeypatch.setattr(keys_module, "LINES", 7)
    monkeypatch.setattr(keys_module, "CHUNK_BYTES", chunk)
    truth = [f"{'ä' * (number % 3)}{number}" for number in range(count)]
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"{key}\n" for key in truth), encoding="utf-8")
    asked = []
    keys = Keys(path, count, lambda: asked.append(True))
    assert len(keys) == count and not asked  # nothing was read
    assert keys == truth and list(keys) == truth and list(reversed(keys)) == truth[::-1]
    assert [keys[np.int64(number)] for number in range(count)] == truth and keys[-3:] == truth[-3:]
    assert keys != [*truth, "more"] and len(asked) == (count > 0)
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            keys[index]
    rows = np.arange(0, count, 2)
    assert Chosen(keys, rows) == truth[::2] and Chosen(keys, rows)[:2] == truth[::2][:2]
    short = Keys(path, count + 1, lambda: None)
    with pytest.raises(RecordsError, match=f"got {count} keys for {count + 1} records"):
        short[0]
