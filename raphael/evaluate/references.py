"""The real pictures that drawn ones are compared with: the training pictures, straight from the shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raphael.stage import StageError


def reference_pictures(shards: Path, captions: Path, limit: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Up to `limit` kept pictures, evenly spread by key -> uint8 (height, width, 3), as training saw them.

    Scaled to cover height x width and cropped to the middle. Raises StageError for a shard that is absent or broken.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(captions, columns=["key", "shard"])
    rows = sorted(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
    if len(rows) > limit:
        rows = [rows[int(index)] for index in np.linspace(0, len(rows) - 1, limit).round()]
    wanted: dict[str, set[str]] = {}
    for shard, key in rows:
        wanted.setdefault(shard, set()).add(key)
    for shard, keys in wanted.items():
        yield from _from_shard(shards / shard, keys, height, width)


def _from_shard(path: Path, keys: set[str], height: int, width: int) -> Iterator[np.ndarray]:
    from PIL import Image

    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                if key in keys and ending in ("png", "jpg", "webp"):
                    with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                        found[key] = fit(image.convert("RGB"), height, width)
    except FileNotFoundError:
        raise StageError(f"{path}: no such shard; run the stage download (dvc repro download), or dvc pull") from None
    except (tarfile.TarError, OSError) as error:
        raise StageError(f"{path}: a corrupt shard ({error}); delete it and run the stage download again") from None
    if missing := sorted(keys - set(found)):
        raise StageError(
            f"{path}: {missing[0]} is missing though captions.parquet lists it; run the stage download again"
        )
    yield from (found[key] for key in sorted(found))


def fit(image, height: int, width: int) -> np.ndarray:
    """A PIL image scaled to cover height x width (Lanczos) and cropped to its middle -> uint8 (height, width, 3)."""
    from PIL import Image

    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
