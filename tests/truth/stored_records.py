"""Records of plain numbers, here and in a store: the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.record_files.stored import FORM as STORED
from raphael.base.record_files.stored import RECORDS, STORAGE, Shipping
from raphael.base.records import FORM, RecordWriter

COUNT, SHARD = 420, 60
FIELDS = {
    "16x16": {"moments": ("float16", (8, 4, 4)), "label": ("int32", ())},
    "24x16": {"moments": ("float16", (8, 6, 4)), "label": ("int32", ())},
}
RECORD_BYTES = 8 * 6 * 4 * 2  # of the larger bucket's moments


def write_records(folder: Path, storage: str = "", count: int = COUNT, seed: int = 0) -> Path:
    """Two of three are of the first bucket. storage: where their files go."""
    draw = np.random.default_rng(seed)
    ship = Shipping(storage, folder) if storage else None
    with RecordWriter(folder, FIELDS, {"made": "by a test"}, SHARD, hashed_whole=3, ship=ship) as writer:
        for start in range(0, count, 30):
            bucket = list(FIELDS)[start // 30 % 3 // 2]
            keys = [f"{row:06d}" for row in range(start, start + 30)]
            shape = FIELDS[bucket]["moments"][1]
            moments = draw.normal(size=(30, *shape)).astype(np.float16)
            writer.append(keys, {"moments": moments, "label": draw.integers(9, size=30, dtype=np.int32)}, bucket)
    if ship is not None:
        ship.publish(FORM)
    return folder


def published(s3: Any, home: Path, storage: str, seed: int = 0) -> Path:
    """As `write_records` to a bucket, faster: through a folder, then into the server."""
    folder = write_records(home / "stored", f"file://{home}/disk", seed=seed)
    s3.fill(home / "disk", storage.split("/", 3)[3])
    (folder / STORAGE).write_text(json.dumps({"format": STORED, "address": f"{storage}/{RECORDS}"}))
    return folder
