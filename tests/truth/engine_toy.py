"""A stage of numbers for tests of data_pipeline/engine: a task's file holds the squares of its numbers. Workers pause,
die and fail where they are told."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from raphael.base.files import written_whole
from raphael.base.stage import StageError


@dataclass(frozen=True)
class Squares:
    """dies: SIGKILL at this task, as long as there are fewer than so many files `died-*` beside its own."""

    done: Path
    numbers: tuple[int, ...]
    pause_s: float = 0.0
    dies: int = 0
    fails: str = ""

    @property
    def count(self) -> int:
        return len(self.numbers)


class Squarer:
    """fault: of a worker as it starts: "" for none, "dies", or what it says. words: of what it is asked."""

    def __init__(self, fault: str = "", relative: str = "settings.json"):
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault:
            raise StageError(fault)
        self.power = json.loads(Path(relative).read_text())["power"]  # of the workspace: by a name in it
        Path(f"work/worker-{os.getpid()}").touch()

    def __call__(self, task: Squares) -> Path:
        if task.pause_s > 1:
            (task.done.parent / f"begun-{os.getpid()}").touch()
        time.sleep(task.pause_s)
        if len(list(task.done.parent.glob("died-*"))) < task.dies:
            (task.done.parent / f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if task.fails == "bug":
            raise ZeroDivisionError("a bug of the toy")
        if task.fails:
            raise StageError(task.fails)
        with written_whole(task.done) as temporary:
            temporary.write_text("\n".join(str(number**self.power) for number in task.numbers))
        return task.done


def forever(root: str, workers: int) -> None:
    """A stage that a test kills: its tasks take a minute each."""
    from data_pipeline.engine.run import finish
    from data_pipeline.engine.work import Work
    from raphael.base.config.data import PipelineConfig
    from raphael.base.integrity.pieces import Pieces
    from raphael.base.stage import Stage

    stage, work = Stage("squares", root), Path(root) / "work"
    tasks = [Squares(work / f"{number}.txt", (number,), 60.0) for number in range(9)]
    toy = Work("squares", Path(root), Squarer)
    with stage.progress(9, "numbers") as bar:
        finish(PipelineConfig(workers=workers), toy, tasks, Pieces(work, "squares"), stage, bar)
