"""The shards' tables in order, and the list's scores beside their rows: what `score` and `filter` both read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.schema import ID, SCORES
from data_pipeline.select import LINKS, open_parquet
from raphael.stage import StageError, read_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SHARDS = Path("data/shards")
SCORED = Path("data/scores")
SCORES_FACTS = "scores.json"


def shard_tables(shards: Path) -> list[Path]:
    """The tables of the shards, in order, each beside its tar. Raises StageError where one is missing."""
    tables = sorted(shards.glob("*.parquet"))
    if not tables:
        raise StageError(f"{shards}: no shard; run the stage download (dvc repro download)")
    for number, table in enumerate(tables):
        if int(table.stem) != number or not table.with_suffix(".tar").exists():
            raise StageError(f"{shards}: shard {number:05d} is not whole; run the stage download again")
    return tables


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
