"""Where the files of a stage's tasks lie: in its work folder, or in the object store that `pipeline.storage` names.

    s3://bucket/prefix/partitions/encode/<work folder>/chunk_000000000.npz.<bytes>.<xxh3>

One object a task, sent by the worker that made it, whole or not at all, under its own size and hash. A listing is all
that a run has to read to know what is done: there is no list beside the objects that could be behind or ahead of them,
and a task that was done twice counts once. The work folder's name is a hash of the inputs, the settings and the code's
version, so that other work has another place.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.engine.work import Keep
from raphael.base.config.data import PipelineConfig
from raphael.base.files import file_xxh3
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import Stage
from raphael.base.store.claims import CLAIMS, claimed
from raphael.base.store.objects import DamagedObject, Store, open_store

PARTITIONS = "partitions"


@contextlib.contextmanager
def partitions(pipeline: PipelineConfig, work: Path, stage: Stage, stream: bool = False) -> Iterator[KeptPieces]:
    """What a stage's tasks have finished, for `finish`; in a store nobody else writes them meanwhile.

    stream: the stage reads them by `each`, one at a time; else those of a store are brought to the tasks' own paths,
    where the stage finds them as if they had been written there. Raises StoreError.
    """
    if not pipeline.storage:
        yield KeptPieces(work, stage.name)
        return
    store, folder = open_store(pipeline.storage.rstrip("/")), f"{PARTITIONS}/{stage.name}/{work.name}"
    store.expect()
    with claimed(store, folder, stage.name, stage.root):
        yield StoredPieces(work, stage.name, store, folder, stream)


class KeptPieces(Pieces):
    """The pieces of a work folder. keep: where their makers send them; None: they stay."""

    keep: Keep | None = None

    def each(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Each file in turn, for reading. Raises StoreError."""
        yield from paths

    def remove(self) -> None:
        """Those that lie elsewhere: what they became is published. The work folder is the stage's to remove."""


class StoredPieces(KeptPieces):
    """The pieces of a work folder that lie in a store. `known` is what a listing says."""

    def __init__(self, work: Path, stage: str, store: Store, place: str, stream: bool):
        self.folder, self.stage, self.store, self.place, self.stream = work, stage, store, place, stream
        self.keep = Keep(store.address, place, work)
        self.known: dict[str, tuple[int, str]] = {}
        for name, entry in sorted(store.entries(place).items()):
            if not name.startswith(f"{CLAIMS}/") and (piece := _piece_of(name)) is not None:
                stem, size, xxh3 = piece
                if entry.bytes == size:  # else of a folder that lost bytes
                    self.known[stem] = (size, xxh3)

    def add(self, *paths: Path, known: Mapping[Path, tuple[int, str]] | None = None) -> None:
        """Files that are in the store already, sent by whoever made them."""
        for path in paths:
            self.known[self._name(path)] = (known or {})[path]
            self._bring(path)

    def has(self, *paths: Path) -> bool:
        if any(self._name(path) not in self.known for path in paths):
            return False
        try:
            for path in paths:
                self._bring(path)
        except DamagedObject as error:  # it is removed: the task is done again
            print(f"{self.stage}: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def each(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Each is here while it is looked at; the next is fetched meanwhile."""
        paths = list(paths)
        with ThreadPoolExecutor(1, thread_name_prefix="partitions") as pool:
            coming = pool.submit(self._fetch, paths[0]) if paths else None
            for number, path in enumerate(paths):
                coming.result()
                coming = pool.submit(self._fetch, paths[number + 1]) if number + 1 < len(paths) else None
                yield path
                path.unlink()

    def remove(self) -> None:
        self.store.remove_folder(self.place)

    def _bring(self, path: Path) -> None:
        if not self.stream and not (path.is_file() and _is(path, *self.known[self._name(path)])):
            self._fetch(path)

    def _fetch(self, path: Path) -> None:
        name = self._name(path)
        size, xxh3 = self.known[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.store.get(self.keep.name(path, size, xxh3), path, size, "xxh3", xxh3)
        except DamagedObject:
            self.store.remove(self.keep.name(path, size, xxh3))  # so that the same command makes it again
            del self.known[name]
            raise


def _piece_of(name: str) -> tuple[str, int, str] | None:
    """(name in the work folder, bytes, xxh3) of an object's; None of another's."""
    stem, _, rest = name.rpartition(".")
    stem, _, size = stem.rpartition(".")
    return (stem, int(size), rest) if stem and size.isdecimal() and len(rest) == 32 else None


def _is(path: Path, size: int, xxh3: str) -> bool:
    return path.stat().st_size == size and file_xxh3(path) == xxh3
