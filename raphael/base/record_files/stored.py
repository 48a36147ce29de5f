"""Records whose files lie in an object store: written there shard by shard, read through a cache of this machine.

    data/records/
      manifest.json      as of records that lie here: the index of shards, and by its hash all of their bytes
      storage.json       the store's address
      captions.json
    s3://bucket/prefix/records/
      objects/<sha256>              a file of the manifest, under its hash: shards, keys, hashes of records
      manifests/<its sha256>.json   written last: records without one are not published

Objects are never changed, so a data set that was made again sends what is new and two runs that make the same one
write the same. DVC has the small folder; a checkout of it on another machine reads the same store.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raphael.base.files import file_sha256, written_whole
from raphael.base.manifest import NAME, ManifestError, read_manifest
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from raphael.base.record_files.shards import Mapped, OpenShards, Positioned
    from raphael.base.store.cache import ShardCache
    from raphael.base.store.objects import Store

STORAGE, FORM = "storage.json", "raphael-stored/1"
RECORDS, OBJECTS, MANIFESTS = "records", "objects", "manifests"
FETCHING = 4  # files at a time
ATTEMPTS = 5  # at a shard whose files others take away
Shard = TypeVar("Shard", bound="Mapped | Positioned")


class Shipping:
    """Where a RecordWriter's files go as each is finished; then `publish`."""

    def __init__(self, storage: str, folder: Path):
        """storage: of `pipeline`; folder: of the writer."""
        from raphael.base.store.objects import open_store

        self.store, self.folder = open_store(f"{storage.rstrip('/')}/{RECORDS}"), folder

    def __call__(self, name: str) -> dict[str, Any]:
        """Send a finished file, unless the store has it, and remove it here. What a manifest says of it."""
        path = self.folder / name
        entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        if self.store.size(of_object(entry["sha256"])) != entry["bytes"]:
            self.store.put(path, of_object(entry["sha256"]))
        path.unlink()
        return entry

    def publish(self, form: str) -> None:
        """The manifest, after all that it names; then the address, beside it."""
        sha256 = read_manifest(self.folder, form)["sha256"]
        self.store.put(self.folder / NAME, of_manifest(sha256))
        about = {"format": FORM, "address": self.store.address}
        with written_whole(self.folder / STORAGE) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def of_object(sha256: str) -> str:
    return f"{OBJECTS}/{sha256}"


def of_manifest(sha256: str) -> str:
    return f"{MANIFESTS}/{sha256}.json"


