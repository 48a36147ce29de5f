"""Scores that the list lacks, computed from the images: data/shards/ -> data/scores/.

One table a shard: for every score that is configured its value and where it comes from, "list" or "computed". With
nothing configured the folder says so and `filter` reads the list's scores alone. A finished shard is kept in
work/score/ by the hash of its table, of the list's scores and of the models, so that a killed run resumes and a changed
shard is scored alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.places import LINKS, SCORED, SCORES_FACTS, SHARDS
from data_pipeline.common.schema import ID, STATUS, SUCCESS
from data_pipeline.common.shard_rows import ListScores, shard_tables
from data_pipeline.common.tables import open_parquet
from data_pipeline.score.shard import COMPUTED, LIST, Task, score_shard
from raphael.base import devices
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import Stage, StageError, file_sha256, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from raphael.base.config.data import ScoreConfig
    from raphael.base.config.params import Config

KEPT = "shards"


def device_of(config: Config) -> torch.device | None:
    """What the models compute on; None where no score is computed. Raises ConfigError.

    Ray's workers may be on other machines: with RAY_ADDRESS a GPU that is asked for is asked of that cluster.
    """
    if not config.score.computed:
        return None
    if config.score.distributor == "ray" and os.environ.get("RAY_ADDRESS") and config.device == "cuda":
        import torch

        return torch.device(devices.GPU)
    return devices.resolve(config.device)


def run(config: Config, stage: Stage) -> None:
    settings = config.score
    tables = shard_tables(SHARDS)
    stage.expect_whole(LINKS, *tables)
    work = stage.workdir(*_identity(settings))
    fresh = work / "out"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    counts: dict[str, dict[str, int]] = {}
    total = sum(int(_success(open_parquet(table).read(columns=[STATUS])).sum()) for table in tables)
    if settings.computed:
        (work / KEPT).mkdir(exist_ok=True)
        tasks, pieces = list(_tasks(settings, tables, work / KEPT)), Pieces(work, stage.name)
        waiting = [task for task in tasks if not pieces.has(task.done)]
        with stage.progress(len(tasks), "shards", initial=len(tasks) - len(waiting)) as bar:
            for finished in _score(settings, waiting, str(device_of(config))):
                pieces.add(finished)
                bar.update()
        _publishable(tasks, fresh, counts)
    facts = {"computed": list(settings.computed), "sources": counts}
    write_json(fresh / SCORES_FACTS, facts)
    stage.publish(fresh, SCORED)
    stage.report(total, total, **facts)


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


def _score(settings: ScoreConfig, tasks: list[Task], device: str) -> Iterator[Path]:
    """Score the shards, each finished file yielded as it comes."""
    if not tasks:
        return
    if settings.distributor == "ray":
        from data_pipeline.score.on_ray import score_on_ray

        yield from score_on_ray(settings, tasks, device)
        return
    from data_pipeline.score.scorer import Scorer

    scorer = Scorer(settings, device)
    for task in tasks:
        yield score_shard(scorer, settings.batch_size, task)


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
