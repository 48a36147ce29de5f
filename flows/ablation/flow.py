"""raphael/ablation: train the arms of a plan side by side, judge them alike, and draw the page.

Each case (an arm with a seed) is a workspace under work/spaces/ablation, brought up to date by DVC: kill it at any
moment, and the same command resumes where it stopped. Runs compare in MLflow, in the experiment raphael-ablation.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from prefect import flow

from flows.ablation.page import write_page
from flows.ablation.plan import PLAN, AblationPlan, cases_of, load_plan, make_case
from flows.arms.runner import CaseRunner, run_all
from flows.arms.runs import Study, finish_parent, mark_run, open_parent
from flows.pipelines.stages import FLOW
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
    study = Study("ablation", plan.sha256, plan.about)
    parent = open_parent(load_config(cases[0].folder / "params.yaml"), root, home / "run.json", study)
    log.info("%d cases of %d arms under %s, %d at a time", len(cases), len(plan.arms), home, jobs)
    runner = CaseRunner(threading.Event())
    runner.reproduce(cases[0], UP_TO_DATA)  # data and encoders, once; the others find them in the cache
    failed = run_all(runner, cases, jobs, lambda case: mark_run(case, parent, study), log)
    done = [case for case in cases if case.name not in failed]
    page = write_page(root, plan, done)
    finish_parent(load_config(cases[0].folder / "params.yaml"), root, parent, page)
    if failed:
        raise StageError("; ".join(failed.values()))
    return page
