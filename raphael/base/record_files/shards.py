"""The open files of shards, a bounded number of them.

A map is the faster way to records that stay open, by half; opening one costs three times what a plain file does, and
shuffled records of a data set of many shards open files all the time: 47,000 records of 17.7 kB a second of a core
through files and 10,000 through maps over 2,442 shards, 117,000 and 138,000 to 200,000 over five. So a data set whose
files can all be open at once is mapped, a larger one is read by position. A process is given 1,024 descriptors by
default and has other files, too.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

MOST_FILES = 384  # open at once


class Rows:
    """The arrays (n, *shape) that a batch is read into, and the bytes of their rows."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)
        self.bytes = {name: row_bytes(array) for name, array in arrays.items()}


class Mapped:
    """The files of a shard as arrays: field -> (count, *shape)."""

    def __init__(self, paths: dict[str, str], fields: dict[str, tuple[str, tuple[int, ...]]], count: int):
        """paths: of each field's file, which hold `count` records of (dtype, shape)."""
        # as a plain array: every row taken from a np.memmap is one, too, which takes as long as copying its 16 kB
        self.maps = {
            name: np.memmap(path, fields[name][0], "r", shape=(count, *fields[name][1])).view(np.ndarray)
            for name, path in paths.items()
        }

    def read(self, wanted: list[tuple[int, int]], rows: Rows) -> None:
        """wanted: (row of the batch, place in the shard)."""
        for name, array in self.maps.items():
            into = rows.arrays[name]
            for row, place in wanted:
                into[row] = array[place]

    def close(self) -> None:
        self.maps = {}


class Positioned:
    """The files of a shard, read by position, whatever a record looks like. Raises EOFError where one has become
    shorter."""

    def __init__(self, paths: dict[str, str], fields: object = None, count: int = 0):
        self.files: dict[str, int] = {}
        for name, path in paths.items():
            self.files[name] = os.open(path, os.O_RDONLY)

    def read(self, wanted: list[tuple[int, int]], rows: Rows) -> None:
        """wanted: (row of the batch, place in the shard)."""
        for name, file in self.files.items():
            into = rows.bytes[name]
            size = into.shape[1]
            for row, place in wanted:
                if os.preadv(file, [into[row]], place * size) != size:
                    raise EOFError(name)

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files = {}

    def __del__(self) -> None:
        self.close()


class OpenShards:
    """The shards that were read last, `most` of them. Keys are of the caller's choice."""

    def __init__(self, most: int):
        self.most = max(1, most)
        self.open: OrderedDict[object, Mapped | Positioned] = OrderedDict()

    def get(self, key: object) -> Mapped | Positioned | None:
        shard = self.open.get(key)
        if shard is not None:
            self.open.move_to_end(key)
        return shard

    def forget(self, key: object) -> None:
        """Closed when whoever reads it now lets go."""
        self.open.pop(key, None)

    def put(self, key: object, shard: Mapped | Positioned) -> None:
        while len(self.open) >= self.most:
            self.open.popitem(last=False)[1].close()
        self.open[key] = shard


def row_bytes(array: np.ndarray) -> np.ndarray:
    """(n, *shape) -> a view of it as uint8 (n, bytes of a row)."""
    count = len(array)
    if not count:
        return np.empty((0, 0), np.uint8)
    return array.reshape(count, -1).view(np.uint8).reshape(count, -1)
