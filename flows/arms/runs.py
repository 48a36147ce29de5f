"""A study in MLflow: a parent run, and every case's run as its child, named and tagged by arm and seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.arms.cases import Case
from raphael.base.config.params import Config, load_config
from raphael.base.stage import read_json, write_json
from raphael.base.tracking import tracker as tracking


@dataclass(frozen=True)
class Study:
    """kind: ablation, systems. plan: the sha256 of its plan. about: what it asks."""

    kind: str
    plan: str
    about: str


def open_parent(config: Config, root: Path, file: Path, study: Study) -> str | None:
    """The parent run of this plan, the one noted in `file` or a new one; None where nobody answers."""
    uri = tracking.resolve_uri(config, root)
    known = read_json(file) if file.exists() else {}
    if known.get("plan") == study.plan and known.get("uri") == tracking.public(uri):
        if tracking.reopen_run(uri, known["run_id"]):
            return known["run_id"]
    run_id = tracking.create_run(config, root, f"{study.kind}-{study.plan[:8]}", {"plan": study.plan})
    if run_id is not None:
        tracking.connect(uri).set_tag(run_id, "mlflow.note.content", study.about)
        write_json(file, {"plan": study.plan, "uri": tracking.public(uri), "run_id": run_id})
    return run_id


def mark_run(case: Case, parent: str | None, study: Study) -> None:
    """Put the case's run under its parent. Silent where the run is not tracked."""
    runs = case.folder / tracking.RUNS_FILE
    known = read_json(runs) if runs.exists() else {}
    newest = list(known.values())[-1:]
    if parent is None or not newest:
        return
    run_id = newest[0]["run_id"]
    client = tracking.connect(tracking.resolve_uri(load_config(case.folder / "params.yaml"), case.folder))
    tags = {"mlflow.parentRunId": parent, "mlflow.runName": case.name, f"{study.kind}.arm": case.arm}
    for name, value in {**tags, f"{study.kind}.seed": str(case.seed)}.items():
        client.set_tag(run_id, name, value)


def finish_parent(config: Config, root: Path, parent: str | None, page: Path) -> None:
    """The page as the parent's artifact, and its end."""
    if parent is None:
        return
    client = tracking.connect(tracking.resolve_uri(config, root))
    client.log_artifact(parent, str(page))
    client.set_terminated(parent)
