"""A bucket of records while it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO


@dataclass
class Growing:
    """Its keys, in a file of their own, the hashes of its records, and of the shard that is not full yet the files and
    hashes. fields: name -> (numpy dtype name, shape of one record)."""

    fields: dict[str, tuple[str, tuple[int, ...]]]
    keys_path: Path
    keys: BinaryIO
    record_hashes: BinaryIO
    count: int = 0
    files: dict[str, BinaryIO] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)
        self.hashes[name].update(data)

    def close_shard(self) -> list[str]:
        """The names of the files that are finished with it, with their folders."""
        finished = [file.name for file in self.files.values()]
        for file in self.files.values():
            file.close()
        self.files = {}
        return finished

    def close(self) -> None:
        for file in (self.keys, self.record_hashes):
            file.close()
        self.close_shard()
