"""Images that look alike, by perceptual hashes (data_pipeline/common/hashes/phash.py) that differ in few bits.

The search for pairs is exact (data_pipeline/filter/bands.py). The first of several alike stays. A later one is dropped
when it is alike to one that stays: chains of small changes do not take everything with them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.common.hashes.phash import near_any, phashes
from data_pipeline.common.images import Shard
from data_pipeline.common.rules import EVALUATION, NEAR
from data_pipeline.common.schema import KEY
from data_pipeline.engine.partitions import partitions
from data_pipeline.engine.run import finish
from data_pipeline.engine.work import Work
from data_pipeline.filter.bands import HashBands
from raphael.base.files import written_whole
from raphael.base.stage import Stage, StageError, file_sha256

if TYPE_CHECKING:
    from data_pipeline.common.shard_rows import Rows
    from raphael.base.config.data import FilterConfig
    from raphael.base.config.params import Config

HASHES = "hashes"


@dataclass(frozen=True)
class HashTask:
    """The images of a shard that are alive: a task of data_pipeline/engine. count: rows of the shard, for the bar."""

    done: Path
    tar: Path
    keys: tuple[str, ...]
    count: int


def hasher() -> Callable[[HashTask], Path]:
    """A worker; it has no models."""
    return hash_shard


def hash_shard(task: HashTask) -> Path:
    """uint64 (n,) of the images, in the order of the keys, as .npy."""
    shard = Shard(task.tar)
    try:
        parts = [phashes([shard.image(key)]) for key in task.keys]  # one after the other: they may be large
    finally:
        shard.close()
    with written_whole(task.done) as temporary:
        np.save(temporary, np.concatenate([np.empty(0, np.uint64), *parts]))
    return task.done


class NearDuplicates:
    """What `filter` asks: which images look like one of the evaluation's, then which look alike.

    First `hash_images`, shard by shard wherever `pipeline` says; then `looked_at`, in the order of the shards; then
    `take_out`.
    """

    def __init__(self, config: FilterConfig, folder: Path, max_rows: int):
        self.radius = config.near_duplicate_bits
        self.bands = HashBands(folder, self.radius, max_rows) if self.radius else None
        self.evaluation = folder_phashes(config.evaluation_pictures) if config.evaluation_pictures else None
        self.hashed: list[tuple[np.ndarray, Path]] = []  # of each shard: its rows alive, as bits; their hashes

    def hash_images(
        self, config: Config, stage: Stage, work: Path, judged: Iterable[tuple[Rows, np.ndarray]], rows: int
    ) -> dict[str, str]:
        """The hashes of the images alive, a file a shard. Returns what the report says of it."""
        (work / HASHES).mkdir(exist_ok=True)

        def tasks() -> Iterator[HashTask]:
            for shard, alive in judged:
                keys = shard.table[KEY].to_pylist()
                wanted = tuple(keys[row] for row in np.flatnonzero(alive))
                name = hashlib.sha256("\n".join([file_sha256(shard.path), *wanted]).encode()).hexdigest()
                done = work / HASHES / f"{name[:32]}.npy"
                self.hashed.append((np.packbits(alive), done))
                yield HashTask(done, shard.path.with_suffix(".tar").resolve(), wanted, len(alive))

        hashing = Work(stage.name, stage.root, hasher)
        with partitions(config.pipeline, work, stage) as pieces, stage.progress(rows, "rows hashed") as bar:
            return finish(config.pipeline, hashing, tasks(), pieces, stage, bar)

    def looked_at(self, shards: Iterable[Rows], dropped: dict[str, int]) -> Iterator[tuple[Rows, np.ndarray]]:
        """Each with the rows still alive, bool (n,), without those that look like the evaluation's; the others are
        remembered."""
        for shard, (packed, done) in zip(shards, self.hashed, strict=True):
            alive = np.unpackbits(packed, count=len(shard.table)).astype(bool)
            rows, hashes = np.flatnonzero(alive), np.load(done)
            if self.evaluation is not None:
                alike = near_any(hashes, self.evaluation, self.radius)
                dropped[EVALUATION] = dropped.get(EVALUATION, 0) + int(alike.sum())
                alive[rows[alike]] = False
                hashes = hashes[~alike]
            if self.bands:
                self.bands.add(hashes)
            yield shard, alive

    def take_out(self, images: Path, dropped: dict[str, int]) -> int:
        """Rewrite the table of those looked at, in that order, without near duplicates. Returns how many went."""
        import pyarrow as pa

        from data_pipeline.common.tables import open_parquet, table_writer

        if not self.bands:
            return 0
        rows, start = np.sort(np.asarray(self.bands.drop(), dtype=np.int64)), 0
        file = open_parquet(images)
        partial = images.with_suffix(".partial")
        with table_writer(partial, file.schema_arrow, compression="zstd") as writer:
            for batch in file.iter_batches():
                keep, end = np.ones(len(batch), bool), start + len(batch)
                keep[rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start] = False
                writer.write_table(pa.Table.from_batches([batch]).filter(pa.array(keep)))
                start = end
        os.replace(partial, images)
        dropped[NEAR] = len(rows)
        return len(rows)


def folder_phashes(folder: str) -> np.ndarray:
    """uint64 (m,) of every image below the folder. Raises StageError where it has none or one is broken."""
    from PIL import Image

    from data_pipeline.common.images import EXTENSIONS, FORMATS
    from raphael.base.images.colours import as_seen

    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower().lstrip(".") in EXTENSIONS)
    if not files:
        raise StageError(f"filter.evaluation_pictures: {folder}: got no image there, expected a folder of images")
    parts = []
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                parts.append(phashes([as_seen(image)]))
        except (OSError, ValueError, SyntaxError) as error:
            raise StageError(f"filter.evaluation_pictures: {file}: not readable ({str(error)[:80]})") from None
    return np.concatenate(parts)
