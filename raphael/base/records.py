"""The encoded data set on disk: fixed-size records in plain binary files, read by position.

    data/records/
      keys.txt                     one key per line, in the order of the records: bucket after bucket
      64x96.00000.moments.bin      shard 0 of the bucket 64x96: up to 4096 records of (2C, h, w) float16, C order
      64x96.00000.token_ids.bin    (N,) int32
      64x96.00000.edges.bin        (E, F) uint8
      64x96.00001.moments.bin      ...
      64x96.hashes.bin             of more than 64 shards: a hash for each record, uint64
      manifest.json                size, sha256 and xxh3 of every file, buckets with counts and fields; written last

The images of a bucket have one size, so its records have one shape; record i of the data set lies at a place that is
arithmetic. Raw VAE moments are stored, not latents: scaling and sampling are choices of the training. Shuffled records
come some 30 times as fast as webdataset takes them out of tars (benchmarks/records.py).

What is held in memory grows with shards, not with records, and the files that are open are bounded
(raphael/base/record_files): ten million records, a thousand million, open alike.

Two hashes: sha256 says which data set this is and is compared by `Records.check`; xxh3 (an order of magnitude faster)
finds damage before a record is used: of a shard (128 bits) when it is first read, where there are few; of every record
(64 bits) each time it is read, where there are many. It is no guard against someone who means harm; sha256 is.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from raphael.base.manifest import NAME, ManifestError, check_files, check_sizes, read_manifest, write_manifest
from raphael.base.record_files.growing import Growing
from raphael.base.record_files.hashes import HASH, RecordHashes, hashes_file, record_hash
from raphael.base.record_files.keys import Keys
from raphael.base.record_files.shards import MOST_FILES, Mapped, OpenShards, Positioned, Rows, row_bytes
from raphael.base.record_files.stored import StoredFiles, address_of, attached

FORM = "raphael-records/2"
KEYS = "keys.txt"
ONE_BUCKET = "all"  # its name where there is only one and nobody named it
SHARD_RECORDS = 4096
HASHED_WHOLE = 64  # shards: a data set of more has a hash for each record, for a first touch of all would take minutes

# Names of the fields. data_pipeline/encode/fields.py makes those that encode.fields names; who trains on them asks by
# `Records.require`. A record holds MOMENTS or PIXELS (raphael.net.latents.moments_of reads either).
MOMENTS = "moments"  # float16 (2C, h, w): raw mean and log-variance of the autoencoder's posterior
PIXELS = "pixels"  # uint8 (3, H, W)
TOKEN_IDS = "token_ids"  # int32 (N,)
TEXT = "text"  # float16 (N, D): the caption's tokens as the frozen text encoder gives them
TEXT_MASK = "text_mask"  # uint8 (N,): 1 on real tokens
EDGES = "edges"  # uint8 (E, F): probability of an edge times 255
LABEL = "label"  # int32 (): a class, an index into facts["label"]["classes"]; NO_LABEL where it has none
NO_LABEL = -1
SIZES = "sizes"  # int32 (6,): an image's sizes and crop in px, raphael/base/images/fit.py
CAPTIONS = "captions.json"  # beside the records: key -> caption

# Of a batch, not of a record: int64 (B,), which of train.settings.phases each sample is of (raphael/train/phases.py)
PHASE = "phase"

RecordsError = ManifestError
Fields = dict[str, tuple[str, tuple[int, ...]]]  # name -> (numpy dtype name, shape of one record)


def latent_shape(fields: Fields) -> tuple[int, ...]:
    """(C, h, w) of what is diffused, of records that hold `fields`."""
    if MOMENTS in fields:
        channels, *sides = fields[MOMENTS][1]
        return channels // 2, *sides
    return fields[PIXELS][1]


def shard_file(bucket: str, shard: int, name: str) -> str:
    return f"{bucket}.{shard:05d}.{name}.bin"


class RecordWriter:
    """Write a folder of records from nothing: `with RecordWriter(...) as writer: writer.append(keys, arrays)`.

    fields: name -> (numpy dtype name, shape of one record); of several buckets, bucket -> such a mapping. facts: what
    JSON can hold, stored in the manifest. hashed_whole: a data set of more shards gets a hash for each record. unique:
    the caller knows that no key comes twice; else all are held in memory to be compared. ship: takes each finished file
    away by its name and returns its entry of the manifest (record_files/stored.py). Records of an earlier writing are
    removed. Left by an exception, the folder gets no manifest and does not open.
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Fields | dict[str, Fields],
        facts: dict[str, Any],
        shard_records: int = SHARD_RECORDS,
        hashed_whole: int = HASHED_WHOLE,
        unique: bool = False,
        ship: Callable[[str], dict[str, Any]] | None = None,
    ):
        self.folder, self.facts, self.shard_records = Path(folder), facts, shard_records
        self.ship, self.shipped = ship, {}
        self.hashed_whole, self.unique = hashed_whole, unique
        several = all(isinstance(value, dict) for value in fields.values())
        buckets = fields if several else {ONE_BUCKET: fields}
        self.seen: set[str] = set()
        self.hashes: dict[str, Any] = {}  # of the shards, by file
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (self.folder / NAME, *self.folder.glob("*.bin")):
            old.unlink(missing_ok=True)
        self.buckets = {}
        for name, shapes in buckets.items():
            keys, hashes = self.folder / f".{name}.keys", self.folder / hashes_file(name)
            self.buckets[name] = Growing(shapes, keys, open(keys, "w+b"), open(hashes, "wb"))

    def append(self, keys: Sequence[str], arrays: dict[str, np.ndarray], bucket: str | None = None) -> None:
        """Add n records. arrays: field -> (n, *shape) of exactly the field's dtype. bucket: may be left out where there
        is one. Raises ValueError."""
        if bucket is None and len(self.buckets) == 1:
            (bucket,) = self.buckets
        if bucket not in self.buckets:
            raise ValueError(f"{self.folder}: got bucket {bucket!r}, expected one of {', '.join(self.buckets)}")
        growing = self.buckets[bucket]
        self._check(keys, arrays, growing.fields)
        if not self.unique:
            self.seen.update(keys)
        start = 0
        while start < len(keys):
            shard, within = divmod(growing.count, self.shard_records)
            if within == 0:
                self._open(bucket, growing, shard)
            count = min(len(keys) - start, self.shard_records - within)
            part = {name: np.ascontiguousarray(arrays[name][start : start + count]) for name in growing.fields}
            for name, array in part.items():
                growing.write(name, array.tobytes())
            rows = {name: row_bytes(array) for name, array in part.items()}
            growing.record_hashes.write(np.array([record_hash(rows, row) for row in range(count)], HASH).tobytes())
            growing.keys.write("".join(f"{key}\n" for key in keys[start : start + count]).encode("utf-8"))
            growing.count += count
            start += count

    def _check(self, keys: Sequence[str], arrays: dict[str, np.ndarray], fields: Fields) -> None:
        if set(arrays) != set(fields):
            raise ValueError(f"{self.folder}: got fields {sorted(arrays)}, expected {sorted(fields)}")
        for name, (dtype, shape) in fields.items():
            array, expected = arrays[name], (len(keys), *shape)
            if array.dtype != np.dtype(dtype) or array.shape != expected:
                raise ValueError(
                    f"{self.folder}: field {name}: got {array.dtype} {array.shape}, expected {dtype} {expected}"
                )
        here: set[str] = set()
        for key in keys:
            if key in self.seen or key in here or not key or "\n" in key:
                raise ValueError(
                    f"{self.folder}: got key {key!r} twice, empty or with a line break; expected unique names"
                )
            here.add(key)

    def _open(self, bucket: str, growing: Growing, shard: int) -> None:
        self._ship(*growing.close_shard())
        files = {name: shard_file(bucket, shard, name) for name in growing.fields}
        growing.files = {name: open(self.folder / file, "wb") for name, file in files.items()}
        growing.hashes = {name: xxhash.xxh3_128() for name in files}
        self.hashes |= {file: growing.hashes[name] for name, file in files.items()}

    def close(self) -> None:
        """Finish: write the keys and the manifest."""
        for growing in self.buckets.values():
            self._ship(*growing.close_shard())
        self._write_keys()
        shards = sum(-(-growing.count // self.shard_records) for growing in self.buckets.values())
        by_record = [hashes_file(name) for name in self.buckets]
        if shards <= self.hashed_whole:
            for file in by_record:
                (self.folder / file).unlink()
            by_record = []
        buckets = [
            {
                "name": name,
                "count": growing.count,
                "fields": {name: [dtype, list(shape)] for name, (dtype, shape) in growing.fields.items()},
            }
            for name, growing in self.buckets.items()
        ]
        hashes = {file: value.hexdigest() for file, value in self.hashes.items()}
        facts = {"buckets": buckets, "shard_records": self.shard_records, "xxh3_128": hashes, "facts": self.facts}
        self._ship(KEYS, *by_record)
        left = [file for file in (KEYS, *hashes, *by_record) if file not in self.shipped]
        write_manifest(self.folder, FORM, left, facts, self.shipped)

    def _ship(self, *files: str) -> None:
        for name in map(os.path.basename, files if self.ship is not None else ()):
            self.shipped[name] = self.ship(name)

    def _write_keys(self) -> None:
        """The keys of all buckets, one after the other."""
        with open(self.folder / KEYS, "wb") as file:
            for growing in self.buckets.values():
                growing.keys.seek(0)
                shutil.copyfileobj(growing.keys, file)
                growing.close()
                growing.keys_path.unlink()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            for growing in self.buckets.values():
                growing.close()


@dataclass(frozen=True)
class Bucket:
    """Records start .. start + count of the data set, all of one shape. hashes: of its records, where they are kept.
    verified: the shards that were compared with theirs, where not."""

    name: str
    start: int
    count: int
    fields: Fields
    hashes: RecordHashes | None = None
    verified: set[int] = field(default_factory=set, repr=False)


class Records:
    """An opened folder of records. The manifest is checked at once, and the sizes of all files; the keys when one is
    asked for, records before they are used.

    verify: compare what is read with its xxh3. Few shards: each when a record of it is first read, once in a process,
    about 0.1 s per GB. Many: every record, 2 us each. Else damage inside a shard goes unseen. most_files: open at once.

    Where the files lie in an object store (record_files/stored.py) shards come through a cache of this machine, each
    compared with its sha256 when it arrives. folder: may be the address of such records' manifest.

    Raises RecordsError (a StageError and a ValueError, one line that names the file) where one is absent, short or
    damaged; `batch` and `keys` do, too, and StoreError or CacheError of records in a store.
    """

    def __init__(self, folder: str | Path, verify: bool = True, most_files: int = MOST_FILES):
        self.folder, self.verify = attached(folder, FORM), verify
        self.place = os.fspath(self.folder)
        self.manifest = read_manifest(self.folder, FORM)
        address = address_of(self.folder)
        self.stored = StoredFiles(address, self.manifest) if address else None
        if self.stored is None:
            check_sizes(self.folder, self.manifest)
        self.sha256: str = self.manifest["sha256"]  # of the manifest, and so of everything
        about = self.manifest["facts"]
        self.facts: dict[str, Any] = about["facts"]
        self.shard_records: int = about["shard_records"]
        self.buckets: list[Bucket] = []
        start = 0
        for entry in about["buckets"]:
            fields = {name: (dtype, tuple(shape)) for name, (dtype, shape) in entry["fields"].items()}
            file = hashes_file(entry["name"])
            here = verify and self.stored is None and file in self.manifest["files"]  # a cache compares whole shards
            hashes = RecordHashes(self.folder / file) if here else None
            self.buckets.append(Bucket(entry["name"], start, entry["count"], fields, hashes))
            start += entry["count"]
        self.count = start
        # a function that knows these records would keep them, and their files, beyond their last use
        check = partial(check_files, self.folder, self.manifest, [KEYS])
        keys = (self.folder / KEYS, check)
        if self.stored is not None:
            keys = (self.stored.path(KEYS), partial(self.stored.take, KEYS))
        self.keys: Sequence[str] = Keys(keys[0], start, keys[1])
        self.ends = np.cumsum(self.bucket_counts)
        width = max([1, *(len(bucket.fields) for bucket in self.buckets)])
        files = sum(-(-bucket.count // self.shard_records) * len(bucket.fields) for bucket in self.buckets)
        self.kind: type[Mapped] | type[Positioned] = Mapped if files <= most_files else Positioned
        self.open = OpenShards(most_files // width)

    def __len__(self) -> int:
        return self.count

    @property
    def bucket_counts(self) -> tuple[int, ...]:
        """Records of each bucket, in the order of the records."""
        return tuple(bucket.count for bucket in self.buckets)

    @property
    def fields(self) -> Fields:
        """Of the first bucket; in others the images' shapes differ, the names and types do not."""
        return self.buckets[0].fields

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the records at `indices`, all of one bucket: field -> (len(indices), *shape). Raises ValueError."""
        rows = np.asarray(indices, dtype=np.int64)
        bucket = self._bucket_of(rows)
        self.ahead(rows)  # side by side
        shards, within = np.divmod(rows - bucket.start, self.shard_records)
        out = Rows({name: np.empty((len(rows), *shape), dtype) for name, (dtype, shape) in bucket.fields.items()})
        numbers, places = shards.tolist(), within.tolist()
        # side by side, so that a shard is opened once a batch; then one by one: rows of 16 kB are copied once, while
        # indexing a shard by an array, then placing the rows, copies twice
        for shard, group in itertools.groupby(np.argsort(shards, kind="stable").tolist(), numbers.__getitem__):
            wanted = [(row, places[row]) for row in group]
            try:
                self._shard(bucket, shard).read(wanted, out)
            except EOFError as error:
                raise self._damaged(shard_file(bucket.name, shard, str(error)), "it ends before a record") from None
            for row, place in wanted if bucket.hashes is not None else ():
                number = shard * self.shard_records + place
                if record_hash(out.bytes, row) != bucket.hashes[number]:
                    raise self._damaged_record(bucket, shard, number)
        return out.arrays

    def ahead(self, indices: Sequence[int] | np.ndarray) -> None:
        """Begin to fetch what `batch` will read of these, where records lie in a store."""
        if self.stored is None:
            return
        rows = np.asarray(indices, dtype=np.int64)
        bucket = self._bucket_of(rows)
        shards = np.unique((rows - bucket.start) // self.shard_records).tolist()
        self.stored.ahead(shard_file(bucket.name, shard, name) for shard in shards for name in bucket.fields)

    def require(self, needed: Iterable[str | tuple[str, ...]], file: str = "params.yaml") -> None:
        """Raises RecordsError where a field is not there: which, and the setting and stage that make it. Of a tuple any
        one is enough. file: of the settings."""
        for names in needed:
            names = (names,) if isinstance(names, str) else names
            if self.buckets and not set(names) & set(self.fields):
                wanted = sorted({*self.fields, names[0]})
                raise RecordsError(
                    f"{self.folder}: got records without the field {' or '.join(names)}, which is read here; set "
                    f"encode.fields: [{', '.join(wanted)}] in {file} and run the stage encode"
                )

    def check(self) -> None:
        """Compare every file with its sha256 now; of a store each is fetched. Raises RecordsError."""
        if self.stored is None:
            check_files(self.folder, self.manifest)
        for file in self.manifest["files"] if self.stored is not None else ():
            self.stored.take(file)

    def _bucket_of(self, rows: np.ndarray) -> Bucket:
        if not len(rows):
            return self.buckets[0]
        if rows.min() < 0 or rows.max() >= len(self):
            raise ValueError(
                f"{self.folder}: got indices from {rows.min()} to {rows.max()}, expected 0 to {len(self) - 1}"
            )
        numbers = np.searchsorted(self.ends, rows, side="right")
        if (numbers != numbers[0]).any():
            names = ", ".join(self.buckets[number].name for number in np.unique(numbers))
            raise ValueError(f"{self.folder}: got a batch of records from the buckets {names}, expected one bucket")
        return self.buckets[numbers[0]]

    def _shard(self, bucket: Bucket, shard: int) -> Mapped | Positioned:
        count = min(self.shard_records, bucket.count - shard * self.shard_records)
        if self.stored is not None:
            files = {name: shard_file(bucket.name, shard, name) for name in bucket.fields}
            return self.stored.opened(files, self.open, lambda paths: self.kind(paths, bucket.fields, count))
        opened = self.open.get((bucket.name, shard))
        if opened is not None:
            return opened
        # as texts: joining three Paths takes as long as opening the files
        paths = {name: f"{self.place}/{shard_file(bucket.name, shard, name)}" for name in bucket.fields}
        try:
            if self.verify and bucket.hashes is None and shard not in bucket.verified:
                for name, data in Mapped(paths, bucket.fields, count).maps.items():
                    self._compare(shard_file(bucket.name, shard, name), data)
                bucket.verified.add(shard)
            opened = self.kind(paths, bucket.fields, count)
        except (OSError, ValueError) as error:
            if isinstance(error, RecordsError):
                raise
            check_files(self.folder, self.manifest, [os.path.basename(path) for path in paths.values()], hashes=False)
            raise
        self.open.put((bucket.name, shard), opened)
        return opened

    def _compare(self, file: str, data: np.ndarray) -> None:
        got, expected = xxhash.xxh3_128_hexdigest(data), self.manifest["facts"]["xxh3_128"][file]
        if got != expected:
            raise self._damaged(file, f"got xxh3 {got[:12]}..., expected {expected[:12]}...")

    def _damaged_record(self, bucket: Bucket, shard: int, number: int) -> RecordsError:
        """Which file it is: of the shard's the first that its hash does not fit, else the records' hashes."""
        for name in bucket.fields:
            file = shard_file(bucket.name, shard, name)
            digest = xxhash.xxh3_128()
            with open(self.folder / file, "rb") as opened:
                while data := opened.read(1 << 22):
                    digest.update(data)
            if digest.hexdigest() != self.manifest["facts"]["xxh3_128"][file]:
                return self._damaged(file, f"the hash of record {number} of {bucket.name} does not fit")
        return self._damaged(hashes_file(bucket.name), f"the hash of record {number} does not fit")

    def _damaged(self, file: str, what: str) -> RecordsError:
        return RecordsError(f"{self.folder / file}: damaged: {what}; restore it or run the stage encode again")
