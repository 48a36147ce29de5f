"""The shards' tables in order, and the list's scores beside their rows: what `score` and `filter` both read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.places import LINKS, SCORED, SCORES_FACTS
from data_pipeline.common.schema import ID, SCORES
from data_pipeline.common.tables import open_parquet
from raphael.base.stage import StageError, read_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


TABLE = ".parquet"


def shard_tables(shards: Path) -> list[Path]:
    """The tables of the shards, in the order of their numbers, each beside its tar. Raises StageError where one is
    missing. A name has five digits or, from shard 100,000 on, more."""
    names = {entry.name for entry in os.scandir(shards)} if shards.is_dir() else set()
    stems = sorted((name[: -len(TABLE)] for name in names if name.endswith(TABLE)), key=lambda stem: (len(stem), stem))
    if not stems:
        raise StageError(f"{shards}: no shard; run the stage download (dvc repro download)")
    for number, stem in enumerate(stems):
        if stem != f"{number:05d}" or f"{stem}.tar" not in names:
            raise StageError(f"{shards}: shard {number:05d} is not whole; run the stage download again")
    return [shards / f"{stem}{TABLE}" for stem in stems]


class ListScores:
    """The scores of the list, handed out shard by shard: shards are consecutive pieces of the list."""

    def __init__(self, links: Path):
        self.batches: Iterator[pa.RecordBatch] = open_parquet(links).iter_batches(columns=[ID, *SCORES])
        self.ahead: list[pa.RecordBatch] = []

    def of(self, ids: np.ndarray, path: Path) -> dict[str, np.ndarray]:
        """Columns of float64 (n,), NaN where null, for the next n = len(ids) rows, which must be those."""
        import numpy as np
        import pyarrow as pa

        while sum(map(len, self.ahead)) < len(ids) and (batch := next(self.batches, None)) is not None:
            self.ahead.append(batch)
        table = pa.Table.from_batches(self.ahead) if self.ahead else pa.table({ID: pa.array([], pa.int64())})
        mine, self.ahead = table.slice(0, len(ids)), table.slice(len(ids)).to_batches()
        if not np.array_equal(mine[ID].to_numpy(), ids):
            raise StageError(f"{path}: its rows are not those of {LINKS}; run the stage download again")
        return {score: mine[score].to_numpy() for score in SCORES}


def computed_scores(table: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What data/scores/ has for the rows of a shard's table: float64 (n,) by score, NaN where null; {} where nothing
    is computed. Raises StageError where it belongs to other rows."""
    import numpy as np

    if not (SCORED / SCORES_FACTS).is_file() or not (names := read_json(SCORED / SCORES_FACTS)["computed"]):
        return {}
    scored = open_parquet(SCORED / table.name).read()
    if not np.array_equal(scored[ID].to_numpy(), ids):
        raise StageError(f"{SCORED / table.name}: its rows are not those of {table}; run the stage score again")
    return {name: scored[name].to_numpy() for name in names}


@dataclass(frozen=True)
class Rows:
    """A shard's table beside its tar, and the scores of its rows, float64 (n,) by name."""

    path: Path
    table: pa.Table
    scored: dict[str, np.ndarray]
