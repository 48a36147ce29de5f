import json
import random

import numpy as np
import pytest

from raphael.base.records import EDGES, MOMENTS, TOKEN_IDS, Records, RecordsError, RecordWriter
from raphael.base.stage import StageError

FIELDS = {MOMENTS: ("float16", (8, 4, 4)), TOKEN_IDS: ("int32", (6,)), EDGES: ("uint8", (8, 8))}

FACTS = {"picture": {"sizes_px": [[32, 32]]}, "umlaut": "ä"}


def make(folder, count=10, seed=0, **settings):
    rng = np.random.default_rng(seed)
    arrays = {
        MOMENTS: rng.standard_normal((count, 8, 4, 4)).astype(np.float16),
        TOKEN_IDS: rng.integers(0, 1000, (count, 6)).astype(np.int32),
        EDGES: rng.integers(0, 256, (count, 8, 8)).astype(np.uint8),
    }
    keys = [f"{i:09d}" for i in range(count)]
    with RecordWriter(folder, FIELDS, FACTS, **settings) as writer:
        for part in (slice(0, 3), slice(3, count)):
            writer.append(keys[part], {name: array[part] for name, array in arrays.items()})
    return keys, arrays


def test_records_come_back_as_they_were_written(tmp_path):
    keys, arrays = make(tmp_path)
    records = Records(tmp_path)
    assert len(records) == 10 and records.keys == keys
    assert records.facts == FACTS and records.bucket_counts == (10,)
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


WIDE = {MOMENTS: ("float16", (8, 4, 6)), TOKEN_IDS: ("int32", (6,)), EDGES: ("uint8", (8, 12))}
EMPTY = {MOMENTS: ("float16", (8, 6, 4)), TOKEN_IDS: ("int32", (6,)), EDGES: ("uint8", (12, 8))}


def make_buckets(folder, shard_records=4, **settings):
    """19 records that come by turns to a square and a wide bucket, in shards of 4; a third bucket stays empty."""
    rng = np.random.default_rng(1)
    buckets = {"16x16": FIELDS, "24x16": EMPTY, "16x24": WIDE}
    written = {name: ([], {field: [] for field in FIELDS}) for name in buckets}
    with RecordWriter(folder, buckets, {}, shard_records, **settings) as writer:
        for part, name in enumerate(["16x16", "16x24", "16x16", "16x24"]):
            count = (5, 3, 1, 10)[part]
            keys = [f"{part}-{row}" for row in range(count)]
            arrays = {
                field: rng.integers(0, 200, (count, *shape)).astype(dtype)
                for field, (dtype, shape) in buckets[name].items()
            }
            writer.append(keys, arrays, name)
            written[name][0].extend(keys)
            for field in FIELDS:
                written[name][1][field].extend(arrays[field])
    return written


def test_buckets_lie_one_after_the_other_whatever_the_order_of_writing(tmp_path):
    written = make_buckets(tmp_path)
    records = Records(tmp_path)
    assert [(bucket.name, bucket.start, bucket.count) for bucket in records.buckets] == [
        ("16x16", 0, 6), ("24x16", 6, 0), ("16x24", 6, 13)
    ]  # fmt: skip
    assert records.keys == written["16x16"][0] + written["16x24"][0] and records.bucket_counts == (6, 0, 13)
    for name, order in (("16x16", [5, 0, 3, 3]), ("16x24", [18, 6, 9, 10, 14, 17, 6])):
        start = 0 if name == "16x16" else 6
        for field, batch in records.batch(order).items():
            np.testing.assert_array_equal(batch, np.stack([written[name][1][field][i - start] for i in order]))


def test_a_batch_across_buckets_or_out_of_range_is_refused(tmp_path):
    make_buckets(tmp_path)
    records = Records(tmp_path)
    with pytest.raises(ValueError, match="from the buckets 16x16, 16x24, expected one bucket"):
        records.batch([5, 6])
    for index in (-1, 19):
        with pytest.raises(ValueError, match="expected 0 to 18"):
            records.batch([index])


