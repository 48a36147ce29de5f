"""Features of a set of images on disk, float32, block by block: computed once per network, in one pass over images.

    <cache>/<network hash>/<images and preparation>/00000.npy 00001.npy ...      BLOCK_ROWS rows each, the last fewer

A block is written atomically. So a run that was killed resumes where it stopped, and several workers can share
the work (workers.py): worker w of W computes every W-th block. Whoever computes a block forms the same batches of the
same images, and statistics are taken over blocks in order: the same number for any number of workers.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raphael.base.files import written_whole
from raphael.base.stage import StageError
from raphael.evaluate.features.extract import BATCH, FeatureSpace, batches
from raphael.evaluate.features.image_folder import ImageFolder, Preparation
from raphael.evaluate.metrics.frechet import Features

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
        """Images whose block is there."""
        sizes = [min(BLOCK_ROWS, self.count - block * BLOCK_ROWS) for block in range(self.num_blocks)]
        return sum(size for block, size in enumerate(sizes) if self.path(block).is_file())

    def has(self, block: int) -> bool:
        """Whether a block is there, as long as it should be; one that a power cut left cut short is made again."""
        if not self.path(block).is_file():
            return False
        try:
            return len(np.load(self.path(block), mmap_mode="r")) == min(BLOCK_ROWS, self.count - block * BLOCK_ROWS)
        except (OSError, ValueError, EOFError):
            print(f"{self.path(block)}: cut short: made again", file=sys.stderr, flush=True)
            return False

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
        assert features is not None, "a set without images"
        return features


def cached_sets(
    images: ImageFolder, preparation: Preparation, networks: Sequence[FeatureSpace], cache: Path
) -> list[CachedFeatures]:
    """Where the features of a folder by each network are, or will be."""
    name = hashlib.sha256(f"{images.digest()} {preparation} {BLOCK_ROWS}".encode()).hexdigest()[:16]
    sets = []
    for network in networks:
        assert network.network, f"{network.name}: a network without a hash cannot be cached"
        folder = cache / network.network[:16] / name
        folder.mkdir(parents=True, exist_ok=True)
        sets.append(CachedFeatures(folder, len(images.files)))
    return sets


def embed_folder(
    images: ImageFolder,
    prepare: tuple[Preparation, int],
    networks: Sequence[FeatureSpace],
    cache: Path,
    worker: tuple[int, int] = (0, 1),
    tick: Callable[[int], None] = lambda n: None,
) -> list[CachedFeatures]:
    """The features of a folder by each network. Every image is read once, for all networks that lack its block.

    prepare: the preparation and the one side that images may have before it (0: any). worker: (which, of how many);
    with several, the blocks of the others may not be there yet. Raises StageError for an image, ValueError for NaN.
    """
    preparation, only_size_px = prepare
    sets = cached_sets(images, preparation, networks, cache)
    which, workers = worker
    for block in range(sets[0].num_blocks):
        rows = slice(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(images.files)))
        missing = [(n, s) for n, s in zip(networks, sets, strict=True) if not s.has(block)]
        if block % workers == which and missing:
            _embed_block(images.prepared(preparation, only_size_px, rows), missing, block)
        tick(rows.stop - rows.start)
    return sets


def _embed_block(images: Iterator[np.ndarray], missing: list[tuple[FeatureSpace, CachedFeatures]], block: int) -> None:
    parts: list[list[np.ndarray]] = [[] for _ in missing]
    for batch in _one_size_batches(images):
        for (network, _), rows in zip(missing, parts, strict=True):
            features = np.asarray(network.embed(batch), np.float32)
            if not np.isfinite(features).all():
                raise ValueError(f"{network.name}: got NaN or infinity among the features of block {block}")
            rows.append(features)
    for (_, cached), rows in zip(missing, parts, strict=True):
        with written_whole(cached.path(block)) as temporary:
            np.save(temporary, np.concatenate(rows))


def _one_size_batches(images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    try:
        yield from batches(images)
    except ValueError as error:
        raise StageError(f"{error}; take a protocol that prepares images, or prepare them") from None
