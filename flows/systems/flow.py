"""raphael/systems: the systems side by side at equal counted FLOP, and the page that compares them.

Each case (an arm with a seed) is a workspace under work/spaces/systems, brought up to date by DVC: kill it at any
moment, and the same command resumes where it stopped. What a case came to is written as it ends, to
reports/systems/ARM-SEED.json. Runs compare in MLflow, in the experiment raphael-systems, as children of one run.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from prefect import flow

from flows.arms.cases import Case
from flows.arms.runner import CaseRunner, run_all
from flows.arms.runs import Study, finish_parent, mark_run, open_parent
from flows.pipelines.stages import FLOW
from flows.systems.page import write_page
from flows.systems.plan import PLAN, Budget, SystemsPlan, budgets, cases_of, load_plan, make_case
from flows.systems.results import read_case
from raphael.base.config.params import load_config
from raphael.base.stage import StageError, read_json, write_json
from raphael.base.tracking import tracker as tracking

EXPERIMENT = "raphael-systems"
UP_TO_DATA = "encode"  # the last stage that cases of one system share


@flow(name=FLOW, flow_run_name="systems")
def systems(plan: str = str(PLAN), jobs: int = 0) -> str:
    """plan: a file like flows/plans/systems.yaml. jobs: cases at a time, a core each; 0: one per core.

    Returns the path of the page, reports/systems.html. Raises StageError naming the cases that failed, after the
    others are done, and ConfigError, one line, before anything is made.
    """
    return str(run(Path.cwd(), load_plan(Path(plan)), jobs or os.cpu_count() or 1))


def run(root: Path, plan: SystemsPlan, jobs: int) -> Path:
    """All cases, then the page. What is done already is not done again."""
    from prefect.logging import get_run_logger

    log, home, counted = get_run_logger(), root / "work" / "spaces" / "systems", budgets(plan)
    cases = cases_of(plan, home)
    store = tracking.resolve_uri(load_config(root / "params.yaml"), root)
    common = {"tracking.uri": store, "tracking.experiment": EXPERIMENT}
    for case in cases:
        make_case(plan, case, counted[case.arm], common)
    config, study = load_config(cases[0].folder / "params.yaml"), Study("systems", plan.sha256, plan.about)
    parent = open_parent(config, root, home / "run.json", study)
    for arm, budget in counted.items():
        log.info("%s: %d images, %.4g FLOP (%s)", arm, budget.num_images, budget.flop, budget.parts)
    runner = CaseRunner(threading.Event())
    for case in {
        case.arm: case for case in reversed(cases)
    }.values():  # data and encoders: each once, then in the cache
        runner.reproduce(case, UP_TO_DATA)

    def ended(case: Case) -> None:
        mark_run(case, parent, study)
        write_case(root, plan, case, counted[case.arm])

    failed = run_all(runner, cases, jobs, ended, log)
    done = [case for case in cases if case.name not in failed]
    if len({case.arm for case in done}) < 2:
        raise StageError("; ".join(failed.values()))
    page = write_page(root, plan, done, [read_json(file_of(root, case)) for case in done])
    finish_parent(config, root, parent, page)
    if failed:
        raise StageError("; ".join(failed.values()))
    return page


def write_case(root: Path, plan: SystemsPlan, case: Case, budget: Budget) -> None:
    file = file_of(root, case)
    before: dict[str, Any] = read_json(file) if file.is_file() else {}
    write_json(file, read_case(plan, case, budget, before))


def file_of(root: Path, case: Case) -> Path:
    """Where a case's numbers lie from its end on."""
    return root / "reports" / "systems" / f"{case.name}.json"
