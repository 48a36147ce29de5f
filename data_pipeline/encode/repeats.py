"""How often each image comes in an epoch: a column of the list, filled by kohya's folders, as a fact of the records."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.common.caption_rows import CaptionRows
from data_pipeline.common.places import METADATA, REPEATS
from data_pipeline.common.tables import open_parquet
from data_pipeline.encode.labels import list_ids


def has_repeats() -> bool:
    return METADATA.is_file() and REPEATS in open_parquet(METADATA).schema_arrow.names


def read_repeats(rows: CaptionRows) -> dict[str, Any]:
    """{"repeats": {key: how often}} of the images that come more than once; {} where the list has no such column."""
    if not has_repeats():
        return {}
    listed = open_parquet(METADATA).read(columns=[REPEATS])[REPEATS].to_numpy()
    ids = np.fromiter(list_ids(rows), np.int64, len(rows))
    counts = {row.key: int(times) for row, times in zip(rows, listed[ids], strict=True) if times > 1}
    return {REPEATS: counts} if counts else {}
