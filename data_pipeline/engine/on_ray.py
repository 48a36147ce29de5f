"""Tasks dealt out to actors of a Ray cluster, each with one task at a time: `pipeline.address`, else the cluster that
RAY_ADDRESS names, else a Ray of this machine alone.

What travels is a task and a hash; actors read and write the workspace, which lies on a file system that all machines
share. Ray starts an actor again where there is room when its process or its machine is lost, and gives it its task
again. Plain actors and `ray.wait` rather than Ray Data: tasks are dealt out one by one as they become known, so that
memory is that of one task a worker, and they carry rows, not blocks (docs/decisions/pipeline.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_pipeline.engine.work import ATTEMPTS, Finished, Ran, Task, Work, Worker, perform, start_worker, words_of
from raphael.base.ray_cluster import prepare_environment, reason, start, stop
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from raphael.base.config.data import PipelineConfig, WorkerResources

ROOM_S = 300.0  # how long a cluster may take to have room for a first worker: a machine has to boot


class TaskWorker:
    """What an actor is. An error that a person can cause is an answer, not an exception: Ray would wrap it."""

    def __init__(self, work: Work):
        self.work = work
        self.worker: Worker | None = None

    def ready(self) -> tuple[str, Any]:
        """("node", its id) once the models are loaded."""
        import ray

        try:
            if self.worker is None:
                self.worker = start_worker(self.work)
        except (StageError, ValueError, OSError) as error:
            return "failed", words_of(error)
        return "node", ray.get_runtime_context().get_node_id()

    def perform(self, task: Task) -> tuple[str, Any]:
        kind, said = self.ready()  # a restarted actor has not been asked
        if kind == "failed":
            return kind, said
        try:
            return "done", perform(self.worker, task)
        except (StageError, ValueError, OSError) as error:
            return "failed", words_of(error)


def on_ray(pipeline: PipelineConfig, work: Work, tasks: Iterator[Task], ran: Ran) -> Finished:
    """Each task with its file as it is finished. Raises StageError. Ray ends with it, also on Ctrl-C."""
    first = next(tasks, None)
    if first is None:  # no cluster is started for nothing
        return
    if pipeline.address:
        os.environ["RAY_ADDRESS"] = pipeline.address
    prepare_environment()
    import ray

    began_s = time.monotonic()
    try:
        start(pipeline.workers, "set pipeline.engine to local")
        yield from _deal(pipeline, work, first, tasks, (ran, began_s))
    except ray.exceptions.RayError as error:
        raise StageError(reason(error)) from None
    finally:
        stop()


def _deal(
    pipeline: PipelineConfig, work: Work, first: Task, tasks: Iterator[Task], timed: tuple[Ran, float]
) -> Finished:
    import ray

    ran, began_s = timed
    options = _asked(pipeline.of(work.stage), work.device)
    _expect_room(work.stage, options)
    actor_class = ray.remote(TaskWorker).options(**options, max_restarts=-1, max_task_retries=ATTEMPTS - 1)
    asked: dict[Any, tuple[Any, Task | None]] = {}  # what is waited for -> (actor, its task; None: to be ready)
    for _ in range(pipeline.workers):
        actor = actor_class.remote(work)
        asked[actor.ready.remote()] = actor, None
    nodes: set[str] = set()
    upcoming: Task | None = first
    while asked and (upcoming is not None or any(task is not None for _, task in asked.values())):
        finished, _ = ray.wait(list(asked), timeout=None if nodes else ROOM_S)
        if not finished:
            raise StageError(_no_room(work.stage, options))
        actor, task = asked.pop(finished[0])
        kind, said = ray.get(finished[0])
        if kind == "failed":
            raise StageError(said)
        if kind == "node":
            ran.starting_s = ran.starting_s or time.monotonic() - began_s
            nodes.add(said)
            ran.workers, ran.nodes = ran.workers + 1, len(nodes)
        if upcoming is not None:
            asked[actor.perform.remote(upcoming)] = actor, upcoming
            upcoming = next(tasks, None)
        if task is not None:
            yield task, said


def _asked(resources: WorkerResources, device: str) -> dict[str, float]:
    gpus = float(device != "cpu") if resources.gpus == "auto" else resources.gpus
    memory = {"memory": resources.memory_gb * 1e9} if resources.memory_gb else {}
    return {"num_cpus": resources.cpus, "num_gpus": gpus, **memory}


def _expect_room(stage: str, options: dict[str, float]) -> None:
    """Of a Ray of this machine alone: nothing will join it."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    have = ray.cluster_resources()
    if have.get("GPU", 0.0) < options["num_gpus"] or have.get("CPU", 0.0) < options["num_cpus"]:
        raise StageError(_no_room(stage, options))


def _no_room(stage: str, options: dict[str, float]) -> str:
    import ray

    have = ray.cluster_resources()
    asks = " and ".join(f"{value:g} {name}" for name, value in _by_name(options).items() if value)
    has = ", ".join(f"{have.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
    return (
        f"pipeline.resources.{stage}: asks {asks} a worker, for which no machine of the cluster has room (all of it: "
        f"{has}); ask less, or give the cluster such a machine"
    )


def _by_name(options: dict[str, float]) -> dict[str, float]:
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "bytes of memory"}
    return {names[option]: value for option, value in options.items()}
