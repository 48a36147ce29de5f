"""The real images that generated ones are compared with: the training images, straight from the shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raphael.base.images.colours import as_seen
from raphael.base.images.fit import fit, read_image
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from PIL import Image

DOWNLOAD_AGAIN = "delete the shard and run the stage download again"


def reference_images(
    shards: Path, captions: Path, limit: int, height: int, width: int, area: bool = False
) -> Iterator[np.ndarray]:
    """Up to `limit` kept images, evenly spread by key -> uint8 (height, width, 3), as training saw them.

    By the very function of the training (raphael/base/images/fit.py); area: of a model of pixels, as encode fits them.
    Raises StageError for a shard that is absent or broken.
    """
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(captions, columns=["key", "shard"], page_checksum_verification=True)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        detail = " ".join(str(error).split())[:99]
        raise StageError(f"{captions}: {detail}; delete it and run the stage captions") from None
    rows = sorted(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
    if len(rows) > limit:
        rows = [rows[int(index)] for index in np.linspace(0, len(rows) - 1, limit).round()]
    wanted: dict[str, set[str]] = {}
    for shard, key in rows:
        wanted.setdefault(shard, set()).add(key)
    for shard, keys in wanted.items():
        yield from _from_shard(shards / shard, keys, _fitted(height, width, area))


def _from_shard(path: Path, keys: set[str], fitted: Callable[[Image.Image], np.ndarray]) -> Iterator[np.ndarray]:
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                if key in keys and ending in ("png", "jpg", "webp"):
                    body, name = io.BytesIO(tar.extractfile(member).read()), f"{path}: {member.name}"
                    found[key] = read_image(body, fitted, DOWNLOAD_AGAIN, name)
    except FileNotFoundError:
        raise StageError(f"{path}: no such shard; run the stage download (dvc repro download), or dvc pull") from None
    except (tarfile.TarError, OSError) as error:
        raise StageError(f"{path}: a corrupt shard ({error}); {DOWNLOAD_AGAIN}") from None
    if missing := sorted(keys - set(found)):
        raise StageError(
            f"{path}: {missing[0]} is missing though captions.parquet lists it; run the stage download again"
        )
    yield from (found[key] for key in sorted(found))


def _fitted(height: int, width: int, area: bool) -> Callable[[Image.Image], np.ndarray]:
    return lambda image: fit(as_seen(image), height, width, area)
