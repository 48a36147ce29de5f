"""Objects are whole or not there, whatever the network does; what goes wrong for good is one sentence."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from truth.s3_server import BUCKET, FaultyProxy, at_random, environment

from raphael.base.store import objects
from raphael.base.store.address import check_address
from raphael.base.store.objects import DamagedObject, MissingObject, Store, StoreError

ADDRESS = f"s3://{BUCKET}/a/prefix"


def payload(number: int, size: int) -> bytes:
    return np.random.default_rng(number).bytes(size)


def sent(store: Store, folder, name: str, data: bytes) -> str:
    path = folder / "sent"
    path.write_bytes(data)
    store.put(path, name)
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["s3", "file"])
def store(request, tmp_path):
    """The same rules of a bucket and of a folder."""
    if request.param == "file":
        return Store(f"file://{tmp_path}/bucket")
    request.getfixturevalue("s3")
    return Store(ADDRESS)


@pytest.mark.parametrize("size", [0, 1, 1000, 3 << 20])
def test_what_is_sent_comes_back(store, tmp_path, monkeypatch, size):
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1 << 20)
    data = payload(1, size)
    digest = sent(store, tmp_path, "x/object", data)
    store.get("x/object", tmp_path / "back", size, "sha256", digest)
    assert (tmp_path / "back").read_bytes() == data and store.size("x/object") == size
    assert {name: entry.bytes for name, entry in store.entries("x").items()} == {"object": size}


def test_what_is_removed_is_gone_and_what_was_never_there_is_no_fault(store, tmp_path):
    for name in ("x/one", "x/y/two", "z/three"):
        sent(store, tmp_path, name, name.encode())
    assert set(store.entries("x")) == {"one", "y/two"} and store.read("x/y/two") == b"x/y/two"
    store.remove("x/one", "x/nobody")
    store.remove_folder("x")
    store.remove_folder("nothing")
    assert store.entries("x") == {} and store.size("x/y/two") is None and set(store.entries("z")) == {"three"}
    with pytest.raises(MissingObject, match="x/one: no such object; run what makes it again"):
        store.read("x/one")


def test_a_file_of_many_parts_is_there_whole_or_not_at_all(s3, tmp_path):
    """Arrow sends 10 MB a part; the last part is cut off every time, so that the object never is."""
    data = payload(2, 12 << 20)
    with FaultyProxy(s3.port, lambda n, method, path: "") as proxy, environment(proxy.url):
        digest = sent(Store(ADDRESS), tmp_path, "large", data)
        assert sum("partNumber" in path for _, path, _ in proxy.seen) == 2
    assert hashlib.sha256(s3.value("a/prefix/large")).hexdigest() == digest
    s3.fresh()
    lose = lambda n, method, path: "cut request" if "partNumber=2" in path else ""  # noqa: E731
    with FaultyProxy(s3.port, lose) as proxy, environment(proxy.url), pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "WAITS_S", (0.01,))
        with pytest.raises(StoreError, match=r"no answer that counts in 2 attempts .* 'large'"):
            sent(Store(ADDRESS), tmp_path, "large", data)
    assert s3.names() == [] and proxy.count("cut request") >= 2


@pytest.mark.parametrize("seed", range(3))
def test_through_a_network_that_fails_the_same_bytes_come_and_go(s3, tmp_path, monkeypatch, seed):
    """A third of all requests fails, in six ways."""
    monkeypatch.setattr(objects, "BLOCK_BYTES", 40_000)
    with FaultyProxy(s3.port, at_random(0.33, seed)) as proxy, environment(proxy.url):
        store, digests = Store(ADDRESS), {}
        for number in range(12):
            data = payload(number, 10_000 * number)
            digests[f"{number:02d}"] = (len(data), sent(store, tmp_path, f"{number:02d}", data))
        assert {name: entry.bytes for name, entry in store.entries("").items()} == {
            name: size for name, (size, _) in digests.items()
        }
        for name, (size, digest) in digests.items():
            store.get(name, tmp_path / name, size, "sha256", digest)
    for name, (_, digest) in digests.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
        assert hashlib.sha256(s3.value(f"a/prefix/{name}")).hexdigest() == digest
    assert len(s3.names()) == 12
    assert sum(kind != "" for _, _, kind in proxy.seen) >= 10
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_a_server_that_is_away_for_a_while_is_waited_for(s3, tmp_path):
    with FaultyProxy(s3.port, lambda n, method, path: "closed" if n < 5 else "") as proxy, environment(proxy.url):
        store = Store(ADDRESS)
        store.expect()
        assert proxy.count("closed") == 5


def test_a_connection_that_falls_silent_is_given_up_and_asked_again(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "SILENT_S", 1.0)
    digest = sent(Store(ADDRESS), tmp_path, "object", b"some bytes")
    once = []

    def silent(number, method, path):
        if method == "GET" and not once:
            once.append(path)
            return "silent"
        return ""

    with FaultyProxy(s3.port, silent) as proxy, environment(proxy.url):
        Store(ADDRESS).get("object", tmp_path / "back", 10, "sha256", digest)
        assert sum(method == "GET" for method, _, _ in proxy.seen) >= 2
    assert (tmp_path / "back").read_bytes() == b"some bytes"


def test_a_download_that_was_damaged_on_its_way_is_asked_for_again(s3, tmp_path):
    twice = []

    def flip(number, method, path):
        if method == "GET" and len(twice) < 2:
            twice.append(path)
            return "flipped"
        return ""

    with FaultyProxy(s3.port, flip) as proxy, environment(proxy.url):
        digest = sent(Store(ADDRESS), tmp_path, "object", b"some bytes")
        Store(ADDRESS).get("object", tmp_path / "back", 10, "sha256", digest)
    assert (tmp_path / "back").read_bytes() == b"some bytes" and proxy.count("flipped") == 2


@pytest.mark.parametrize(
    ("other", "words"),
    [(b"some bytez", r"got sha256 \w+\.\.\., expected \w+\.\.\.; remove it"), (b"some", "got 4 bytes, expected 10")],
)
def test_an_object_with_other_bytes_is_named_and_nothing_of_it_stays_here(s3, tmp_path, other, words):
    digest = sent(Store(ADDRESS), tmp_path, "object", b"some bytes")
    s3.change("a/prefix/object", other)
    with pytest.raises(DamagedObject, match=f"^s3://{BUCKET}/a/prefix/object: damaged: {words}"):
        Store(ADDRESS).get("object", tmp_path / "back", 10, "sha256", digest)
    assert sorted(os.listdir(tmp_path)) == ["sent"]


def test_a_bucket_that_is_not_there_is_one_sentence(s3, tmp_path):
    absent = Store("s3://nobodys/prefix")
    said = "^s3://nobodys/prefix: no such bucket: nobodys; make it, or set pipeline.storage"
    for ask in (
        absent.expect,
        lambda: absent.read("object"),
        lambda: sent(absent, tmp_path, "object", b"bytes"),
        lambda: absent.put_bytes(b"bytes", "object"),
    ):
        with pytest.raises(StoreError, match=said):
            ask()


def test_storage_without_permission_is_one_sentence_and_is_not_tried_again(s3, tmp_path):
    with FaultyProxy(s3.port, lambda n, method, path: "denied") as proxy, environment(proxy.url):
        store = Store(ADDRESS)
        for ask in (store.expect, lambda: store.entries("x"), lambda: sent(store, tmp_path, "object", b"bytes")):
            before = len(proxy.seen)
            with pytest.raises(StoreError, match=f"^s3://{BUCKET}/a/prefix: access denied for .*AWS_ACCESS_KEY_ID"):
                ask()
            assert len(proxy.seen) <= before + 2
    assert s3.names() == []


def test_a_server_that_does_not_come_back_is_one_sentence(s3, monkeypatch):
    with FaultyProxy(s3.port, lambda n, method, path: "503") as proxy, environment(proxy.url):
        monkeypatch.setattr(objects, "WAITS_S", (0.01, 0.01))
        with pytest.raises(StoreError, match=r"no answer that counts in 3 attempts over 0 s .* the same command"):
            Store(ADDRESS).put_bytes(b"bytes", "object")
        assert len(proxy.seen) == 3


@pytest.mark.parametrize(
    "address", ["bucket/x", "s3://", "http://host/x", "file://x", "s3://key:secret@bucket/x", "s3://bucket/x?key=1"]
)
def test_what_is_no_address_is_refused_and_so_are_credentials_in_one(address):
    with pytest.raises(ValueError, match="expected s3://bucket/prefix, gs://bucket/prefix or file:///folder; cred"):
        check_address(address)
