"""The encoded data set on disk: fixed-size records in plain binary files, read through memory maps.

    data/records/
      keys.txt                     one key per line, in the order of the records: bucket after bucket
      64x96.00000.moments.bin      shard 0 of the bucket 64x96: up to 4096 records of (2C, h, w) float16, C order
      64x96.00000.token_ids.bin    (N,) int32
      64x96.00000.edges.bin        (E, F) uint8
      64x96.00001.moments.bin      ...
      manifest.json                size, sha256 and xxh3 of every file, buckets with counts and fields; written last

The pictures of a bucket have one size, so its records have one shape; record i of the data set lies at a place that is
arithmetic. Raw VAE moments are stored, not latents: scaling and sampling are choices of the training. Memory maps give
shuffled records some 30 times as fast as webdataset takes them out of tars (benchmarks/records.py).

Two hashes: sha256 says which data set this is and is compared by `Records.check`; xxh3 (128 bits, an order of magnitude
faster) finds damage when a shard is first read. It is no guard against someone who means harm; sha256 is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from raphael.manifest import NAME, ManifestError, check_files, read_manifest, write_manifest

FORM = "raphael-records/2"
KEYS = "keys.txt"
ONE_BUCKET = "all"  # its name where there is only one and nobody named it
SHARD_RECORDS = 4096

# Names of the fields that the training of the denoiser reads. It owns them; data_pipeline.encode writes them.
MOMENTS = "moments"  # float16 (2C, h, w): raw mean and log-variance of the autoencoder's posterior
TOKEN_IDS = "token_ids"  # int32 (N,)
EDGES = "edges"  # uint8 (E, F): probability of an edge times 255

RecordsError = ManifestError
Fields = dict[str, tuple[str, tuple[int, ...]]]  # name -> (numpy dtype name, shape of one record)


def shard_file(bucket: str, shard: int, name: str) -> str:
    return f"{bucket}.{shard:05d}.{name}.bin"


@dataclass
class _Growing:
    """A bucket while it is written: its keys, and of the shard that is not full yet the files and hashes."""

    fields: Fields
    keys: list[str] = field(default_factory=list)
    files: dict[str, BinaryIO] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)
        self.hashes[name].update(data)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files = {}


class RecordWriter:
    """Write a folder of records from nothing: `with RecordWriter(...) as writer: writer.append(keys, arrays)`.

    fields: name -> (numpy dtype name, shape of one record); of several buckets, bucket -> such a mapping. facts: what
    JSON can hold, stored in the manifest. Records of an earlier writing are removed. Left by an exception, the folder
    gets no manifest and does not open.
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Fields | dict[str, Fields],
        facts: dict[str, Any],
        shard_records: int = SHARD_RECORDS,
    ):
        self.folder, self.facts, self.shard_records = Path(folder), facts, shard_records
        several = all(isinstance(value, dict) for value in fields.values())
        buckets = fields if several else {ONE_BUCKET: fields}
        self.buckets = {name: _Growing(shapes) for name, shapes in buckets.items()}
        self.seen: set[str] = set()
        self.hashes: dict[str, Any] = {}  # of the shards, by file
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (self.folder / NAME, *self.folder.glob("*.bin")):
            old.unlink(missing_ok=True)

    def append(self, keys: Sequence[str], arrays: dict[str, np.ndarray], bucket: str | None = None) -> None:
        """Add n records. arrays: field -> (n, *shape) of exactly the field's dtype. bucket: may be left out where there
        is one. Raises ValueError."""
        if bucket is None and len(self.buckets) == 1:
            (bucket,) = self.buckets
        if bucket not in self.buckets:
            raise ValueError(f"{self.folder}: got bucket {bucket!r}, expected one of {', '.join(self.buckets)}")
        growing = self.buckets[bucket]
        self._check(keys, arrays, growing.fields)
        self.seen.update(keys)
        start = 0
        while start < len(keys):
            shard, within = divmod(len(growing.keys), self.shard_records)
            if within == 0:
                self._open(bucket, growing, shard)
            count = min(len(keys) - start, self.shard_records - within)
            for name in growing.fields:
                growing.write(name, np.ascontiguousarray(arrays[name][start : start + count]).tobytes())
            growing.keys.extend(keys[start : start + count])
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

    def _open(self, bucket: str, growing: _Growing, shard: int) -> None:
        growing.close()
        files = {name: shard_file(bucket, shard, name) for name in growing.fields}
        growing.files = {name: open(self.folder / file, "wb") for name, file in files.items()}
        growing.hashes = {name: xxhash.xxh3_128() for name in files}
        self.hashes |= {file: growing.hashes[name] for name, file in files.items()}

    def close(self) -> None:
        """Finish: write the keys and the manifest."""
        for growing in self.buckets.values():
            growing.close()
        lines = (f"{key}\n" for growing in self.buckets.values() for key in growing.keys)
        (self.folder / KEYS).write_text("".join(lines), encoding="utf-8")
        buckets = [
            {
                "name": name,
                "count": len(growing.keys),
                "fields": {name: [dtype, list(shape)] for name, (dtype, shape) in growing.fields.items()},
            }
            for name, growing in self.buckets.items()
        ]
        hashes = {file: value.hexdigest() for file, value in self.hashes.items()}
        facts = {"buckets": buckets, "shard_records": self.shard_records, "xxh3_128": hashes, "facts": self.facts}
        write_manifest(self.folder, FORM, [KEYS, *hashes], facts)

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
    """Records start .. start + count of the data set, all of one shape. shards: field -> memory map, once touched."""

    name: str
    start: int
    count: int
    fields: Fields
    shards: dict[int, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)


