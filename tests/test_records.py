import random

import numpy as np
import pytest

from raphael.records import EDGES, MOMENTS, TOKEN_IDS, Records, RecordsError, RecordWriter
from raphael.stage import StageError

FIELDS = {MOMENTS: ("float16", (8, 4, 4)), TOKEN_IDS: ("int32", (6,)), EDGES: ("uint8", (8, 8))}


def make(folder, count=10, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        MOMENTS: rng.standard_normal((count, 8, 4, 4)).astype(np.float16),
        TOKEN_IDS: rng.integers(0, 1000, (count, 6)).astype(np.int32),
        EDGES: rng.integers(0, 256, (count, 8, 8)).astype(np.uint8),
    }
    keys = [f"{i:09d}" for i in range(count)]
    with RecordWriter(folder, FIELDS, {"picture": {"height_px": 32}, "umlaut": "ä"}) as writer:
        for part in (slice(0, 3), slice(3, count)):
            writer.append(keys[part], {name: array[part] for name, array in arrays.items()})
    return keys, arrays


def test_records_come_back_as_they_were_written(tmp_path):
    keys, arrays = make(tmp_path)
    records = Records(tmp_path)
    assert len(records) == 10 and records.keys == keys
    assert records.facts == {"picture": {"height_px": 32}, "umlaut": "ä"}
    assert records.fields == FIELDS
    order = [7, 0, 7, 3]
    for name, batch in records.batch(order).items():
        assert batch.dtype == arrays[name].dtype
        np.testing.assert_array_equal(batch, arrays[name][order])


def test_a_batch_is_a_copy_that_may_be_changed(tmp_path):
    _, arrays = make(tmp_path)
    records = Records(tmp_path)
    records.batch([1])[EDGES][:] = 0
    np.testing.assert_array_equal(records.batch([1])[EDGES], arrays[EDGES][[1]])


def test_the_same_records_have_the_same_bytes_and_hash(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert Records(tmp_path / "a").sha256 == Records(tmp_path / "b").sha256
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    make(tmp_path)
    rng = random.Random(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(RecordsError, match=path.name):
                Records(tmp_path)
        path.write_bytes(whole)
    Records(tmp_path)


def test_the_quick_check_looks_at_sizes_only(tmp_path):
    make(tmp_path)
    path = tmp_path / "edges.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    Records(tmp_path, verify=False)
    path.write_bytes(data[:-1])
    with pytest.raises(RecordsError, match="edges.bin: got 639 bytes, expected 640"):
        Records(tmp_path, verify=False)


def test_an_unfinished_folder_does_not_open(tmp_path):
    make(tmp_path)
    with pytest.raises(ZeroDivisionError):
        with RecordWriter(tmp_path, FIELDS, {}):
            raise ZeroDivisionError
    with pytest.raises(StageError, match="unfinished"):
        Records(tmp_path)
    with pytest.raises(ValueError, match="absent"):
        Records(tmp_path / "nowhere")


def test_wrong_arrays_and_keys_are_refused_by_name(tmp_path):
    _, arrays = make(tmp_path / "other", count=2)
    writer = RecordWriter(tmp_path / "records", FIELDS, {})
    with pytest.raises(ValueError, match="moments: got float32"):
        writer.append(["a", "b"], {**arrays, MOMENTS: arrays[MOMENTS].astype(np.float32)})
    with pytest.raises(ValueError, match=r"edges: got uint8 \(2, 8, 8\), expected uint8 \(3, 8, 8\)|moments"):
        writer.append(["a", "b", "c"], arrays)
    with pytest.raises(ValueError, match="got fields"):
        writer.append(["a", "b"], {MOMENTS: arrays[MOMENTS]})
    with pytest.raises(ValueError, match="'a' twice"):
        writer.append(["a", "a"], arrays)


def test_no_records_at_all_is_a_data_set_too(tmp_path):
    with RecordWriter(tmp_path, FIELDS, {}):
        pass
    records = Records(tmp_path)
    assert len(records) == 0 and records.batch([])[MOMENTS].shape == (0, 8, 4, 4)
