"""A Prefect task is one stage, run through DVC, nothing more; a flow runs some of them in order."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from flows.pipelines.beside import Beside, next_beside
from flows.pipelines.dvc_stages import StageEntry, ancestors, out_of_date, read_pipeline, reproduce
from flows.pipelines.tracked_runs import flow_run_name, one_run_over_all
from flows.workspace import settings
from raphael.base.code.stage_code import undeclared
from raphael.base.cores.threads import available
from raphael.base.stage import StageError, only_run, read_json
from raphael.base.strict import ConfigError

FLOW = "raphael"  # all flows share the name: Prefect calls a deployment <flow>/<deployment>
PROGRESS_EVERY_TICKS = 5


def run_stages(stages: list[str], overrides: dict[str, Any] | None = None, root: Path | None = None) -> dict[str, str]:
    """Bring `stages` up to date in this order, in the workspace `root` (default: the current folder).

    overrides: {"generate.seed": 1}: written into params.yaml first, once it is known that the result loads.
    Returns what became of each stage: "ran", "restored" or "up to date". Raises StageError or ConfigError, one line,
    also where another flow is going on in the workspace.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
    root = (root or Path.cwd()).resolve()
    with only_run("flow", root):  # another flow's overrides would reach the stages of this one that are still to come
        return _run_stages(stages, overrides or {}, root)


def _run_stages(stages: list[str], overrides: dict[str, Any], root: Path) -> dict[str, str]:
    pipeline = read_pipeline(root)
    config = settings.apply(root / "params.yaml", overrides)
    needs = ancestors(pipeline)
    stale = out_of_date(root)
    missing = {name for stage in stages for name in needs[stage] if name in stale} - set(stages)
    if missing:
        names = ", ".join(name for name in pipeline if name in missing)
        raise StageError(f"{stages[0]}: what it needs is out of date: {names}; run raphael/full, or those first")
    # DVC sees versions: a change that nobody judged would pass in silence
    for line in undeclared(root, stages, config.model.system):
        _logger().warning("%s", line)
    outcome: dict[str, str] = {}

    def look(name: str) -> bool:
        return name in stale or any(outcome.get(parent) in ("ran", "restored") for parent in needs[name])

    with one_run_over_all(root, flow_run_name(), outcome), contextlib.ExitStack() as running:
        begun: dict[str, Beside] = {}
        for name in stages:
            following = next_beside(stages, name, needs) if available() > 1 and name not in begun else None
            if following and look(name) and look(following):
                _logger().info("%s: begins beside %s, of which it needs nothing", following, name)
                begun[following] = Beside(root, following)
                running.callback(begun[following].end)
            outcome[name] = _stage_task(pipeline[name], begun)(name, str(root), look(name))
            begun.pop(name, None)
    publish_summary(root, outcome)
    return outcome


def _stage_task(stage: StageEntry, begun: dict[str, Beside]) -> Any:
    """begun: stages that run already, in a thread of their own; no parameters of the task, which Prefect would keep."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    def run(name: str, root: str, look: bool) -> str:
        return _run_stage(name, root, look, begun)

    return task(
        run,
        name=stage.name,
        task_run_name=stage.name,
        cache_policy=NO_CACHE,  # DVC knows whether the files are still there; Prefect does not
        retries=2 if stage.meta.get("network") else 0,  # it resumes where it stopped
        retry_delay_seconds=[2, 20] if stage.meta.get("network") else None,
    )


def _run_stage(name: str, root: str, look: bool, begun: dict[str, Beside]) -> str:
    """One stage. Runs in the main thread, where Prefect raises its cancellation: `finally` ends the stage's group."""
    logger = _logger()
    if not look:
        logger.info("%s: up to date", name)
        return "up to date"
    progress = _Progress(name, Path(root) / "work" / "progress" / f"{name}.json")
    if name in begun:
        result = begun[name].wait(_Lines(logger), progress.tick)
    else:
        result = reproduce(Path(root), name, _Lines(logger), progress.tick, bool(begun))
    progress.end()
    if result != "ran":
        logger.info("%s: %s", name, result)
    return result


def _without_traceback(record: logging.LogRecord) -> bool:
    """What a user can cause is one line in Prefect's log, too; programming errors keep their traceback."""
    if record.exc_info and isinstance(record.exc_info[1], StageError | ConfigError):
        record.exc_info = None
    return True


# What DVC advises after every stage (--quiet would silence the stage's own output, too)
ADVICE = re.compile(
    r"\s*(To track the changes with git, run:|git add dvc\.lock|To enable auto staging, run:|"
    r"dvc config core\.autostage true|Use `dvc push` to send your updates to remote storage\.)"
)


class _Lines:
    """Hands whole lines to the log. Progress bars rewrite their line by a carriage return: only a rewritten line's last
    state is logged, and on a terminal the text goes there as it is."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter):
        import sys

        self.logger, self.rest, self.terminal = logger, "", sys.stderr if sys.stderr.isatty() else None

    def __call__(self, text: str) -> None:
        if self.terminal:
            self.terminal.write(text)
            self.terminal.flush()
            return
        *lines, self.rest = re.split(r"\r?\n", self.rest + text)
        for line in lines:
            line = line.rsplit("\r", 1)[-1].rstrip()
            if line and not ADVICE.fullmatch(line):
                self.logger.info("%s", line)


class _Progress:
    """The stage's work/progress/<stage>.json as a Prefect progress artifact."""

    def __init__(self, name: str, file: Path):
        self.name, self.file, self.artifact, self.ticks, self.shown = name, file, None, 0, -1.0

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks % PROGRESS_EVERY_TICKS:
            return
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):  # the stage has not begun, or shows nothing
            return
        if state.get("total"):
            self.show(round(100 * min(1.0, state["done"] / state["total"]), 1))

    def end(self) -> None:
        if self.artifact is not None:
            self.show(100.0)

    def show(self, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self.artifact is None:
            self.artifact = create_progress_artifact(
                percent, key=f"progress-{self.name}", description=f"stage {self.name}"
            )
        elif percent != self.shown:
            update_progress_artifact(self.artifact, percent)
        self.shown = percent


def publish_summary(root: Path, outcome: dict[str, str]) -> None:
    """The funnel of rows as a table artifact, and a page with it, what ran, and where to look."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    rows = funnel(root)
    create_table_artifact(rows, key="raphael-funnel", description="rows per stage: total = kept + dropped")
    lines = ["| stage | this run | total | kept | dropped |", "| --- | --- | ---: | ---: | --- |"]
    counts = {row["stage"]: row for row in rows}
    for name in read_pipeline(root):
        row = counts.get(name, {"total": "", "kept": "", "dropped": ""})
        lines.append(f"| {name} | {outcome.get(name, '')} | {row['total']} | {row['kept']} | {row['dropped']} |")
    page = root / "reports" / "index.html"
    lines += ["", f"Report: [{page.name}]({page.as_uri()}) (`{page}`)"]
    create_markdown_artifact("\n".join(lines), key="raphael-summary", description="what this run did")


def funnel(root: Path) -> list[dict[str, Any]]:
    """Per stage with a report: stage, total, kept, dropped ("12 duplicate, 3 unsafe")."""
    rows = []
    for name in read_pipeline(root):
        file = root / "reports" / f"{name}.json"
        report = read_json(file) if file.exists() else {}
        if "total" in report:
            dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
            rows.append({"stage": name, "total": report["total"], "kept": report["kept"], "dropped": dropped})
    return rows


def _logger() -> logging.Logger | logging.LoggerAdapter:
    from prefect.logging import get_run_logger

    return get_run_logger()
