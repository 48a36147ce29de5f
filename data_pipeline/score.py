"""Scores that the list lacks, computed from the pictures: data/shards/ -> data/scores/.

One table a shard: for every score that is configured its value and where it comes from, "list" or "computed". With
nothing configured the folder says so and `filter` reads the list's scores alone. A finished shard is kept in
work/score/ by the hash of its table, of the list's scores and of the models, so that a killed run goes on and a changed
shard is scored alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.schema import CAPTION, ID, KEY, STATUS, SUCCESS
from data_pipeline.select import LINKS, open_parquet
from data_pipeline.shard_rows import SCORED, SCORES_FACTS, SHARDS, ListScores, shard_tables
from raphael.stage import Stage, StageError, file_sha256, main, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.config import Config
    from raphael.config_data import ScoreConfig

LIST, COMPUTED = "list", "computed"
KEPT = "shards"


@dataclass(frozen=True)
class Task:
    """One shard to be scored. needs: which rows, by score; paths are absolute: workers start elsewhere."""

    table: Path
    done: Path
    given: dict[str, np.ndarray]  # the list's, float64 (n,), NaN where null
    needs: dict[str, np.ndarray]  # bool (n,)


def run(config: Config, stage: Stage) -> None:
    settings = config.score
    tables = shard_tables(SHARDS)
    work = stage.workdir(*_identity(settings))
    fresh = work / "out"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    counts: dict[str, dict[str, int]] = {}
    total = sum(int(_success(open_parquet(table).read(columns=[STATUS])).sum()) for table in tables)
    if settings.computed:
        (work / KEPT).mkdir(exist_ok=True)
        tasks = list(_tasks(settings, tables, work / KEPT))
        waiting = [task for task in tasks if not task.done.exists()]
        with stage.progress(len(tasks), "shards", initial=len(tasks) - len(waiting)) as bar:
            for _ in _score(settings, waiting):
                bar.update()
        _publishable(tasks, fresh, counts)
    facts = {"computed": list(settings.computed), "sources": counts}
    write_json(fresh / SCORES_FACTS, facts)
    stage.publish(fresh, SCORED)
    stage.report(total, total, **facts)


def _identity(settings: ScoreConfig) -> list[Any]:
    """What a score depends on beside picture and caption: the models' bytes, and whether the list's are replaced. A
    CLIP that lies here is known by its files, one of a hub by its name."""
    parts: list[Any] = [settings.computed, settings.replace, settings.clip]
    for name in ("aesthetic", "watermark", "unsafe"):
        if path := getattr(settings, name):
            if not Path(path).is_file():
                raise StageError(f"score.{name}: {path}: no such file; name the model's weights, or leave it empty")
            parts.append(Path(path))
    where = settings.clip.split(":")[-1]
    return parts + ([Path(where)] if where and Path(where).exists() else [])


def _tasks(settings: ScoreConfig, tables: list[Path], kept: Path) -> Iterator[Task]:
    import numpy as np

    listed = ListScores(LINKS)
    for path in tables:
        table = open_parquet(path).read(columns=[ID, STATUS])
        of_list = listed.of(table[ID].to_numpy(), path)
        given = {name: np.asarray(of_list[name], np.float64) for name in settings.computed}
        success = _success(table)
        needs = {name: success & (settings.replace | np.isnan(values)) for name, values in given.items()}
        digest = hashlib.sha256(file_sha256(path).encode())
        for name in settings.computed:
            digest.update(given[name].tobytes())
        yield Task(path.resolve(), kept / f"{digest.hexdigest()[:32]}.parquet", given, needs)


def _success(table: pa.Table) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.equal(table[STATUS], SUCCESS).to_numpy(zero_copy_only=False)


def _score(settings: ScoreConfig, tasks: list[Task]) -> Iterator[Path]:
    """Score the shards, each finished file yielded as it comes."""
    if not tasks:
        return
    if settings.distributor == "ray":
        from data_pipeline.score_ray import score_on_ray

        yield from score_on_ray(settings, tasks)
        return
    from data_pipeline.scoring import Scorer

    scorer = Scorer(settings)
    for task in tasks:
        yield score_shard(scorer, settings.batch_size, task)


def score_shard(scorer: Any, batch_size: int, task: Task) -> Path:
    """Compute what a shard lacks and write its table of scores, whole or not at all."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.pictures import Shard

    table = pq.read_table(task.table, columns=[ID, KEY, CAPTION])
    keys, captions = table[KEY].to_pylist(), table[CAPTION].to_pylist()
    values = {name: given.copy() for name, given in task.given.items()}
    rows = np.flatnonzero(np.any(list(task.needs.values()), axis=0))
    shard = Shard(task.table.with_suffix(".tar"))
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            pictures = [shard.picture(keys[row]) for row in batch]
            for name, scores in scorer(pictures, [captions[row] for row in batch]).items():
                mine = task.needs[name][batch]
                values[name][batch[mine]] = scores[mine]
    finally:
        shard.close()
    columns: dict[str, pa.Array] = {ID: table[ID]}
    for name, numbers in values.items():
        columns[name] = pa.array(numbers, from_pandas=True)
        source = np.where(task.needs[name], COMPUTED, np.where(np.isnan(numbers), None, LIST).astype(object))
        columns[f"{name}_source"] = pa.array(source, pa.string())
    partial = task.done.with_suffix(f".{os.getpid()}")
    pq.write_table(pa.table(columns), partial, compression="zstd")
    os.replace(partial, task.done)
    return task.done


def _publishable(tasks: list[Task], fresh: Path, counts: dict[str, dict[str, int]]) -> None:
    """Copy each shard's scores under the shard's name, and count the sources; forget shards that are no more."""
    import pyarrow.compute as pc

    for task in tasks:
        shutil.copyfile(task.done, fresh / task.table.name)
        table = open_parquet(task.done).read()
        for name in task.given:
            entry = counts.setdefault(name, {LIST: 0, COMPUTED: 0, "none": 0})
            for pair in pc.value_counts(table[f"{name}_source"]).to_pylist():
                entry[pair["values"] or "none"] += pair["counts"]
    wanted = {task.done for task in tasks}
    for path in tasks[0].done.parent.iterdir():
        if path not in wanted:
            path.unlink()


if __name__ == "__main__":
    raise SystemExit(main("score", run, __doc__))
