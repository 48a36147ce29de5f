"""Tasks dealt out to processes of this machine, each with one task at a time.

A worker that is killed loses that task, which another does again; what was finished stays. Workers end with the stage,
also where it is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

from data_pipeline.engine.work import ATTEMPTS, Finished, Ran, Task, Work, perform, start_worker, words_of
from raphael.base.cores.threads import available
from raphael.base.stage import StageError

READY, DONE, FAILED = "ready", "done", "failed"  # what a worker says
ENDING_S = 5.0


class _Process:
    """A worker's process, and our end of its pipe."""

    def __init__(self, work: Work, threads: int):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(work, there, threads), name=work.stage, daemon=True)
        self.process.start()
        there.close()  # so that the pipe ends with the process
        self.is_ready, self.task, self.attempts = False, None, 0

    def give(self, task: Task, attempts: int) -> None:
        self.task, self.attempts = task, attempts
        with contextlib.suppress(OSError):  # it has died: reading says so
            self.pipe.send(task)

    def answer(self) -> tuple[str, Any] | None:
        """None where it has died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(ENDING_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def on_processes(workers: int, work: Work, tasks: Iterator[Task], ran: Ran) -> Finished:
    """Each task with its file as it is finished. So many tasks as there are workers are looked ahead."""
    began_s, threads = time.monotonic(), max(1, available() // workers)
    pending: deque[tuple[Task, int]] = deque()  # (task, which attempt)
    running: list[_Process] = []
    still_born = 0
    try:
        while True:
            pending.extend((task, 1) for task in islice(tasks, workers - len(pending)))
            for process in running:
                if pending and process.is_ready and process.task is None:
                    process.give(*pending.popleft())
            busy = sum(process.task is not None for process in running)
            if not busy and not pending:
                return
            while len(running) < min(workers, busy + len(pending)):
                running.append(_Process(work, threads))
            for pipe in wait([process.pipe for process in running]):
                process = next(process for process in running if process.pipe is pipe)
                kind, said = process.answer() or (None, None)
                if kind == READY:
                    process.is_ready, ran.starting_s = True, ran.starting_s or time.monotonic() - began_s
                    ran.workers = max(ran.workers, sum(process.is_ready for process in running))
                elif kind == DONE:
                    task, process.task = process.task, None
                    yield task, said
                elif kind == FAILED:
                    raise StageError(said)
                else:
                    running.remove(process)
                    still_born += not process.is_ready
                    pending.extendleft(_of_a_dead(process, work, still_born))
    finally:
        for process in running:
            process.end()


def _of_a_dead(process: _Process, work: Work, still_born: int) -> list[tuple[Task, int]]:
    """What is to be done again. Raises StageError where it failed by itself, or too often."""
    process.process.join(ENDING_S)  # it may still be at its last words
    process.end()
    code, task = process.process.exitcode, process.task
    if code is not None and code > 0:
        raise StageError("a worker failed; its message is above")
    where = f"at {task.done.name}" if task is not None else "as they started"
    if ATTEMPTS in (still_born, process.attempts if task is not None else 0):
        raise StageError(
            f"workers died {ATTEMPTS} times {where} (exit code {code}; -9 is often want of memory); what is finished "
            "stays: try again with fewer pipeline.workers"
        )
    print(f"{work.stage}: a worker died (exit code {code}); its task is done again", file=sys.stderr, flush=True)
    return [] if task is None else [(task, process.attempts + 1)]


def _serve(work: Work, pipe: Connection, threads: int) -> None:
    """In a worker's process: task after task, until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the stage ends its workers
    os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        try:
            worker = start_worker(work)
            pipe.send((READY, None))
            while True:
                task = pipe.recv()
                pipe.send((DONE, perform(worker, task, work.keep)))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except (StageError, ValueError, OSError) as error:
            pipe.send((FAILED, words_of(error)))


def _leave_with(parent: int) -> None:
    """End this process when the one that started it was killed: somebody else may be at the same tasks soon."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
