"""Features of folders by several workers: processes here, or tasks of Ray. They meet in the cache (feature_cache.py).

Worker w of W computes every W-th block and writes each atomically, so a worker that dies is started again and
resumes behind its last block, and whoever computed a block changes no bit of it. Statistics and metrics are taken
from the blocks in their order by the one process that asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raphael.base.cores.workers import ATTEMPTS, WorkerTask, run_processes
from raphael.base.stage import StageError
from raphael.evaluate.features.cache import embed_folder
from raphael.evaluate.features.image_folder import ImageFolder, Preparation


@dataclass(frozen=True)
class Work:
    """What all workers do together. specs: feature networks as a user writes them (spaces.py). device: each one's."""

    specs: tuple[str, ...]
    folders: tuple[ImageFolder, ...]
    prepare: tuple[Preparation, int]
    cache: Path
    device: str = "cpu"


def embed_share(work: Work, worker: tuple[int, int], tick: Callable[[int], None]) -> None:
    """The blocks of one worker: (which, of how many). Raises StageError and ValueError as embed_folder does."""
    from raphael.evaluate.features.spaces import open_network

    networks = [open_network(spec, device=work.device) for spec in work.specs]
    for folder in work.folders:
        embed_folder(folder, work.prepare, networks, work.cache, worker, tick)


def embed_by_processes(
    work: Work, workers: int, task: WorkerTask = embed_share, look: Callable[[], None] = lambda: None
) -> None:
    """Processes on this machine, until every block is there (raphael/base/cores/workers.py). Raises StageError."""
    run_processes(task, work, workers, look)


def embed_on_ray(
    work: Work, workers: int, task: WorkerTask = embed_share, look: Callable[[], None] = lambda: None
) -> None:
    """Tasks of the Ray cluster that RAY_ADDRESS names, else of a private one. Images, weights and cache must be
    on a file system that all nodes see. Ray starts a task again whose worker died. Raises StageError, one line.
    """
    from raphael.base.ray_cluster import prepare_environment, reason, start, stop

    prepare_environment()
    import ray

    try:
        start(workers, "leave --ray out: --workers then are processes of this machine")
        options = {"num_cpus": 1, "num_gpus": int(work.device != "cpu"), "max_retries": ATTEMPTS - 1}
        remote = ray.remote(**options)(_on_ray)
        waiting = [remote.remote(task, _absolute(work), (which, workers)) for which in range(workers)]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=1.0)
            ray.get(done)
            look()
    except ray.exceptions.RayError as error:
        raise StageError(reason(error)) from None
    finally:
        stop()


def _on_ray(task: WorkerTask, work: Work, worker: tuple[int, int]) -> None:
    task(work, worker, lambda n: None)


def _absolute(work: Work) -> Work:
    """Ray's workers start in a folder of Ray's."""
    folders = tuple(
        ImageFolder(one.folder.absolute(), tuple(path.absolute() for path in one.files), one.listing)
        for one in work.folders
    )
    specs = []
    for spec in work.specs:
        head, colon, file = spec.rpartition(":")
        specs.append(f"{head}{colon}{Path(file).absolute()}" if Path(file).exists() else spec)
    return Work(tuple(specs), folders, work.prepare, work.cache.absolute(), work.device)
