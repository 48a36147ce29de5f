"""Tasks dealt out to actors of a Ray cluster, each with one task at a time: `pipeline.address`, else the cluster that
RAY_ADDRESS names, else a Ray of this machine alone.

What travels is a task and a hash; actors read and write the workspace, which lies on a file system that all machines
share. Plain actors and `ray.wait` rather than Ray Data: tasks are dealt out one by one as they become known, so that
memory is that of one task a worker, and they carry rows, not blocks (docs/decisions/pipeline.md).
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipeline.engine.work import ATTEMPTS, Finished, Ran, Task, Work, perform, start_worker, words_of
from raphael.base.ray_cluster import prepare_environment, reason, start, stop
from raphael.base.stage import StageError

if TYPE_CHECKING:
    from raphael.base.config.data import PipelineConfig, WorkerResources

ROOM_S = 300.0  # how long a cluster may take to have room for a first worker: a machine has to boot


class TaskWorker:
    """What an actor is. An error that a person can cause is an answer, not an exception: Ray would wrap it."""

    def __init__(self, work: Work):
        self.work, self.worker = work, None

    def ready(self) -> tuple[str, Any]:
        """("node", its id) once the models are loaded."""
        import ray

        try:
            self.worker = start_worker(self.work)
        except (StageError, ValueError, OSError) as error:
            return "failed", words_of(error)
        return "node", ray.get_runtime_context().get_node_id()

    def perform(self, task: Task) -> tuple[str, Any]:
        try:
            return "done", perform(self.worker, task, self.work.keep)
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
        yield from _Dealing(pipeline, work, ran, began_s).results(itertools.chain([first], tasks))
    except ray.exceptions.RayError as error:
        raise StageError(reason(error)) from None
    finally:
        stop()


class _Dealing:
    """Tasks to actors, one each at a time. An actor that is lost, with its process or its machine, is not waited for:
    its task goes to whoever is free next, and a new actor starts where there is room."""

    def __init__(self, pipeline: PipelineConfig, work: Work, ran: Ran, began_s: float):
        import ray

        self.work, self.ran, self.began_s = work, ran, began_s
        self.options = _asked(pipeline.of(work.stage), work.device)
        _expect_room(work.stage, self.options)
        # no retries of Ray's own: it asks a machine that is gone until it knows that, and then gives up
        self.make = ray.remote(TaskWorker).options(**self.options, max_restarts=0, max_task_retries=0)
        self.asked: dict[Any, _Asked] = {}  # what is waited for
        self.nodes: set[str] = set()
        self.ready = self.still_born = 0
        for _ in range(pipeline.workers):
            self.add()

    def add(self) -> None:
        actor = self.make.remote(self.work)
        self.asked[actor.ready.remote()] = _Asked(actor)

    def results(self, tasks: Iterator[Task]) -> Finished:
        again: list[tuple[Task, int]] = []
        free: list[Any] = []
        upcoming = next(tasks, None)
        while upcoming is not None or again or any(asked.task is not None for asked in self.asked.values()):
            while free and (again or upcoming is not None):
                task, attempt = again.pop() if again else (upcoming, 1)
                if attempt == 1:
                    upcoming = next(tasks, None)
                actor = free.pop()
                self.asked[actor.perform.remote(task)] = _Asked(actor, task, attempt)
            asked, answer = self._wait()
            if answer is None:
                again += self._lost(asked)
                self.add()
                continue
            free.append(asked.actor)
            if asked.task is not None:
                yield asked.task, answer

    def _wait(self) -> tuple[_Asked, Any]:
        """(who was asked, the answer; None of one that is lost)."""
        import ray

        is_busy = any(asked.task is not None for asked in self.asked.values())
        finished, _ = ray.wait(list(self.asked), timeout=None if is_busy else ROOM_S)
        if not finished:
            raise StageError(_no_room(self.work.stage, self.options))
        asked = self.asked.pop(finished[0])
        try:
            kind, said = ray.get(finished[0])
        except ray.exceptions.RayTaskError:  # a fault of the worker's code
            raise
        except ray.exceptions.RayError as error:
            asked.lost = reason(error).split(". ")[0]  # Ray goes on about what may be set
            return asked, None
        if kind == "failed":
            raise StageError(said)
        if kind == "node":
            self.ran.starting_s = self.ran.starting_s or time.monotonic() - self.began_s
            self.nodes.add(said)
            self.ready += 1
            self.ran.workers, self.ran.nodes = max(self.ran.workers, self.ready), len(self.nodes)
        return asked, said

    def _lost(self, asked: _Asked) -> list[tuple[Task, int]]:
        """What is to be done again. Raises StageError where workers die too often."""
        import ray

        ray.kill(asked.actor)  # it may only be out of reach
        self.still_born += asked.task is None
        self.ready -= asked.task is not None
        if ATTEMPTS in (self.still_born, asked.attempt if asked.task is not None else 0):
            where = "as they started" if asked.task is None else f"at {asked.task.done.name}"
            raise StageError(f"workers died {ATTEMPTS} times {where} ({asked.lost}); what is finished stays")
        print(f"{self.work.stage}: a worker died ({asked.lost}); its task is done again", file=sys.stderr, flush=True)
        return [] if asked.task is None else [(asked.task, asked.attempt + 1)]


@dataclass
class _Asked:
    """An actor that has a task; None: that it should become ready. lost: why it did not answer."""

    actor: Any
    task: Task | None = None
    attempt: int = 0
    lost: str = ""


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
