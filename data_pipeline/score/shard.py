"""One shard to be scored, and its scoring: a task of data_pipeline/engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.schema import CAPTION, ID, KEY
from raphael.base.files import written_whole

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.base.config.data import ScoreConfig

LIST, COMPUTED = "list", "computed"


@dataclass(frozen=True)
class Task:
    """One shard to be scored. needs: which rows, by score; paths are absolute: workers start elsewhere."""

    table: Path
    done: Path
    given: dict[str, np.ndarray]  # the list's, float64 (n,), NaN where null
    needs: dict[str, np.ndarray]  # bool (n,)
    count = 1  # of the bar, which counts shards


class ShardScorer:
    """A worker: models loaded once, then shard after shard."""

    def __init__(self, settings: ScoreConfig, device: str):
        from data_pipeline.score.scorer import Scorer

        self.scorer, self.batch_size = Scorer(settings, device), settings.batch_size

    def __call__(self, task: Task) -> Path:
        return score_shard(self.scorer, self.batch_size, task)


def score_shard(scorer: Any, batch_size: int, task: Task) -> Path:
    """Compute what a shard lacks and write its table of scores atomically."""
    import numpy as np
    import pyarrow as pa

    from data_pipeline.common.images import Shard
    from data_pipeline.common.tables import open_parquet, write_table

    table = open_parquet(task.table).read(columns=[ID, KEY, CAPTION])
    keys, captions = table[KEY].to_pylist(), table[CAPTION].to_pylist()
    values = {name: given.copy() for name, given in task.given.items()}
    rows = np.flatnonzero(np.any(list(task.needs.values()), axis=0))
    shard = Shard(task.table.with_suffix(".tar"))
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = [shard.image(keys[row]) for row in batch]
            for name, scores in scorer(images, [captions[row] for row in batch]).items():
                mine = task.needs[name][batch]
                values[name][batch[mine]] = scores[mine]
    finally:
        shard.close()
    columns: dict[str, pa.Array] = {ID: table[ID]}
    for name, numbers in values.items():
        columns[name] = pa.array(numbers, from_pandas=True)
        source = np.where(task.needs[name], COMPUTED, np.where(np.isnan(numbers), None, LIST).astype(object))
        columns[f"{name}_source"] = pa.array(source, pa.string())
    with written_whole(task.done) as temporary:
        write_table(pa.table(columns), temporary, compression="zstd")
    return task.done
