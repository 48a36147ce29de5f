"""The seam between what a data stage computes and where: tasks -> map, here or on Ray -> assembly in order.

A stage cuts its work into tasks. A worker is made once in each process and turns one task after the other into the
file that the task names, written whole. That file is a function of the task alone and counts when it is there, so
neither the number of workers, nor the order in which they finish, nor which of them died changes a byte of what the
stage joins from the files in its own order; a task that is done twice is done the same. There is nothing else: no
queue, no shuffle, no state between tasks.

To add a stage: a `Work`, tasks with `done` and `count`, `finish` (data_pipeline/engine/run.py) instead of a loop, and
its name in STAGES_ON_ENGINE (raphael/base/config/data.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from raphael.base.cores.threads import wait_passively
from raphael.base.files import file_xxh3
from raphael.base.stage import StageError

Finished = Generator[tuple["Task", "Done"], None, None]  # each task with its file, in any order
ATTEMPTS = 3  # at a task whose worker died: more often than that is no accident


class Task(Protocol):
    """Pickled on its way to a worker: what it holds is small, what it names is absolute or lies in the workspace."""

    @property
    def done(self) -> Path:
        """The file that it becomes, absolute."""

    @property
    def count(self) -> int:
        """How much of the bar it is."""


Worker = Callable[[Any], Path]  # writes a task's file, whole (raphael.base.files.written_whole); returns its path


@dataclass(frozen=True)
class Keep:
    """The objects that the files of a work folder become, below `place` of a store (engine/partitions.py)."""

    address: str
    place: str
    folder: Path

    def name(self, path: Path, size: int, xxh3: str) -> str:
        return f"{self.place}/{path.relative_to(self.folder).as_posix()}.{size}.{xxh3}"

    def put(self, done: Done) -> None:
        """Send a finished file and remove it here. Raises StoreError."""
        from raphael.base.store.objects import open_store

        open_store(self.address).put(done.path, self.name(done.path, done.bytes, done.xxh3))
        done.path.unlink()


@dataclass(frozen=True)
class Work:
    """What the workers of a stage are.

    make: a function or class of a module; make(*arguments) is a Worker, in a process whose folder is `root`. device:
    torch's name of what each computes on. here: in the place of make(*arguments) where this process works itself, for
    a stage that has made one already. keep: where a finished file goes; None: it stays.
    """

    stage: str
    root: Path
    make: Callable[..., Worker]
    arguments: tuple[Any, ...] = ()
    device: str = "cpu"
    here: Callable[[], Worker] | None = field(default=None, compare=False)
    keep: Keep | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "here": None}  # it stays here


@dataclass(frozen=True)
class Done:
    """A task's file, as its worker left it; hashed there, so that whoever asked need not read it."""

    path: Path
    bytes: int
    xxh3: str


@dataclass
class Ran:
    """How a map went. starting_s: until the first worker was ready; nodes: machines that had one."""

    engine: str
    workers: int = 0
    nodes: int = 1
    partitions: int = 0
    starting_s: float = 0.0

    def timings(self) -> dict[str, Any]:
        return {name: round(value, 3) for name, value in vars(self).items() if name != "engine"}


def perform(worker: Worker, task: Task, keep: Keep | None = None) -> Done:
    path = worker(task)
    assert path == task.done, (path, task.done)
    done = Done(path, path.stat().st_size, file_xxh3(path))
    if keep is not None:
        keep.put(done)
    return done


def start_worker(work: Work) -> Worker:
    """In a process of its own: from the workspace, so that names in the settings mean what they mean there."""
    if not work.root.is_dir():
        raise StageError(
            f"{work.stage}: {work.root}: no such folder on this machine; workers need the workspace where it is here: "
            "a file system that all machines share"
        )
    os.chdir(work.root)
    wait_passively()
    return work.make(*work.arguments)


def words_of(error: BaseException) -> str:
    """The line that a person needs of what a user can cause."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error)
