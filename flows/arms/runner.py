"""Cases of a study, several at a time: each brought up to date by programs of its own, which end with whoever runs
them. Kill it at any moment: the same command resumes where it stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from flows.arms.cases import Case
from flows.environment import stage_environment
from flows.pipelines.dvc_stages import DVC, what_went_wrong
from flows.serve.processes import run_group
from raphael.base.stage import StageError


def run_all(
    runner: CaseRunner, cases: list[Case], jobs: int, after: Callable[[Case], None], log: logging.Logger
) -> dict[str, str]:
    """Every case, `jobs` at a time; returns the failed ones with their reason. Being interrupted ends them all."""
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(jobs)
    waiting = {pool.submit(runner, case): case for case in cases}
    try:
        for count, future in enumerate(as_completed(waiting), 1):
            case = waiting[future]
            if (error := future.exception()) is None:
                after(case)
                log.info("%s: done (%d of %d)", case.name, count, len(cases))
            elif isinstance(error, StageError):
                failed[case.name] = str(error)
                log.error("%s", error)
            else:
                raise error
    finally:
        runner.stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


class CaseRunner:
    """Brings one case up to date by programs of its own, which end with it and when `stopped` is set."""

    def __init__(self, stopped: threading.Event):
        self.stopped = stopped

    def __call__(self, case: Case) -> None:
        self.reproduce(case, "evaluate")

    def reproduce(self, case: Case, stage: str) -> None:
        log = case.folder / "work" / "logs" / f"{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**stage_environment(case.folder), "OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)  # the settings name the store
        with open(log, "w", encoding="utf-8") as file:

            def heard(text: str) -> None:
                file.write(text)
                file.flush()

            status = run_group([*DVC, "repro", stage], case.folder, environment, heard, self._tick)
        if status:
            raise StageError(f"{case.name}: {what_went_wrong(stage, log.read_text(encoding='utf-8'))}")

    def _tick(self) -> None:
        if self.stopped.is_set():
            raise StageError("stopped")
