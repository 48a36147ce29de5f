"""An ablation in MLflow: a parent run, and every case's run as its child, named and tagged by arm and seed."""

from __future__ import annotations

from pathlib import Path

from flows.ablation.plan import AblationPlan, Case
from raphael.base.config.params import Config
from raphael.base.stage import read_json, write_json
from raphael.base.tracking import tracker as tracking


def open_parent(config: Config, root: Path, file: Path, plan: AblationPlan) -> str | None:
    """The parent run of this plan, the one noted in `file` or a new one; None where nobody answers."""
    uri = tracking.resolve_uri(config, root)
    known = read_json(file) if file.exists() else {}
    if known.get("plan") == plan.sha256 and known.get("uri") == tracking.public(uri):
        if tracking.reopen_run(uri, known["run_id"]):
            return known["run_id"]
    run_id = tracking.create_run(config, root, f"ablation-{plan.sha256[:8]}", {"plan": plan.sha256})
    if run_id is not None:
        tracking.connect(uri).set_tag(run_id, "mlflow.note.content", plan.about)
        write_json(file, {"plan": plan.sha256, "uri": tracking.public(uri), "run_id": run_id})
    return run_id


def mark_run(case: Case, parent: str | None) -> None:
    """Put the case's run under its parent. Silent where the run is not tracked."""
    from raphael.base.config.params import load_config

    runs = case.folder / tracking.RUNS_FILE
    known = read_json(runs) if runs.exists() else {}
    newest = list(known.values())[-1:]
    if parent is None or not newest:
        return
    run_id = newest[0]["run_id"]
    client = tracking.connect(tracking.resolve_uri(load_config(case.folder / "params.yaml"), case.folder))
    tags = {"mlflow.parentRunId": parent, "mlflow.runName": case.name, "ablation.arm": case.arm}
    for name, value in {**tags, "ablation.seed": str(case.seed)}.items():
        client.set_tag(run_id, name, value)


def finish_parent(config: Config, root: Path, parent: str | None, page: Path) -> None:
    """The page as the parent's artifact, and its end."""
    if parent is None:
        return
    client = tracking.connect(tracking.resolve_uri(config, root))
    client.log_artifact(parent, str(page))
    client.set_terminated(parent)