def test_the_size_of_the_shards_changes_the_files_and_not_the_records(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "many", shard_records=3)
    assert len(list((tmp_path / "one").glob("*.bin"))) == 3 and len(list((tmp_path / "many").glob("*.bin"))) == 12
    one, many = (Records(tmp_path / name).batch([9, 2, 3, 0, 5]) for name in ("one", "many"))
    for name in FIELDS:
        np.testing.assert_array_equal(one[name], many[name])


def test_writing_again_leaves_no_shard_of_before(tmp_path):
    make(tmp_path, shard_records=2)
    make(tmp_path, count=3, shard_records=2)
    Records(tmp_path).check()
    assert len(list(tmp_path.glob("*.bin"))) == 6


@pytest.mark.parametrize(("hashed_whole", "most_files"), [(64, 384), (64, 3), (0, 384), (0, 3)])
def test_one_flipped_bit_anywhere_is_found_before_the_record_is_used_and_names_its_file(
    tmp_path, hashed_whole, most_files
):
    """200 bits, each file's share by its size and one at least; a reader that goes through all keys and records. With a
    hash for each shard and for each record, through maps and through files."""
    make_buckets(tmp_path, hashed_whole=hashed_whole)
    files = [path for path in sorted(tmp_path.iterdir()) if path.stat().st_size]  # an empty bucket has empty hashes
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(0)
    chosen = files + rng.choices(files, sizes, k=200 - len(files))
    found = 0
    for path in chosen:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(RecordsError, match=path.name):
            records = Records(tmp_path, most_files=most_files)
            records.batch(range(6)), records.batch(range(6, 19)), list(records.keys)
        found += 1
        path.write_bytes(whole)
    assert found == 200 and len({path.name.split(".")[-1] for path in chosen}) == 3  # bin, txt, json
    Records(tmp_path).check()


def test_a_shard_is_hashed_when_it_is_first_read_and_not_again(tmp_path, monkeypatch):
    make_buckets(tmp_path)
    records, hashed = Records(tmp_path), []
    real = Records._compare
    monkeypatch.setattr(Records, "_compare", lambda self, file, data: hashed.append(file) or real(self, file, data))
    for order in ([10, 11], [13, 10], [12, 18]):
        records.batch(order)
    assert hashed == [f"16x24.0000{shard}.{name}.bin" for shard in (1, 3) for name in sorted(FIELDS)]


def test_the_manifest_has_both_hashes_of_every_shard(tmp_path):
    import hashlib

    import xxhash

    make_buckets(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shards = {path.name: path.read_bytes() for path in tmp_path.glob("*.bin")}
    assert manifest["facts"]["xxh3_128"] == {name: xxhash.xxh3_128_hexdigest(data) for name, data in shards.items()}
    for name, data in shards.items():
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_without_hashes_sizes_are_compared_still(tmp_path):
    make(tmp_path)
    path = tmp_path / "all.00000.edges.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    quick = Records(tmp_path, verify=False)
    quick.batch([0])
    with pytest.raises(RecordsError, match="edges.bin: damaged"):
        quick.check()
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
    with pytest.raises(ValueError, match="got bucket 'tall', expected one of all"):
        writer.append(["a", "b"], arrays, "tall")
    writer.append(["a", "b"], arrays)
    with pytest.raises(ValueError, match="'b' twice"):
        writer.append(["c", "b"], arrays)
    with pytest.raises(ValueError, match="got bucket None, expected one of 16x16, 16x24"):
        RecordWriter(tmp_path / "two", {"16x16": FIELDS, "16x24": WIDE}, {}).append(["a", "b"], arrays)


def test_no_records_at_all_is_a_data_set_too(tmp_path):
    with RecordWriter(tmp_path, FIELDS, {}):
        pass
    records = Records(tmp_path)
    assert len(records) == 0 and records.batch([])[MOMENTS].shape == (0, 8, 4, 4)
