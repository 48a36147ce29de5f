"""Work dealt out to processes of this machine: started again when they die, ended with whoever started them.

Worker w of W does every W-th block and writes each atomically, so a worker that dies is started again and resumes
behind its last block, and whoever did a block changes no bit of it: each computes by as many threads, whatever W is.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from raphael.base.cores.threads import wait_passively
from raphael.base.stage import StageError

ATTEMPTS = 3  # of a worker that dies: more often than that is no accident
LOOK_EVERY_S = 0.2

# task(work, (which, of how many), tick): to be called after each block, with their number
WorkerTask = Callable[[Any, tuple[int, int], Callable[[int], None]], None]


def run_processes(
    task: WorkerTask,
    work: Any,
    workers: int,
    look: Callable[[], None] = lambda: None,
    threads: int = 0,
    advice: str = "try again with fewer --workers",
) -> None:
    """Until every worker is done. task: a function of a module; it and `work` are pickled.

    look: called several times a second meanwhile. threads: of each process; 0: its share of the cores. advice: what to
    do where workers die, for the message. Raises StageError: a worker's own line where it failed, or that one died too
    often; all end with it.
    """
    spawn = multiprocessing.get_context("spawn")
    running: dict[int, tuple[BaseProcess, Any]] = {}
    starts = [0] * workers

    def start(which: int) -> None:
        here, there = spawn.Pipe(duplex=False)
        share = threads or max(1, (os.cpu_count() or 1) // workers)
        arguments = (task, work, (which, workers), share, there)
        process = spawn.Process(target=_work, args=arguments, name=f"worker-{which}", daemon=True)
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
                        f"want of memory); what is finished stays: {advice}"
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


def _work(task: WorkerTask, work: Any, worker: tuple[int, int], threads: int, answer: Any) -> None:
    """In a worker's process: the task, with its share of the threads, until done, failed, or nobody waits any more."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
    wait_passively()
    parent = os.getppid()

    def tick(_: int) -> None:
        if os.getppid() != parent:  # killed: somebody else may be at the same blocks soon
            raise SystemExit(1)

    try:
        task(work, worker, tick)
    except (StageError, ValueError) as error:
        answer.send(str(error))
        raise SystemExit(1) from None
