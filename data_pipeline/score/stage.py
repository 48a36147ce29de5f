"""Scores that the list lacks, computed from the images: data/shards/ -> data/scores/.

One table a shard: for every score that is configured its value and where it comes from, "list" or "computed". With
nothing configured the folder says so and `filter` reads the list's scores alone. A finished shard is kept in
work/score/ by the hash of its table, of the list's scores and of the models, so that a killed run resumes and a changed
shard is scored alone. Shards are the tasks that `pipeline` spreads (data_pipeline/engine).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.places import LINKS, SCORED, SCORES_FACTS, SHARDS
from data_pipeline.common.schema import ID, STATUS, SUCCESS
from data_pipeline.common.shard_rows import ListScores, shard_tables
from data_pipeline.common.tables import open_parquet
from data_pipeline.engine.partitions import partitions
from data_pipeline.engine.run import device_of as engine_device
from data_pipeline.engine.run import finish
from data_pipeline.engine.work import Work
from data_pipeline.score.shard import COMPUTED, LIST, ShardScorer, Task
from raphael.base.stage import Stage, StageError, file_sha256, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from raphael.base.config.data import ScoreConfig
    from raphael.base.config.params import Config

KEPT = "shards"
Counts = dict[str, dict[str, int]]  # score -> where it is from -> rows


def device_of(config: Config) -> torch.device | None:
    """What the models compute on; None where no score is computed. Raises ConfigError."""
    return engine_device(config, "score") if config.score.computed else None


def run(config: Config, stage: Stage) -> None:
    settings = config.score
    tables = shard_tables(SHARDS)
    stage.expect_whole(LINKS, *tables)
    work = stage.workdir(*_identity(settings))
    fresh = work / "out"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    counts: Counts = {}
    total = sum(int(_success(open_parquet(table).read(columns=[STATUS])).sum()) for table in tables)
    engine: dict[str, str] = {}
    if settings.computed:
        (work / KEPT).mkdir(exist_ok=True)
        device, scored = str(device_of(config)), {}  # shard's table -> its scores

        def tasks() -> Iterator[Task]:
            for task in _tasks(settings, tables, work / KEPT):
                scored[task.table] = task.done
                yield task

        shards = Work(stage.name, stage.root, ShardScorer, (settings, device), device)
        with partitions(config.pipeline, work, stage) as pieces, stage.progress(len(tables), "shards") as bar:
            engine = finish(config.pipeline, shards, tasks(), pieces, stage, bar)
        _publishable(settings, scored, fresh, counts)
    facts = {"computed": list(settings.computed), "sources": counts}
    write_json(fresh / SCORES_FACTS, facts)
    stage.publish(fresh, SCORED)
    stage.report(total, total, **engine, **facts)


def _identity(settings: ScoreConfig) -> list[Any]:
    """What a score depends on beside image and caption: the models' bytes, and whether the list's are replaced. A
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


def _publishable(
    settings: ScoreConfig, scored: dict[Path, Path], fresh: Path, counts: dict[str, dict[str, int]]
) -> None:
    """Copy each shard's scores under the shard's name, and count the sources; forget shards that are no more."""
    import pyarrow.compute as pc

    for table, done in scored.items():
        shutil.copyfile(done, fresh / table.name)
        rows = open_parquet(done).read()
        for name in settings.computed:
            entry = counts.setdefault(name, {LIST: 0, COMPUTED: 0, "none": 0})
            for pair in pc.value_counts(rows[f"{name}_source"]).to_pylist():
                entry[pair["values"] or "none"] += pair["counts"]
    wanted = set(scored.values())
    for path in next(iter(wanted)).parent.iterdir():
        if path not in wanted:
            path.unlink()