def address_of(folder: Path) -> str | None:
    """Of the store that has the records' files; None where they lie in the folder. Raises ManifestError."""
    try:
        about = json.loads((folder / STORAGE).read_bytes())
        if about["format"] != FORM:
            raise ValueError(about["format"])
        return str(about["address"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ManifestError(
            f"{folder / STORAGE}: damaged; restore it (dvc checkout {folder}) or run the stage encode again"
        ) from None


def attached(place: str | Path, form: str) -> Path:
    """The folder of records; of an address a folder of this machine's cache that reads them. Raises as `attach`."""
    if "://" not in (said := os.fspath(place)):
        return Path(place)
    from raphael.base.store.cache import machine_folder

    folder = machine_folder() / MANIFESTS / said.rpartition("/")[2].removesuffix(".json")
    if not (folder / STORAGE).is_file():
        attach(said, folder, form)
    return folder


def attach(address: str, folder: Path, form: str) -> None:
    """Make a folder that reads published records: `address` is that of a manifest, s3://.../manifests/<sha256>.json.

    Raises StoreError; ManifestError where the manifest is not whole or not of that name.
    """
    from raphael.base.store.objects import open_store

    home, _, name = address.rpartition(f"/{MANIFESTS}/")
    raw = open_store(home).read(f"{MANIFESTS}/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / NAME) as temporary:
        temporary.write_bytes(raw)
    try:
        got = read_manifest(folder, form)["sha256"]
        if f"{got}.json" != name:
            raise ManifestError(f"got a manifest of {got[:12]}...")
    except ManifestError as error:
        (folder / NAME).unlink()
        raise ManifestError(f"{address}: not whole ({error}); run the stage encode again, which writes it") from None
    with written_whole(folder / STORAGE) as temporary:
        temporary.write_text(json.dumps({"format": FORM, "address": home}, indent=1) + "\n", encoding="utf-8")


def withdraw(address: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Remove from the store, and from this machine's cache, what the manifest `old` names and `new` does not, then
    `old` itself. Records of another workspace that share it say what is missing. Raises StoreError."""
    from raphael.base.store.cache import machine_cache
    from raphael.base.store.objects import open_store

    store, cache = open_store(address), machine_cache()
    stay = {entry["sha256"] for entry in new["files"].values()}
    for entry in old["files"].values():
        if entry["sha256"] not in stay:
            store.remove(of_object(entry["sha256"]))
            cache.path(entry["sha256"]).unlink(missing_ok=True)
    if old["sha256"] != new["sha256"]:
        store.remove(of_manifest(old["sha256"]))


class StoredFiles:
    """The files of a manifest, fetched as they are asked for. Safe to use from several threads."""

    def __init__(self, address: str, manifest: dict[str, Any], cache: ShardCache | None = None):
        from raphael.base.store.cache import machine_cache
        from raphael.base.store.objects import open_store

        self.store: Store = open_store(address)
        self.manifest, self.cache = manifest, cache or machine_cache()
        self.names: dict[str, str] | None = None  # sha256 -> file; made when one is dropped
        self.pool: ThreadPoolExecutor | None = None
        self.coming: set[str] = set()
        self.guard = threading.Lock()

    def path(self, file: str) -> Path:
        """Where `take` puts it."""
        return self.cache.path(self._entry(file)["sha256"])

    def take(self, file: str) -> str:
        """The path of a file that is there and whole. Raises StoreError, CacheError."""
        entry, xxh3 = self._entry(file), self.manifest["facts"]["xxh3_128"].get(file, "")
        sha256, size = entry["sha256"], entry["bytes"]
        fetch = partial(self._fetch, sha256, size)
        return os.fspath(self.cache.take(sha256, size, xxh3, fetch))

    def opened(self, files: dict[str, str], kept: OpenShards, make: Callable[[dict[str, str]], Shard]) -> Shard:
        """A shard's files, opened: field -> file. kept: those that are open, by their files' names.

        What left the cache is closed, so that its disk is free. Raises StoreError, CacheError.
        """
        for gone in self._dropped():
            for key in [key for key in kept.open if gone in key]:
                kept.forget(key)
        key = tuple(files.values())
        if (shard := kept.get(key)) is not None:
            for file in key:
                self.cache.use(self._entry(file)["sha256"])
            return shard
        for _ in range(ATTEMPTS):
            paths = {name: self.take(file) for name, file in files.items()}
            with contextlib.suppress(FileNotFoundError):  # another process made room
                shard = make(paths)
                kept.put(key, shard)
                return shard
        raise self.cache.too_small(sum(self._entry(file)["bytes"] for file in key))

    def _dropped(self) -> Iterable[str]:
        """The files that left the cache since this was asked last."""
        while self.cache.dropped:
            if self.names is None:
                self.names = {entry["sha256"]: file for file, entry in self.manifest["files"].items()}
            if (file := self.names.get(self.cache.dropped.popleft())) is not None:  # else of other records
                yield file

    def ahead(self, files: Iterable[str]) -> None:
        """Begin to fetch files that will be asked for, as many as half of the cache holds. Errors are not told here:
        whoever asks for the file meets them."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(FETCHING, thread_name_prefix="shards")
        room = self.cache.most_bytes // 2
        for file in files:
            entry = self._entry(file)
            room -= entry["bytes"]
            if room < 0:
                return
            with self.guard:
                if file in self.coming or self.cache.is_there(entry["sha256"], entry["bytes"]):
                    continue
                self.coming.add(file)
            self.pool.submit(self._come, file)

    def _come(self, file: str) -> None:
        try:
            with contextlib.suppress(StageError, OSError):
                self.take(file)
        finally:
            with self.guard:
                self.coming.discard(file)

    def _fetch(self, sha256: str, size: int, into: Path) -> None:
        self.store.fill(of_object(sha256), into, size, "sha256", sha256)

    def _entry(self, file: str) -> dict[str, Any]:
        entry = self.manifest["files"].get(file)
        if entry is None:
            raise ManifestError(f"{self.store.address}: {file}: not in the manifest; run the stage encode again")
        return entry
