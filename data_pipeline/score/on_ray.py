"""Shards scored by Ray Data: a pool of actors, each with one set of models, on a GPU of its own where `device` is one.

A row of the data set is a shard, so that what travels is a path and an actor reads its tar from the disk that all nodes
see. Files are the same as without Ray, because `score_shard` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.score.shard import Task, score_shard
from raphael.base.ray_cluster import prepare_environment, reason, start, stop
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from raphael.base.config.data import ScoreConfig


class ShardScorer:
    """What an actor is: models loaded once, then shard after shard."""

    def __init__(self, settings: ScoreConfig, device: str):
        from data_pipeline.score.scorer import Scorer

        self.scorer, self.batch_size = Scorer(settings, device), settings.batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"done": [str(score_shard(self.scorer, self.batch_size, task)) for task in batch["task"]]}


def score_on_ray(settings: ScoreConfig, tasks: list[Task], device: str = "cpu") -> Iterator[Path]:
    """Each finished file as it comes. Raises StageError, an actor's own line. Ray ends with it, also on Ctrl-C."""
    prepare_environment()
    import ray

    try:
        start(settings.workers, "set score.distributor to local")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        shards = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
        scored = shards.map_batches(
            ShardScorer,
            fn_constructor_args=(settings, device),
            batch_size=1,
            num_cpus=1,
            num_gpus=int(device != "cpu"),
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
        )
        for row in scored.iter_rows():
            yield Path(row["done"])
    except ray.exceptions.RayError as error:
        raise StageError(f"score: {reason(error)}") from None
    finally:
        stop()
