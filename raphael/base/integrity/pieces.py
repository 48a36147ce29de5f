"""The finished pieces of unfinished work, known by size and hash: pieces.jsonl in a stage's work folder.

A piece is brought to disk and gets its name, then its line in the list; only then it counts. So a killed run makes one
piece again at most, and after a power cut what is listed is whole. A piece that is not what its line says (cut short,
empty, a flipped bit) is named, removed and made again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from raphael.base.files import file_xxh3, fsync, written_whole

NAME = "pieces.jsonl"


class Pieces:
    """The pieces below a work folder. One process adds; a piece is compared once, when it is first asked for."""

    def __init__(self, folder: Path, stage: str):
        """stage: whose name stands before what is said of a damaged piece."""
        self.folder, self.stage, self.file = folder, stage, folder / NAME
        self.known: dict[str, tuple[int, str]] = {}  # name -> (bytes, xxh3)
        self.whole: set[str] = set()
        self._read()

    def add(self, *paths: Path, known: Mapping[Path, tuple[int, str]] | None = None) -> None:
        """List finished files, which are on disk already. Later lines count before earlier ones of the same name.

        known: size and xxh3 of those that were hashed where they were written.
        """
        fresh, known = not self.file.exists(), known or {}
        lines = b""
        for path in paths:
            name, entry = self._name(path), known.get(path) or (path.stat().st_size, file_xxh3(path))
            self.known[name] = entry
            self.whole.add(name)
            lines += json.dumps([name, *entry]).encode() + b"\n"
        with open(self.file, "ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            fsync(self.folder)

    def has(self, *paths: Path) -> bool:
        """Whether all of these are there and are what was listed; if not, those of them that are there are removed."""
        faults = {path: fault for path in paths if (fault := self._fault(path)) is not None}
        for path, fault in faults.items():
            if fault:
                print(f"{self.stage}: {path}: {fault}: made again", file=sys.stderr, flush=True)
        for path in paths if faults else ():
            self.whole.discard(self._name(path))
            path.unlink(missing_ok=True)
        return not faults

    def hashes(self, below: Path) -> dict[str, str]:
        """xxh3 of the pieces below a folder, by their names there: what Stage.publish need not read again."""
        start = f"{self._name(below)}/"
        return {name.removeprefix(start): digest for name, (_, digest) in self.known.items() if name.startswith(start)}

    def _fault(self, path: Path) -> str | None:
        """None for a whole piece; "" for one that is not there."""
        name = self._name(path)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return ""
        if name in self.whole:
            return None
        if name not in self.known:
            return "not finished"
        expected, digest = self.known[name]
        if size != expected:
            return f"damaged (got {size} bytes, expected {expected})"
        if file_xxh3(path) != digest:
            return "damaged (its hash does not fit)"
        self.whole.add(name)
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> None:
        """What is listed; a list that was cut or damaged is written anew, with the lines that can be read."""
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return
        good = b""
        for line in data.splitlines(keepends=True):
            try:
                name, size, digest = json.loads(line)
                self.known[name] = (int(size), str(digest))
            except (ValueError, TypeError):
                continue
            good += line if line.endswith(b"\n") else line + b"\n"
        if good != data:
            with written_whole(self.file) as temporary:
                temporary.write_bytes(good)
