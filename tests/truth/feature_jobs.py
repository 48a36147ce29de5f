"""What workers of tests do in place of `embed_share`: features without a network, and accidents. No torch: a worker
starts at once."""

from __future__ import annotations

import os
import signal

import numpy as np

from raphael.base.stage import StageError
from raphael.evaluate.features import cache as feature_cache
from raphael.evaluate.features.cache import embed_folder
from raphael.evaluate.features.extract import FeatureSpace


def thirds(pictures: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) -> (B, 9) float32: mean colours of three bands."""
    bands = np.array_split(pictures.astype(np.float32) / 255, 3, axis=1)
    return np.concatenate([band.mean((1, 2)) for band in bands], axis=1)


SPACE = FeatureSpace("fd_thirds", thirds, "thirds".ljust(16, "0"))


def embed(work, worker, tick) -> None:
    for folder in work.folders:
        embed_folder(folder, work.prepare, [SPACE], work.cache, worker, tick)


def die_once(work, worker, tick) -> None:
    """Worker 0 is killed at its second block, the first time."""
    marker, embed_block, blocks = work.cache / "died", feature_cache._embed_block, []

    def embed_or_die(*arguments) -> None:
        blocks.append(arguments[-1])
        if worker[0] == 0 and len(blocks) == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        embed_block(*arguments)

    feature_cache._embed_block = embed_or_die
    embed(work, worker, tick)


def die(work, worker, tick) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(work, worker, tick) -> None:
    raise StageError("an image: not a whole image")
