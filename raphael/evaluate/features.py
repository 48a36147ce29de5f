"""The feature space of the Frechet distance, and its honest name: `fid` only from the real Inception weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raphael.evaluate.frechet import Features
from raphael.stage import StageError

BATCH = 50


@dataclass(frozen=True)
class FeatureSpace:
    """name: "fid" for Inception, else "fd_<features>". embed: uint8 (B, H, W, 3) -> (B, D)."""

    name: str
    embed: Callable[[np.ndarray], np.ndarray]

    def metric(self, n: int) -> str:
        """Distances of different n are not comparable, so n is in the name."""
        return f"{self.name}_{n}"

    def statistics(
        self, pictures: Iterable[np.ndarray], tick: Callable[[int], None] = lambda n: None
    ) -> tuple[Features, np.ndarray]:
        """Streaming statistics of pictures, and their features (n, D) float32. Raises ValueError for NaN."""
        statistics, rows = None, []
        for batch in batches(pictures):
            features = np.asarray(self.embed(batch))
            statistics = statistics or Features(features.shape[1])
            statistics.update(features)
            rows.append(features.astype(np.float32))
            tick(len(batch))
        if statistics is None:
            raise ValueError("got no pictures, expected at least 2 for a distance")
        return statistics, np.concatenate(rows)


def inception_space(weights: str) -> FeatureSpace:
    """torch-fidelity's Inception, from a weights file. Raises StageError where it is absent or another file."""
    import torch

    if not Path(weights).is_file():
        raise StageError(
            f"evaluate.fid_inception_weights: {weights}: no such file; expected torch-fidelity's "
            'weights-inception-2015-12-05-6726825d.pth, or "" for the Frechet distance of the CLIP'
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise StageError(
            f"evaluate.fid_inception_weights: {weights}: not torch-fidelity's weights ({_short(error)})"
        ) from None

    @torch.inference_mode()
    def embed(pictures: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2))[0].numpy()

    return FeatureSpace("fid", embed)


def batches(pictures: Iterable[np.ndarray], size: int = BATCH) -> Iterator[np.ndarray]:
    """Stack pictures (H, W, 3) into batches (B, H, W, 3). Raises ValueError where sizes differ."""
    batch: list[np.ndarray] = []
    shape = None
    for picture in pictures:
        shape = shape or picture.shape
        if picture.shape != shape:
            raise ValueError(f"got pictures of {shape} and {picture.shape}, expected one size")
        batch.append(picture)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
