from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.serve.servers import record_of, running, stop
from raphael.base.stage import write_json

PROJECT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    root: Path, *command: str, env: dict[str, str] | None = None, timeout_s: float = 500
) -> subprocess.CompletedProcess:
    env = {**os.environ, "PREFECT_HOME": str(root / ".run" / "prefect"), **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=root, env=env, capture_output=True, text=True, timeout=timeout_s
    )


def test_a_busy_port_ends_in_one_line_that_names_another_way(toy: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(toy, "flows.serve", "up", env={"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"})
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and f"port {port} is in use" in lines[0] and "PREFECT_API_URL=" in lines[0]
    assert not list((toy / ".run").glob("*.json"))


def test_servers_are_started_on_loopback_only(toy: Path) -> None:
    done = run(toy, "flows.serve", "up", env={"PREFECT_API_URL": "http://192.0.2.1:4200/api"})
    assert done.returncode == 1 and "servers start on loopback" in done.stderr


def test_down_leaves_alone_who_only_inherited_the_process_id(tmp_path: Path) -> None:
    write_json(record_of(tmp_path, "prefect"), {"pid": os.getpid(), "created": 1.0})
    assert not running(tmp_path, "prefect")
    assert not stop(tmp_path, "prefect")
    assert not record_of(tmp_path, "prefect").exists()


def test_a_prefect_server_that_is_down_is_one_line(toy: Path) -> None:
    done = run(toy, "flows.serve", "run", env={"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"})
    assert done.returncode == 1
    assert "no Prefect server answers at" in done.stderr and "make up" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def served(toy: Path) -> Iterator[dict[str, str]]:
    """The environment in which the toy workspace's deployments are served."""
    ports = {"RAPHAEL_MLFLOW_PORT": str(free_port()), "RAPHAEL_SERVE_PORT": str(free_port())}
    env = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", **ports}
    try:
        done = run(toy, "flows.serve", "up", env=env)
        assert done.returncode == 0, done.stderr
        yield env
    finally:
        down = run(toy, "flows.serve", "down", env=env)
    assert down.returncode == 0, down.stderr
    left = [process for process in psutil.process_iter() if belongs_to(process, toy)]
    assert not left, f"still there after down: {left}"


def belongs_to(process: psutil.Process, root: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.cwd() == str(root)
    except psutil.Error:
        return False


@pytest.mark.slow
def test_up_again_starts_nothing_twice(toy: Path, served: dict[str, str]) -> None:
    before = {name: json.loads(record_of(toy, name).read_text()) for name in ("prefect", "mlflow", "serve")}
    assert run(toy, "flows.serve", "up", env=served).returncode == 0
    assert before == {name: json.loads(record_of(toy, name).read_text()) for name in before}


@pytest.mark.slow
def test_up_serves_images_to_who_knows_the_string(toy: Path, served: dict[str, str]) -> None:
    """Of the toy workspace, which has no model of its own: the one that comes with the package."""
    import httpx

    token = (toy / ".run" / "login").read_text().strip().partition(":")[2]
    page = httpx.Client(base_url=f"http://127.0.0.1:{served['RAPHAEL_SERVE_PORT']}", timeout=60, trust_env=False)
    assert page.get("/v1/models").status_code == 401
    page.headers["Authorization"] = f"Bearer {token}"
    assert [model["id"] for model in page.get("/v1/models").json()["models"]] == ["scenes"]
    answer = page.post("/v1/images", json={"prompt": "a red circle", "num_inference_steps": 1})
    assert answer.status_code == 200 and answer.json()["images"]


@pytest.mark.slow
def test_a_served_run_succeeds_and_a_failing_one_says_why(toy: Path, served: dict[str, str]) -> None:
    good = run(toy, "prefect", "deployment", "run", "raphael/full", "--watch", env=served)
    assert good.returncode == 0, good.stdout + good.stderr
    assert (toy / "report.txt").read_text() == "report 0"
    wrong = ["-p", 'overrides={"generate.seed": 99}']
    bad = run(toy, "prefect", "deployment", "run", "raphael/evaluate", "--watch", *wrong, env=served)
    assert bad.returncode == 1
    log = (toy / ".run" / "serve.log").read_text()
    assert "got 99, expected less" in log and "Traceback" not in log


@pytest.mark.slow
def test_a_run_cancelled_through_prefect_leaves_no_process_behind(toy: Path, served: dict[str, str]) -> None:
    (toy / "started").unlink(missing_ok=True)
    slow = ["-p", 'overrides={"generate.seed": 77}']
    assert run(toy, "prefect", "deployment", "run", "raphael/full", *slow, env=served).returncode == 0
    deadline = time.monotonic() + 300
    while not (toy / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    stage = psutil.Process(int((toy / "started").read_text()))
    flow_run = subprocess.run(
        [sys.executable, "-c", NEWEST_RUN], cwd=toy, env={**os.environ, **served}, capture_output=True, text=True
    ).stdout.strip()
    assert run(toy, "prefect", "flow-run", "cancel", flow_run, env=served).returncode == 0
    _, alive = psutil.wait_procs([stage], timeout=120)
    assert not alive, "the stage goes on after its run was cancelled"
    family = [process for process in psutil.process_iter() if belongs_to(process, toy)]
    assert not [process for process in family if "dvc" in " ".join(process.cmdline())]


NEWEST_RUN = """
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
with get_client(sync_client=True) as client:
    print(client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0].id)
"""
