"""A stage that DVC brings up to date while the main thread is at the one before it in the order.

The flow runs one stage after another, each in the main thread, where Prefect raises its cancellation. Where a stage
needs nothing of the one before it, a thread begins it already: `clip` is trained on one core while `autoencoder` is on
the other. When its turn comes, the main thread waits for it and hands on what it said. What ends the flow ends it too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from flows.pipelines.dvc_stages import reproduce
from raphael.base.stage import StageError

TICK_S = 1.0


class Beside:
    """Begins at once."""

    def __init__(self, root: Path, stage: str):
        self.root, self.stage = root, stage
        self._said: list[str] = []
        self._result, self._error = "", None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"beside-{stage}", daemon=True)
        self._thread.start()

    def wait(self, on_text: Callable[[str], None], on_tick: Callable[[], None]) -> str:
        """As `reproduce`: what became of the stage, or its StageError."""
        while True:
            self._thread.join(TICK_S)
            while self._said:
                on_text(self._said.pop(0))
            if not self._thread.is_alive():
                break
            on_tick()
        if self._error is not None:
            raise self._error
        return self._result

    def end(self) -> None:
        """Until nothing of it runs any more; a training saves first."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._result = reproduce(self.root, self.stage, self._said.append, self._look, True)
        except BaseException as error:
            self._error = error

    def _look(self) -> None:
        if self._ending.is_set():  # whatever leaves run_group ends the stage's whole family
            raise StageError(f"{self.stage}: ended with its flow; the same command resumes from here")


def next_beside(stages: list[str], name: str, needs: dict[str, set[str]]) -> str | None:
    """The stage behind `name`, where it needs nothing of it."""
    following = stages[stages.index(name) + 1 :][:1]
    return following[0] if following and name not in needs[following[0]] else None
