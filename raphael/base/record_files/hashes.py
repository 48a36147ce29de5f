"""A hash for every record, of data sets with many shards: a record is compared with it each time it is read.

A shard's own hash costs a pass over 73 MB at the first touch, and shuffled records touch all shards at once: at ten
million records the first minutes of a training would do nothing else. Eight bytes a record end that, and find what
happens to a file while it is read, too. It is xxh3 (64 bits) over the record's fields in the order of their names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

HASH = np.dtype("<u8")


def hashes_file(bucket: str) -> str:
    return f"{bucket}.hashes.bin"


def record_hash(rows: Mapping[str, np.ndarray], row: int) -> int:
    """rows: field -> uint8 (n, bytes of a record)."""
    digest = xxhash.xxh3_64()
    for name in sorted(rows):
        digest.update(rows[name][row])
    return digest.intdigest()


class RecordHashes:
    """The hashes of a bucket's records, in a file that is read by position."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_RDONLY)

    def __getitem__(self, place: int) -> int:
        return int.from_bytes(os.pread(self.file, HASH.itemsize, place * HASH.itemsize), "little")

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
