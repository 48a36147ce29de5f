"""Features of a set of pictures on disk, float32, block by block: computed once per network, in one pass over pictures.

    <cache>/<network hash>/<pictures and preparation>/00000.npy 00001.npy ...      BLOCK_ROWS rows each, the last fewer

A block is written whole or not at all. So a run that was killed goes on where it stopped, and several workers can share
the work (workers.py): worker w of W computes every W-th block. Whoever computes a block forms the same batches of the
same pictures, and statistics are taken over blocks in order: the same number for any number of workers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raphael.evaluate.features import BATCH, FeatureSpace, batches
from raphael.evaluate.frechet import Features
from raphael.evaluate.picture_folder import PictureFolder, Preparation
from raphael.stage import StageError

BLOCK_ROWS = 5 * BATCH  # what a kill costs at most, and the smallest share of a worker


@dataclass(frozen=True)
class CachedFeatures:
    """The features of one set by one network, (count, D) float32 over files."""

    folder: Path
    count: int

    @property
    def num_blocks(self) -> int:
        return -(-self.count // BLOCK_ROWS)

    def path(self, block: int) -> Path:
        return self.folder / f"{block:05d}.npy"

    def finished(self) -> int:
        """Pictures whose block is there."""
        sizes = [min(BLOCK_ROWS, self.count - block * BLOCK_ROWS) for block in range(self.num_blocks)]
        return sum(size for block, size in enumerate(sizes) if self.path(block).is_file())

    def blocks(self) -> Iterator[np.ndarray]:
        """Raises StageError for a block that is missing or of another length."""
        for block in range(self.num_blocks):
            expected = min(BLOCK_ROWS, self.count - block * BLOCK_ROWS)
            try:
                rows = np.load(self.path(block), allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise StageError(
                    f"{self.path(block)}: not a block of features ({error}); delete it, run again"
                ) from None
            if rows.ndim != 2 or len(rows) != expected:
                raise StageError(
                    f"{self.path(block)}: got {rows.shape}, expected {expected} rows; delete it, run again"
                )
            yield rows

    def array(self) -> np.ndarray:
        return np.concatenate(list(self.blocks()))

    def statistics(self) -> Features:
        """Raises ValueError for NaN or infinity."""
        features = None
        for rows in self.blocks():
            features = features or Features(rows.shape[1])
            features.update(rows)
        assert features is not None, "a set without pictures"
        return features


def cached_sets(
    pictures: PictureFolder, preparation: Preparation, networks: Sequence[FeatureSpace], cache: Path
) -> list[CachedFeatures]:
    """Where the features of a folder by each network are, or will be."""
    name = hashlib.sha256(f"{pictures.digest()} {preparation} {BLOCK_ROWS}".encode()).hexdigest()[:16]
    sets = []
    for network in networks:
        assert network.network, f"{network.name}: a network without a hash cannot be cached"
        folder = cache / network.network[:16] / name
        folder.mkdir(parents=True, exist_ok=True)
        sets.append(CachedFeatures(folder, len(pictures.files)))
    return sets


def embed_folder(
    pictures: PictureFolder,
    prepare: tuple[Preparation, int],
    networks: Sequence[FeatureSpace],
    cache: Path,
    worker: tuple[int, int] = (0, 1),
    tick: Callable[[int], None] = lambda n: None,
) -> list[CachedFeatures]:
    """The features of a folder by each network. Every picture is read once, for all networks that lack its block.

    prepare: the preparation and the one side that pictures may have before it (0: any). worker: (which, of how many);
    with several, the blocks of the others may not be there yet. Raises StageError for a picture, ValueError for NaN.
    """
    preparation, only_size_px = prepare
    sets = cached_sets(pictures, preparation, networks, cache)
    which, workers = worker
    for block in range(sets[0].num_blocks):
        rows = slice(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(pictures.files)))
        missing = [(n, s) for n, s in zip(networks, sets, strict=True) if not s.path(block).is_file()]
        if block % workers == which and missing:
            _embed_block(pictures.pictures(preparation, only_size_px, rows), missing, block)
        tick(rows.stop - rows.start)
    return sets


def _embed_block(
    pictures: Iterator[np.ndarray], missing: list[tuple[FeatureSpace, CachedFeatures]], block: int
) -> None:
    parts: list[list[np.ndarray]] = [[] for _ in missing]
    for batch in _one_size_batches(pictures):
        for (network, _), rows in zip(missing, parts, strict=True):
            features = np.asarray(network.embed(batch), np.float32)
            if not np.isfinite(features).all():
                raise ValueError(f"{network.name}: got NaN or infinity among the features of block {block}")
            rows.append(features)
    for (_, cached), rows in zip(missing, parts, strict=True):
        temporary = cached.folder / f".{block:05d}.{os.getpid()}.npy"
        np.save(temporary, np.concatenate(rows))
        os.replace(temporary, cached.path(block))


def _one_size_batches(pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    try:
        yield from batches(pictures)
    except ValueError as error:
        raise StageError(f"{error}; take a protocol that prepares pictures, or prepare them") from None
