"""A worker's task that is killed behind its first block, once. A module of its own: another process imports it."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DiesOnce:
    """task: of raphael/base/cores/workers.py. marks: a folder that remembers who has died."""

    task: Any
    marks: Path

    def __call__(self, work, worker, tick):
        mark = self.marks / f"died-{worker[0]}"

        def ticking(count):
            tick(count)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        self.task(work, worker, ticking)
