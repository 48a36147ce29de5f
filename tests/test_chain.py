"""The whole chain, once, at the smallest sizes: links to report by `dvc repro`, then a served deployment in the same
workspace, then the data through a remote into a second workspace. Nothing is replaced by something simpler."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.environment import SWITCHES, stage_environment
from flows.pipelines.dvc_stages import DVC, out_of_date, read_pipeline
from flows.workspace.folder import make_workspace
from raphael.base.stage import read_json
from raphael.base.tracking.pipeline_run import FILE as PIPELINE_RUN
from raphael.base.tracking.pipeline_run import PARENT

PROJECT = Path(__file__).resolve().parent.parent
REGENERATED = {"generate", "evaluate", "report"}  # what a changed generate.seed may touch
CHAIN_S, CALL_S = 1500, 900  # far above what it takes on an idle machine

pytestmark = pytest.mark.timeout(2400)


def call(root: Path, *command: str, timeout_s: float = CALL_S, **extra: str) -> subprocess.CompletedProcess:
    """A program in the workspace, its output in work/logs/<first word>.log."""
    home = {"PREFECT_HOME": str(root / ".run" / "prefect"), "OMP_NUM_THREADS": "1"}
    env = {**stage_environment(root), **SWITCHES, **home, **extra}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
    )
    (root / "work").mkdir(exist_ok=True)
    (root / "work" / "last-call.log").write_text(done.stdout + done.stderr)
    return done


def words(done: subprocess.CompletedProcess) -> str:
    return (done.stdout + done.stderr)[-6000:]


def lock_of(root: Path) -> dict:
    return yaml.safe_load((root / "dvc.lock").read_text())["stages"]


def digest(root: Path, *folders: str) -> dict[str, str]:
    files = [file for folder in folders for file in sorted((root / folder).rglob("*")) if file.is_file()]
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace at debug size in which `dvc repro` has just run the whole chain."""
    root = make_workspace(tmp_path_factory.mktemp("chain"), [PROJECT / "params.debug.yaml"])
    done = call(root, *DVC, "repro", timeout_s=CHAIN_S)
    assert done.returncode == 0, words(done)
    return root


def test_every_stage_leaves_its_outputs_and_a_report_whose_counts_add_up(chain: Path) -> None:
    for name, entry in read_pipeline(chain).items():
        for out in entry.outs:
            assert (chain / out).exists(), f"{name} left no {out}"
        file = chain / "reports" / f"{name}.json"
        report = json.loads(file.read_text()) if file.exists() else {}
        if "total" in report:
            assert report["total"] == report["kept"] + sum(report["dropped"].values()), name


def test_every_row_is_accounted_for_from_the_list_to_the_records(chain: Path) -> None:
    reports = [json.loads((chain / f"reports/{name}.json").read_text()) for name in FUNNEL]
    for before, after, name in zip(reports, reports[1:], FUNNEL[1:]):
        assert after["total"] == before["kept"], f"{name} begins with {after['total']} of {before['kept']} rows"


FUNNEL = ["source", "select", "download", "filter", "captions", "encode"]


def test_running_the_chain_again_finds_nothing_to_do(chain: Path) -> None:
    lock = (chain / "dvc.lock").read_bytes()
    assert out_of_date(chain) == {}
    done = call(chain, *DVC, "repro")
    assert done.returncode == 0 and "Running stage" not in done.stdout, words(done)
    assert (chain / "dvc.lock").read_bytes() == lock


def test_data_pushed_to_a_remote_is_pulled_in_a_second_workspace_without_computing(chain: Path, tmp_path: Path) -> None:
    second = make_workspace(tmp_path / "second", [PROJECT / "params.debug.yaml"])
    shutil.copy(chain / "params.yaml", second)
    shutil.copy(chain / "dvc.lock", second)
    for root in (chain, second):
        done = call(root, *DVC, "remote", "add", "--default", "--force", "store", str(tmp_path / "store"))
        assert done.returncode == 0, words(done)
    pushed = call(chain, *DVC, "push")
    assert pushed.returncode == 0, words(pushed)
    pulled = call(second, *DVC, "pull")
    assert pulled.returncode == 0, words(pulled)
    assert out_of_date(second) == {}
    assert digest(second, "data", "models", "reports") == digest(chain, "data", "models", "reports")


@pytest.fixture(scope="session")
def served(chain: Path) -> Iterator[dict[str, str]]:
    """Prefect, MLflow and the deployments of the workspace, as `make up` starts them, on free ports."""
    ports = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "RAPHAEL_MLFLOW_PORT": free_port()}
    up = call(chain, sys.executable, "-m", "flows.serve", "up", **ports)
    try:
        assert up.returncode == 0, words(up)
        yield ports
    finally:
        down = call(chain, sys.executable, "-m", "flows.serve", "down", **ports)
    assert down.returncode == 0, words(down)


def test_a_served_run_with_another_seed_generates_anew_and_trains_nothing(chain: Path, served: dict[str, str]) -> None:
    before, images = lock_of(chain), digest(chain, "data/generated")
    trained = {file: file.stat().st_mtime_ns for file in (chain / "models").rglob("*") if file.is_file()}
    change = 'overrides={"generate.seed": 1}'
    command = [sys.executable, "-m", "prefect", "deployment", "run", "raphael/full", "--watch", "-p", change]
    done = call(chain, *command, **served)
    assert done.returncode == 0, words(done)
    after = lock_of(chain)
    assert {name for name in after if after[name] != before[name]} == REGENERATED
    assert {file: file.stat().st_mtime_ns for file in (chain / "models").rglob("*") if file.is_file()} == trained
    regenerated = digest(chain, "data/generated")
    assert regenerated.keys() == images.keys() and regenerated != images
    assert out_of_date(chain) == {}, "what Prefect ran, DVC must find done"
    with contextlib.closing(sqlite3.connect(chain / "mlflow.db")) as store:
        query = "select name, status from runs join tags using (run_uuid) where key = ? and value = ?"
        children = store.execute(query, [PARENT, read_json(chain / PIPELINE_RUN)["run_id"]]).fetchall()
    assert [(name.partition("-")[0], status) for name, status in children] == [("evaluation", "FINISHED")]
