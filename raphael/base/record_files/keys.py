"""The keys of the records, a line each, read where they lie."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.manifest import ManifestError

LINES = 256  # between two places that are remembered: 8 bytes for each of them is all that is held
CHUNK_BYTES = 1 << 22


class Keys(Sequence[str]):
    """The `count` lines of a text file as texts. Nothing is read before one is asked for.

    check: called then, first of all; raises where the file is damaged. Another number of lines is a ManifestError.
    """

    def __init__(self, path: Path, count: int, check: Callable[[], None]):
        self.path, self.count, self.check = path, count, check
        self.data: mmap.mmap | bytes | None = None
        self.starts: np.ndarray = np.zeros(1, np.int64)  # of every LINES-th line, and the end

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.count))]
        place = operator.index(index)
        place += self.count if place < 0 else 0
        if not 0 <= place < self.count:
            raise IndexError(f"{self.path}: got index {index}, expected below {self.count}")
        group, within = divmod(place, LINES)
        return self._lines(group)[within]

    def __iter__(self) -> Iterator[str]:
        for group in range(-(-self.count // LINES)):
            yield from self._lines(group)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def _lines(self, group: int) -> list[str]:
        if self.data is None:
            self._open()
        lines = self.data[self.starts[group] : self.starts[group + 1]]
        return lines.decode("utf-8").split("\n")[:-1]

    def _open(self) -> None:
        self.check()
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        starts, lines = [np.zeros(1, np.int64)], 0
        for first in range(0, size, CHUNK_BYTES):
            ends = np.flatnonzero(np.frombuffer(data[first : first + CHUNK_BYTES], np.uint8) == ord("\n"))
            numbers = np.arange(lines + 1, lines + 1 + len(ends))
            starts.append(ends[numbers % LINES == 0] + first + 1)
            lines += len(ends)
        if lines != self.count:
            raise ManifestError(f"{self.path}: got {lines} keys for {self.count} records; run the stage encode again")
        self.starts = np.concatenate([*starts, [size]])
        self.data = data


class Chosen(Sequence[str]):
    """Some of other keys, without a copy of them: those of `rows`, int64."""

    def __init__(self, keys: Sequence[str], rows: np.ndarray):
        self.keys, self.rows = keys, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.keys[row] for row in self.rows[index]]
        return self.keys[self.rows[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]
