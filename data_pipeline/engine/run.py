"""`finish`: the tasks of a stage, done wherever `pipeline` in params.yaml says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from data_pipeline.engine.work import Finished, Ran, Task, Work, perform
from raphael.base import devices
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import Progress, Stage

if TYPE_CHECKING:
    import torch

    from raphael.base.config.data import PipelineConfig
    from raphael.base.config.params import Config


def device_of(config: Config, stage: str) -> torch.device:
    """What the stage's workers compute on. Of a cluster a GPU is not looked for here: where `device` or the stage's
    resources ask for one, it is asked of the cluster. Raises ConfigError."""
    pipeline, gpus = config.pipeline, config.pipeline.of(stage).gpus
    if pipeline.engine == "ray" and (pipeline.address or os.environ.get("RAY_ADDRESS")):
        if config.device == "cuda" or (config.device == "auto" and gpus != "auto" and gpus > 0):
            import torch

            return torch.device(devices.GPU)
    return devices.resolve(config.device)


def is_here(pipeline: PipelineConfig) -> bool:
    """Whether the stage's own process does the work."""
    return pipeline.engine == "local" and pipeline.workers == 1


def finish(
    pipeline: PipelineConfig, work: Work, tasks: Iterable[Task], pieces: Pieces, stage: Stage, bar: Progress
) -> dict[str, str]:
    """Until every task's file is listed in `pieces`; those that are stay as they are. pieces: of `partitions`, which
    says where files go. tasks: taken as workers become free, and not held. Returns what the stage's report says of it.
    Raises StageError: a worker's own line, that one died too often, or what the engine or the store lacks."""
    ran, work = Ran(pipeline.engine), replace(work, keep=getattr(pieces, "keep", None))

    def waiting() -> Iterator[Task]:
        for task in tasks:
            if pieces.has(task.done):
                bar.update(task.count)
            else:
                ran.partitions += 1
                yield task

    with contextlib.closing(run(pipeline, work, waiting(), ran)) as finished:  # its workers end with it, whatever comes
        for task, done in finished:
            pieces.add(task.done, known={task.done: (done.bytes, done.xxh3)})
            bar.update(task.count)
    stage.timings["engine"] = ran.timings()
    return {"engine": pipeline.engine}


def run(pipeline: PipelineConfig, work: Work, tasks: Iterator[Task], ran: Ran) -> Finished:
    """Each task with its file as it is finished, in any order."""
    if pipeline.engine == "ray":
        from data_pipeline.engine.on_ray import on_ray

        return on_ray(pipeline, work, tasks, ran)
    if is_here(pipeline):
        return _in_this_process(work, tasks, ran)
    from data_pipeline.engine.processes import on_processes

    return on_processes(pipeline.workers, work, tasks, ran)


def _in_this_process(work: Work, tasks: Iterator[Task], ran: Ran) -> Finished:
    """Models are loaded only where there is something to do."""
    worker = None
    for task in tasks:
        if worker is None:
            worker, ran.workers = (work.here or (lambda: work.make(*work.arguments)))(), 1
        yield task, perform(worker, task, work.keep)
