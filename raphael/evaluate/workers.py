"""Features of folders by several workers: processes here, or tasks of Ray. They meet in the cache (feature_cache.py).

Worker w of W computes every W-th block and writes each whole or not at all, so a worker that dies is started again and
goes on behind its last block, and whoever computed a block changes no bit of it. Statistics and metrics are taken
from the blocks in their order by the one process that asked.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from raphael.evaluate.feature_cache import embed_folder
from raphael.evaluate.picture_folder import PictureFolder, Preparation
from raphael.stage import StageError

ATTEMPTS = 3  # of a worker that dies: more often than that is no accident
LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Work:
    """What all workers do together. specs: feature networks as a user writes them (spaces.py)."""

    specs: tuple[str, ...]
    folders: tuple[PictureFolder, ...]
    prepare: tuple[Preparation, int]
    cache: Path


Job = Callable[[Work, tuple[int, int], Callable[[int], None]], None]


def embed_share(work: Work, worker: tuple[int, int], tick: Callable[[int], None]) -> None:
    """The blocks of one worker: (which, of how many). Raises StageError and ValueError as embed_folder does."""
    from raphael.evaluate.spaces import open_network

    networks = [open_network(spec) for spec in work.specs]
    for folder in work.folders:
        embed_folder(folder, work.prepare, networks, work.cache, worker, tick)


def embed_by_processes(
    work: Work, workers: int, job: Job = embed_share, look: Callable[[], None] = lambda: None
) -> None:
    """Processes on this machine, until every block is there. A worker that is killed is started again.

    look: called several times a second meanwhile. Raises StageError: a worker's own line where it failed, or that one
    died too often; all end with it.
    """
    spawn = multiprocessing.get_context("spawn")
    running: dict[int, tuple[BaseProcess, Any]] = {}
    starts = [0] * workers

    def start(which: int) -> None:
        here, there = spawn.Pipe(duplex=False)
        threads = max(1, (os.cpu_count() or 1) // workers)
        arguments = (job, work, (which, workers), threads, there)
        process = spawn.Process(target=_work, args=arguments, name=f"features-{which}", daemon=True)
        process.start()
        there.close()
        running[which], starts[which] = (process, here), starts[which] + 1

    try:
        for which in range(workers):
            start(which)
        while running:
            time.sleep(LOOK_EVERY_S)
            look()
            for which, (process, answer) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                error = _last_word(answer)
                del running[which]
                if process.exitcode == 0:
                    continue
                if error is not None or process.exitcode > 0:
                    raise StageError(error or f"worker {which} of {workers} failed; its message is above")
                if starts[which] == ATTEMPTS:
                    raise StageError(
                        f"worker {which} of {workers} died {ATTEMPTS} times (exit code {process.exitcode}; -9 is often "
                        "want of memory); what is finished stays: try again with fewer --workers"
                    )
                what = f"worker {which} of {workers} died (exit code {process.exitcode})"
                print(f"{what}; what it finished stays, it is started again", file=sys.stderr, flush=True)
                start(which)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _last_word(answer: Any) -> str | None:
    """A worker's error, None where it had no time for any."""
    try:
        return answer.recv() if answer.poll() else None
    except EOFError:
        return None


def _work(job: Job, work: Work, worker: tuple[int, int], threads: int, answer: Any) -> None:
    """In a worker's process: the job, with its share of the threads, until done, failed, or nobody waits any more."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch reads it when it is imported
    parent = os.getppid()

    def tick(_: int) -> None:
        if os.getppid() != parent:  # killed: somebody else may be at the same blocks soon
            raise SystemExit(1)

    try:
        job(work, worker, tick)
    except (StageError, ValueError) as error:
        answer.send(str(error))
        raise SystemExit(1) from None


def embed_on_ray(work: Work, workers: int, job: Job = embed_share, look: Callable[[], None] = lambda: None) -> None:
    """Tasks of the Ray cluster that RAY_ADDRESS names, else of a private one. Pictures, weights and cache must be
    on a file system that all nodes see. Ray starts a task again whose worker died. Raises StageError, one line.
    """
    from raphael.ray_cluster import prepare_environment, reason, start, stop

    prepare_environment()
    import ray
    import torch

    try:
        start(workers, "leave --ray out: --workers then are processes of this machine")
        options = {"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0, "max_retries": ATTEMPTS - 1}
        task = ray.remote(**options)(_on_ray)
        waiting = [task.remote(job, _absolute(work), (which, workers)) for which in range(workers)]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=1.0)
            ray.get(done)
            look()
    except ray.exceptions.RayError as error:
        raise StageError(reason(error)) from None
    finally:
        stop()


def _on_ray(job: Job, work: Work, worker: tuple[int, int]) -> None:
    job(work, worker, lambda n: None)


def _absolute(work: Work) -> Work:
    """Ray's workers start in a folder of Ray's."""
    folders = tuple(
        PictureFolder(one.folder.absolute(), tuple(path.absolute() for path in one.files), one.listing)
        for one in work.folders
    )
    specs = []
    for spec in work.specs:
        head, colon, file = spec.rpartition(":")
        specs.append(f"{head}{colon}{Path(file).absolute()}" if Path(file).exists() else spec)
    return Work(tuple(specs), folders, work.prepare, work.cache.absolute())
