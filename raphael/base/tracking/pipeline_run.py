"""The MLflow run that stands over everything which one run of a flow has its stages track.

A flow tells its name to the processes of its stages by the environment. The first of them that tracks something makes
the run and notes it in the workspace; where all stages are up to date there is none. The flow ends it
(flows/pipelines/tracked_runs.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from raphael.base.stage import read_json, write_json

VARIABLE = "RAPHAEL_PIPELINE_RUN"  # the flow run's name, FLOW-ID
PARENT = "mlflow.parentRunId"  # the tag by which MLflow's pages indent a run under another
SOURCE = "mlflow.source.name"
FILE = Path("work") / "tracking" / "pipeline.json"  # the newest: name, address of the store, id


def parent_run(client: Any, experiment_id: str, root: Path, address: str, tags: dict[str, str]) -> str | None:
    """The id of the flow's run in the store at `address`, made at its first use; None outside of a flow.

    client: an MlflowClient of that store. tags: of the new run; its source is the flow.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if (run_id := noted_run(root, name, address)) is None:
        tags = {**tags, SOURCE: f"raphael/{name.rpartition('-')[0]}"}
        run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        write_json(root / FILE, {"name": name, "uri": address, "run_id": run_id})
    return run_id


def noted_run(root: Path, name: str, address: str) -> str | None:
    """The id of the run of the flow run `name`, where a stage has made it in the store at `address`."""
    known = read_json(root / FILE) if (root / FILE).is_file() else {}
    return known["run_id"] if (known.get("name"), known.get("uri")) == (name, address) else None
