"""Records in a store are those of the folder: the same hash, the same batches in the same order, within a bounded
cache, whatever the network does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from truth.s3_server import FaultyProxy, at_random, environment
from truth.stored_records import COUNT, FIELDS, RECORD_BYTES, SHARD, published, write_records
from truth.toy_training import LOOP, ToyData, ToyObjective, fingerprint

from raphael.base.manifest import ManifestError
from raphael.base.record_files.stored import Shipping, address_of
from raphael.base.records import FORM, Records, RecordWriter
from raphael.base.store.cache import CacheError
from raphael.base.store.objects import DamagedObject, MissingObject
from raphael.train.batches import Batches
from raphael.train.heldout import Subset, split
from raphael.train.loop import train

STORAGE = "s3://pictures/home"
SHARD_BYTES = SHARD * RECORD_BYTES  # the largest file
LIMIT = int(2.5 * SHARD_BYTES)  # of the cache: room for a third


@pytest.fixture
def local(tmp_path):
    return Records(write_records(tmp_path / "local"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPHAEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RAPHAEL_CACHE_GB", str(LIMIT / 1e9))
    return tmp_path / "cache/shards"


def bytes_in(folder):
    """On disk, whole or on their way; while nobody makes room. A file that gets its name meanwhile counts once."""
    sizes = {}
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(file.path)
                sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_the_store_has_every_file_once_under_its_hash_and_the_folder_only_the_manifest(local, s3, tmp_path, cache):
    folder = write_records(tmp_path / "stored", STORAGE)
    assert sorted(os.listdir(folder)) == ["manifest.json", "storage.json"]
    assert (folder / "manifest.json").read_bytes() == (local.folder / "manifest.json").read_bytes()
    assert address_of(folder) == f"{STORAGE}/records"
    objects = {f"home/records/objects/{entry['sha256']}" for entry in local.manifest["files"].values()}
    assert set(s3.names()) == objects | {f"home/records/manifests/{local.sha256}.json"}
    for name, entry in local.manifest["files"].items():
        assert s3.value(f"home/records/objects/{entry['sha256']}") == (local.folder / name).read_bytes()
    stored = Records(folder)
    assert stored.sha256 == local.sha256 and stored.keys == local.keys and stored.facts == local.facts


def test_writing_the_same_again_sends_nothing_but_the_manifest(s3, tmp_path):
    with FaultyProxy(s3.port, lambda n, method, path: "") as proxy, environment(proxy.url):
        write_records(tmp_path / "one", STORAGE)
        before = len(proxy.seen)
        write_records(tmp_path / "two", STORAGE)
        sent = [path for method, path, _ in proxy.seen[before:] if method == "PUT"]
    assert len(sent) == 1 and "/manifests/" in sent[0]


@pytest.mark.parametrize(("kind", "steps"), [("file", 60), ("s3", 12)])
def test_a_training_reads_the_batches_of_the_folder_and_its_cache_stays_below_its_bound(
    local, tmp_path, cache, request, kind, steps
):
    if kind == "s3":
        folder = published(request.getfixturevalue("s3"), tmp_path, STORAGE)
    else:
        folder = write_records(tmp_path / "stored", f"file://{tmp_path}/disk")
    stored, order = Records(folder), Batches(7, COUNT, 12, buckets=local.bucket_counts)
    for number in range(steps):
        _, indices = order.own(number)
        same(local.batch(indices), stored.batch(indices))
        stored.ahead(order.own(number + 1)[1])
        assert bytes_in(cache) <= LIMIT
    files = sum(entry["bytes"] for entry in local.manifest["files"].values())
    assert files > 2 * LIMIT, "not all of it fits"


def test_a_training_ends_in_the_same_checkpoint(s3, tmp_path, cache):
    toy, fields = ToyData(), {"x": ("float32", (6,)), "kind": ("int64", ()), "index": ("int64", ())}
    ends = {}
    for name, ship in (("local", None), ("stored", Shipping(STORAGE, tmp_path / "stored"))):
        with RecordWriter(tmp_path / name, fields, {}, 20, ship=ship) as writer:
            writer.append(toy.keys, toy.batch(np.arange(len(toy))))
        if ship is not None:
            ship.publish(FORM)
        checkpoints, loop = tmp_path / f"{name}-checkpoints", replace(LOOP, num_images=96)
        train(ToyObjective(), Records(tmp_path / name), loop, 7, folder=checkpoints)
        ends[name] = fingerprint(checkpoints)
    assert ends["stored"] == ends["local"] and len(ends["local"]) >= 2


def test_the_worlds_ranks_side_by_side_read_what_one_reads(local, s3, tmp_path, cache):
    folder = published(s3, tmp_path, STORAGE)
    whole = Batches(3, COUNT, 12, buckets=local.bucket_counts)
    ranks = [(Records(folder), Batches(3, COUNT, 12, rank, 2, local.bucket_counts)) for rank in range(2)]
    for number in range(8):
        parts = [records.batch(batches.own(number)[1]) for records, batches in ranks]
        together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        same(together, local.batch(whole.everyone(number)[1]))


def test_held_out_records_are_the_same_ones_and_are_fetched_ahead_too(local, s3, tmp_path, cache):
    stored = Records(published(s3, tmp_path, STORAGE))
    (train, out), (its_train, its_out) = split(local, 50), split(stored, 50)
    assert isinstance(its_out, Subset) and its_train.sha256 == train.sha256 and list(its_out.keys) == list(out.keys)
    its_train.ahead(np.arange(12))
    same(train.batch(np.arange(12)), its_train.batch(np.arange(12)))
    train.ahead(np.arange(12))  # here there is nothing to fetch


@pytest.mark.parametrize("seed", range(2))
def test_through_a_network_that_fails_nothing_is_lost_or_counted_twice(local, s3, tmp_path, cache, seed):
    with FaultyProxy(s3.port, at_random(0.2, seed)) as proxy, environment(proxy.url):
        folder = write_records(tmp_path / "stored", STORAGE)
        stored = Records(folder)
        draw = random.Random(seed)
        for bucket in stored.buckets:
            rows = draw.sample(range(bucket.start, bucket.start + bucket.count), 60)
            same(local.batch(rows), stored.batch(rows))
    assert sum(kind != "" for _, _, kind in proxy.seen) >= 20
    assert stored.sha256 == local.sha256 and len(s3.names()) == len(local.manifest["files"]) + 1


def test_a_shard_that_is_fetched_ahead_is_there_when_it_is_read(s3, tmp_path, cache):
    folder = published(s3, tmp_path, STORAGE)
    with FaultyProxy(s3.port, lambda n, method, path: "") as proxy, environment(proxy.url):
        stored = Records(folder)
        stored.ahead(range(10))
        stored.stored.pool.shutdown(wait=True)
        stored.stored.pool = None
        asked = len(proxy.seen)
        stored.batch(range(10))
        assert asked and len(proxy.seen) == asked


def test_what_one_process_fetched_the_next_one_reads_unless_it_was_damaged_meanwhile(local, s3, tmp_path, cache):
    folder = published(s3, tmp_path, STORAGE)
    Records(folder).batch(range(10))
    (fetched,) = [file for file in cache.iterdir() if file.stat().st_size == SHARD * 8 * 4 * 4 * 2]
    with FaultyProxy(s3.port, lambda n, method, path: "") as proxy, environment(proxy.url):
        same(Records(folder).batch(range(10)), local.batch(range(10)))
        assert proxy.seen == []
        data = bytearray(fetched.read_bytes())
        data[5] ^= 1
        fetched.write_bytes(data)
        same(Records(folder).batch(range(10)), local.batch(range(10)))
        assert any(fetched.name in path for _, path, _ in proxy.seen)


def test_records_open_by_their_manifests_address(local, s3, tmp_path, cache):
    published(s3, tmp_path, STORAGE)
    address = f"{STORAGE}/records/manifests/{local.sha256}.json"
    opened = Records(address)
    same(opened.batch(range(5)), local.batch(range(5)))
    assert opened.keys == local.keys
    opened.check()


def test_half_a_manifest_is_one_sentence_and_leaves_nothing(local, s3, tmp_path, cache):
    published(s3, tmp_path, STORAGE)
    name = f"home/records/manifests/{local.sha256}.json"
    whole = s3.value(name)
    s3.change(name, whole[: len(whole) // 2])
    with pytest.raises(ManifestError, match=rf"^s3://pictures/{name}: not whole \(.*damaged.*\); run the stage encode"):
        Records(f"s3://pictures/{name}")
    assert not list((tmp_path / "cache/manifests").glob("*/*.json"))
    folder = published(s3, tmp_path / "other", STORAGE, seed=1)
    s3.change(name, (folder / "manifest.json").read_bytes())
    with pytest.raises(ManifestError, match="not whole .got a manifest of"):
        Records(f"s3://pictures/{name}")
    (folder / "manifest.json").write_bytes(whole[:500])
    with pytest.raises(ManifestError, match="damaged"):
        Records(folder)
    (tmp_path / "stored/storage.json").write_text("{")
    with pytest.raises(ManifestError, match="storage.json: damaged; restore it"):
        Records(tmp_path / "stored")


def test_a_shard_whose_hash_differs_and_one_that_is_gone_are_one_sentence(local, s3, tmp_path, cache):
    folder = published(s3, tmp_path, STORAGE)
    entry = local.manifest["files"]["16x16.00001.moments.bin"]
    name = f"home/records/objects/{entry['sha256']}"
    data = bytearray(s3.value(name))
    data[7] ^= 1
    s3.change(name, bytes(data))
    with pytest.raises(DamagedObject, match=f"^s3://pictures/{name}: damaged: got sha256"):
        Records(folder).batch([SHARD + 1])
    same(Records(folder).batch([1]), local.batch([1]))
    s3.change(name, bytes(data[:-10]))
    with pytest.raises(DamagedObject, match=f"got {entry['bytes'] - 10} bytes, expected {entry['bytes']}"):
        Records(folder).batch([SHARD + 1])
    s3.fresh()
    with pytest.raises(MissingObject, match=r"objects/\w+: no such object; run what makes it again"):
        Records(folder).batch([2 * SHARD])
    assert not [file for file in os.listdir(cache) if file.startswith(".") and file != ".lock"]


def test_a_cache_that_cannot_hold_a_shard_says_so(s3, tmp_path, cache, monkeypatch):
    folder = published(s3, tmp_path, STORAGE)
    monkeypatch.setenv("RAPHAEL_CACHE_GB", str(SHARD_BYTES / 3 / 1e9))
    with pytest.raises(CacheError, match="to hold at once, expected less than RAPHAEL_CACHE_GB"):
        Records(folder).batch([0])


def test_a_killed_writing_has_no_manifest_anywhere(s3, tmp_path, monkeypatch):
    from raphael.base.record_files import stored

    class Killed(BaseException):
        pass

    sent = []

    def dies(self, name):
        sent.append(name)
        if len(sent) == 5:
            raise Killed
        return real(self, name)

    real = stored.Shipping.__call__
    monkeypatch.setattr(stored.Shipping, "__call__", dies)
    with pytest.raises(Killed):
        write_records(tmp_path / "stored", STORAGE)
    assert not (tmp_path / "stored/manifest.json").exists() and not s3.names("home/records/manifests")
    monkeypatch.undo()


def test_a_folder_under_the_same_rules_serves_as_a_store(local, tmp_path, cache):
    folder = write_records(tmp_path / "stored", f"file://{tmp_path}/disk")
    stored = Records(folder)
    assert stored.sha256 == local.sha256 and json.loads((folder / "storage.json").read_text())["address"].startswith(
        "file"
    )
    same(stored.batch(range(30)), local.batch(range(30)))
    assert FORM == json.loads((folder / "manifest.json").read_text())["format"] and len(FIELDS) == 2
