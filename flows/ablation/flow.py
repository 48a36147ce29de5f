"""raphael/ablation: train the arms of a plan side by side, judge them alike, and draw the page.

Each case (an arm with a seed) is a workspace under work/spaces/ablation, brought up to date by DVC: kill it at any
moment, and the same command resumes where it stopped. Runs compare in MLflow, in the experiment raphael-ablation.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from prefect import flow

from flows.ablation.page import write_page
from flows.ablation.plan import PLAN, AblationPlan, Case, cases_of, load_plan, make_case
from flows.ablation.runs import finish_parent, mark_run, open_parent
from flows.environment import stage_environment
from flows.pipelines.dvc_stages import DVC, what_went_wrong
from flows.pipelines.stages import FLOW
from flows.serve.processes import run_group
from raphael.base.config.params import load_config
from raphael.base.stage import StageError
from raphael.base.tracking import tracker as tracking

EXPERIMENT = "raphael-ablation"
UP_TO_DATA = "encode"  # the last stage that all cases share


@flow(name=FLOW, flow_run_name="ablation")
def ablation(plan: str = str(PLAN), jobs: int = 0) -> str:
    """plan: a file like flows/plans/ablation.yaml. jobs: cases at a time, a core each; 0: one per core.

    Returns the path of the page, reports/ablation.html. Raises StageError naming the cases that failed, after the
    others are done.
    """
    return str(run(Path.cwd(), load_plan(Path(plan)), jobs or os.cpu_count() or 1))


def run(root: Path, plan: AblationPlan, jobs: int) -> Path:
    """All cases, then the page. What is done already is not done again."""
    from prefect.logging import get_run_logger

    log = get_run_logger()
    home = root / "work" / "spaces" / "ablation"
    cases = cases_of(plan, home)
    store = tracking.resolve_uri(load_config(root / "params.yaml"), root)
    common = {"tracking.uri": store, "tracking.experiment": EXPERIMENT}
    for case in cases:
        make_case(plan, case, common)
    parent = open_parent(load_config(cases[0].folder / "params.yaml"), root, home / "run.json", plan)
    log.info("%d cases of %d arms under %s, %d at a time", len(cases), len(plan.arms), home, jobs)
    runner = CaseRunner(threading.Event())
    runner.reproduce(cases[0], UP_TO_DATA)  # data and encoders, once; the others find them in the cache
    failed = run_all(runner, cases, jobs, lambda case: mark_run(case, parent), log)
    done = [case for case in cases if case.name not in failed]
    page = write_page(root, plan, done)
    finish_parent(load_config(cases[0].folder / "params.yaml"), root, parent, page)
    if failed:
        raise StageError("; ".join(failed.values()))
    return page


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
