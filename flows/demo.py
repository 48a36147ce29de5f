"""`make demo`: the flow raphael/full in this process, with a Prefect server of its own that ends with it.

The scenes run in the project's own folder. Photographs run in work/spaces/coco, another system (raphael/systems) with
params.NAME.yaml in work/spaces/NAME: workspaces, so that the project's settings, lock and outputs stay as they are.
--parts all adds what a system has beside its own: parts of its training, and guides that are trained beside the model.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.environment import prepare
from flows.serve.servers import prefect_for_one_run
from flows.workspace.folder import PROJECT, fingerprint, make_workspace, overlays_of
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.stage import StageError, one_clear_line
from raphael.base.strict import ConfigError
from raphael.systems import SYSTEMS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--source", default="scenes", choices=["scenes", "coco"], help="what to train on")
    parser.add_argument("--coco-dir", default="", help="for --source coco: folder of captions_*.json and images")
    parser.add_argument("--system", default=DEFAULT, help="what to train (default: %(default)s)")
    parser.add_argument("--parts", default="", choices=["", "all"], help="all: also what a system may have besides")
    parser.add_argument("--workspace", type=Path, help="run in this workspace as it is")
    arguments = parser.parse_args(argv)
    with one_clear_line("demo") as outcome:
        given = arguments.source, arguments.coco_dir, arguments.system, arguments.parts
        root = arguments.workspace or choose_workspace(*given)
        os.chdir(root)
        run_full(Path.cwd())
        if arguments.parts:
            train_guides(Path.cwd(), arguments.system)
        print(where_to_look(Path.cwd()), flush=True)
    return outcome.status


def choose_workspace(source: str, coco_dir: str, system: str = DEFAULT, parts: str = "") -> Path:
    """The project's folder for scenes; for COCO a workspace whose settings name the photographs, for a system other
    than the default one a workspace with its settings. parts: "all", or "" for the system's own. Raises ConfigError."""
    spaces, overlays = PROJECT / "work" / "spaces", overlays_of(system)
    found = find_system(system, "SYSTEM")
    if parts and not (found.extra or found.guides):
        more = [name for name in SYSTEMS if find_system(name).extra or find_system(name).guides]
        raise ConfigError(f"PARTS: got {parts} with SYSTEM={system}, which has no parts besides; expected {more[0]}")
    changes: dict[str, Any] = {"train.settings.extra": [part.name for part in found.extra]} if parts else {}
    if source == "scenes":
        if coco_dir:
            raise ConfigError(f"got COCO_DIR={coco_dir} without SOURCE=coco; say make demo SOURCE=coco COCO_DIR=...")
        return make_workspace(spaces / system, overlays, changes) if overlays else PROJECT
    if not coco_dir:
        raise ConfigError("got no COCO_DIR; say make demo SOURCE=coco COCO_DIR=folder of captions_*.json and images")
    photographs = Path(coco_dir).resolve()
    changes |= {"source.path": str(photographs), "source.fingerprint": fingerprint(photographs)}
    name = f"coco-{system}" if overlays else "coco"
    return make_workspace(spaces / name, [PROJECT / "params.coco.yaml", *overlays], changes)


def run_full(root: Path) -> None:
    """The flow, on a Prefect server that runs, or on one that ends with it."""
    prepare(root)
    check_environment()
    with prefect_for_one_run(root):
        from flows.pipelines.full import full

        full()


def train_guides(root: Path, system: str) -> None:
    """The guides that a system names, beside the model that is there now (docs/guides/guidance.md). Raises StageError
    where one was not trained; what it says is on the screen."""
    for kind in find_system(system).guides:
        command = [sys.executable, "-m", "raphael.systems.guides", "--guide", kind, "--workspace", str(root)]
        if subprocess.run(command, cwd=root, check=False).returncode:
            raise StageError(f"the guide {kind} was not trained; the same command resumes it")


def check_environment() -> None:
    """Raise StageError for what is known to break Prefect's server."""
    from importlib import metadata

    try:
        version = metadata.version("dataclasses")
    except metadata.PackageNotFoundError:
        return
    raise StageError(
        f"the package dataclasses {version} (a backport for Python 3.6) is installed and breaks Prefect's server;"
        " remove it: python -m pip uninstall --yes dataclasses"
    )


def where_to_look(root: Path) -> str:
    """The last words of a demo: the report, the newest sample grid, the MLflow run, and how to open the pages."""
    grids = sorted((root / "models" / "raphael").glob("**/samples/*.png"), key=lambda file: file.name)
    lines = [
        "",
        f"report       {root / 'reports' / 'index.html'}",
        f"sample grid  {grids[-1] if grids else 'none was generated (train.loop.sample_every_images)'}",
        f"MLflow run   {mlflow_run(root)}",
    ]
    if root == PROJECT:
        lines += ["", "make up      opens the pages: MLflow on http://127.0.0.1:5000, Prefect on http://127.0.0.1:4200"]
    else:
        lines += ["", f"cd {root} && python -m flows.serve up    opens this workspace's pages; log in with .run/login"]
    return "\n".join(lines)


def mlflow_run(root: Path) -> str:
    """Experiment, name and id of the newest run in the workspace's store that is no other's child."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return f"in {uri}"
    store = root / "mlflow.db"
    if not store.is_file():
        return "none (no mlflow.db here)"
    query = (
        "select experiments.name, runs.name, runs.run_uuid from runs join experiments"
        " on runs.experiment_id = experiments.experiment_id where runs.run_uuid not in"
        " (select run_uuid from tags where key = 'mlflow.parentRunId') order by runs.start_time desc limit 1"
    )
    connection = sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)
    try:
        row = connection.execute(query).fetchone()
    except sqlite3.Error as error:
        return f"in {store} ({error})"
    finally:
        connection.close()
    return f"{row[1]} ({row[2]}) in the experiment {row[0]}" if row else f"none yet in {store}"


if __name__ == "__main__":
    raise SystemExit(main())
