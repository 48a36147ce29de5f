"""A run of a flow in MLflow: the parent of what its stages track (raphael/base/tracking/pipeline_run.py), its end
and its numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from raphael.base.stage import read_json
from raphael.base.tracking.pipeline_run import VARIABLE, noted_run

REPORT = Path("reports") / "index.html"
MEASURED = Path("reports") / "evaluate.json"


def flow_run_name() -> str | None:
    """The name of the flow run that this process is in, with the start of its id; None outside of one."""
    from prefect.runtime import flow_run

    return f"{flow_run.name}-{flow_run.id[:8]}" if flow_run.id else None


@contextlib.contextmanager
def one_run_over_all(root: Path, name: str | None, outcome: dict[str, str]) -> Iterator[None]:
    """Tell the stages started in the block the flow run's name, and end the MLflow run that they have made, if any.

    outcome: what became of each stage, filled in the block. The run gets the settings and, FINISHED, the evaluation's
    numbers and the report, so that the rows of pipelines compare as those of trainings do; else it is FAILED or KILLED.
    """
    if name is None:
        yield
        return
    os.environ[VARIABLE] = name
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        del os.environ[VARIABLE]
        _end(root, name, outcome, status)


def _end(root: Path, name: str, outcome: dict[str, str], status: str) -> None:
    if not (root / "params.yaml").is_file():
        return
    from raphael.base.config.params import load_config
    from raphael.base.tracking import tracker as tracking

    config = load_config(root / "params.yaml")
    uri = tracking.resolve_uri(config, root)
    run_id = noted_run(root, name, tracking.public(uri))
    if run_id is None:
        return
    tracker = tracking.MlflowTracker(uri, run_id, tracking.journal_of(root, run_id))
    tracker.params(tracking.all_settings(config))
    tracker.tags({f"stage.{stage}": what for stage, what in outcome.items()})
    if status == "FINISHED" and "evaluate" in outcome and (root / MEASURED).is_file():
        from raphael.evaluate.findings import MODEL, tracked_numbers

        step = int(read_json(root / MODEL / "meta.json").get("images_seen", 0))
        tracker.log(tracked_numbers(read_json(root / MEASURED)), step)
        if (root / REPORT).is_file():
            tracker.artifact(root / REPORT)
    tracker.close(status)