class Records:
    """An opened folder of records. Manifest and keys are checked at once, and the sizes of all files.

    verify: compare a shard with its xxh3 when a record of it is first read. Every process hashes what it reads, once:
    about 0.1 s per GB. Else damage inside a shard goes unseen.

    Raises RecordsError (a StageError and a ValueError, one line that names the file) where one is absent, short or
    damaged; `batch` does, too.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        self.manifest = read_manifest(self.folder, FORM)
        check_files(self.folder, self.manifest, hashes=False)
        check_files(self.folder, self.manifest, [KEYS])
        self.sha256: str = self.manifest["sha256"]  # of the manifest, and so of everything
        about = self.manifest["facts"]
        self.facts: dict[str, Any] = about["facts"]
        self.shard_records: int = about["shard_records"]
        self.keys: list[str] = (self.folder / KEYS).read_text(encoding="utf-8").split("\n")[:-1]
        self.buckets: list[Bucket] = []
        start = 0
        for entry in about["buckets"]:
            fields = {name: (dtype, tuple(shape)) for name, (dtype, shape) in entry["fields"].items()}
            self.buckets.append(Bucket(entry["name"], start, entry["count"], fields))
            start += entry["count"]
        if start != len(self.keys):
            raise RecordsError(
                f"{self.folder}: got {len(self.keys)} keys for {start} records; run the stage encode again"
            )
        self.ends = np.cumsum(self.bucket_counts)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def bucket_counts(self) -> tuple[int, ...]:
        """Records of each bucket, in the order of the records."""
        return tuple(bucket.count for bucket in self.buckets)

    @property
    def fields(self) -> Fields:
        """Of the first bucket; in others the pictures' shapes differ, the names and types do not."""
        return self.buckets[0].fields

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the records at `indices`, all of one bucket: field -> (len(indices), *shape). Raises ValueError."""
        rows = np.asarray(indices, dtype=np.int64)
        bucket = self._bucket_of(rows)
        shards, within = np.divmod(rows - bucket.start, self.shard_records)
        out = {name: np.empty((len(rows), *shape), dtype) for name, (dtype, shape) in bucket.fields.items()}
        # one by one: rows of 16 kB are copied once; indexing a shard by an array, then placing the rows, copies twice
        for row, (shard, place) in enumerate(zip(shards.tolist(), within.tolist(), strict=True)):
            for name, array in self._shard(bucket, shard).items():
                out[name][row] = array[place]
        return out

    def check(self) -> None:
        """Compare every file with its sha256 now. Raises RecordsError."""
        check_files(self.folder, self.manifest)

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

    def _shard(self, bucket: Bucket, shard: int) -> dict[str, np.ndarray]:
        if shard not in bucket.shards:
            files = {name: shard_file(bucket.name, shard, name) for name in bucket.fields}
            check_files(self.folder, self.manifest, list(files.values()), hashes=False)
            count = min(self.shard_records, bucket.count - shard * self.shard_records)
            maps = dict(self._maps(bucket, files, count))
            for name, file in files.items() if self.verify else ():
                self._compare(file, maps[name])
            bucket.shards[shard] = maps
        return bucket.shards[shard]

    def _compare(self, file: str, data: np.ndarray) -> None:
        got, expected = xxhash.xxh3_128_hexdigest(data), self.manifest["facts"]["xxh3_128"][file]
        if got != expected:
            raise RecordsError(
                f"{self.folder / file}: damaged: got xxh3 {got[:12]}..., expected {expected[:12]}...; "
                "restore it or run the stage encode again"
            )

    def _maps(self, bucket: Bucket, files: dict[str, str], count: int) -> Iterator[tuple[str, np.ndarray]]:
        for name, file in files.items():
            dtype, shape = bucket.fields[name]
            path, shape = self.folder / file, (count, *shape)
            got, expected = path.stat().st_size, np.dtype(dtype).itemsize * int(np.prod(shape))
            if got != expected:
                raise RecordsError(f"{path}: got {got} bytes, expected {dtype} {shape}; run the stage encode again")
            # as a plain array: every row taken from a np.memmap is one, too, which takes as long as copying its 16 kB
            yield name, np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)
