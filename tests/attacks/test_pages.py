"""Prefect's server and MLflow's, as `make up` starts them: nobody else runs a command, writes a file, or reads one."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from flows.serve import access
from flows.serve.deployments import auth_string
from flows.serve.servers import owns, record_of
from flows.workspace.folder import make_workspace
from raphael.base.ray_cluster import free_ports
from raphael.base.stage import StageError, write_json
from tests.attacks.ways import ALLOW_ORIGIN, JSON, OWNER, REFUSED, WAYS, Answer, Way, ask, handshake

SOCKETS = [
    "/api/events/in",
    "/api/events/out",
    "/api/logs/out",
    "/api/task_runs/subscriptions/scheduled",
    "/api/work_pools/any/workers/connect",
]


@dataclass(frozen=True)
class Up:
    """A workspace whose servers run."""

    root: Path
    prefect: int
    mlflow: int
    auth: str
    said: str
    env: dict[str, str]

    def ask(self, way: Way, method: str, path: str, body: object = None, typed: bool = True) -> Answer:
        port = self.prefect if path.startswith("/api/") and "mlflow" not in path else self.mlflow
        return ask(port, method, path, [*way.headers(port, self.auth), *(JSON.items() if typed else [])], body)

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=self.root, env={**self.env, **more}, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    root = make_workspace(tmp_path_factory.mktemp("up"), [])
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    *ports, images = free_ports(3)
    env |= {"PREFECT_API_URL": f"http://127.0.0.1:{ports[0]}/api", "RAPHAEL_MLFLOW_PORT": str(ports[1])}
    env |= {"RAPHAEL_SERVE_PORT": str(images)}
    env |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PYTHONPATH": str(root)}
    started = Up(root, *ports, "", "", env)
    try:
        done = started.run("flows.serve", "up")
        assert done.returncode == 0, done.stderr
        yield Up(root, *ports, (root / ".run" / "login").read_text().strip(), done.stdout + done.stderr, env)
    finally:
        started.run("flows.serve", "down")


@pytest.fixture(scope="module")
def deployment(up: Up) -> str:
    """The id of raphael/full: an attacker may have seen it."""
    return up.ask(OWNER, "GET", "/api/deployments/name/raphael/full").json()["id"]


def steps(command: str) -> dict:
    return {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": command}}]}


def attack_on_prefect(up: Up, way: Way, deployment: str, command: str) -> dict[str, Answer]:
    """What ran a command as the serving user before there was a password: other pull steps, then a run."""
    change, run = f"/api/deployments/{deployment}", f"/api/deployments/{deployment}/create_flow_run"
    return {
        "read a deployment": up.ask(way, "GET", "/api/deployments/name/raphael/full"),
        "PATCH its pull steps with a shell script": up.ask(way, "PATCH", change, steps(command)),
        "create a run": up.ask(way, "POST", run, {}),
        "create a run without preflight": up.ask(way, "POST", run, {}, typed=False),
        "register a flow": up.ask(way, "POST", "/api/flows/", {"name": f"planted-{time.time_ns()}"}),
        "clear the database": up.ask(way, "POST", "/api/admin/database/clear", {"confirm": True}),
        "read the settings": up.ask(way, "GET", "/api/admin/settings"),
    }


def refused(answers: dict[str, Answer], way: Way, target: str, tried: Callable) -> None:
    for what, answer in answers.items():
        assert answer.status in REFUSED, f"{way.name}: {what}: got {answer.status} {answer.text[:200]}"
        assert ALLOW_ORIGIN not in answer.headers, f"{way.name}: {what}: a page may read the answer"
        tried(target, way.name, what, str(answer.status))


def state_of(up: Up, deployment: str) -> tuple:
    """What an attack would have changed, as the owner sees it."""
    steps_now = up.ask(OWNER, "GET", f"/api/deployments/{deployment}").json()["pull_steps"]
    return steps_now, *(up.ask(OWNER, "POST", f"/api/{kind}/count", {}).text for kind in ("flow_runs", "flows"))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_nobody_else_changes_a_deployment_or_makes_a_run(up: Up, deployment: str, way: Way, tried: Callable) -> None:
    before = state_of(up, deployment)
    refused(attack_on_prefect(up, way, deployment, "touch planted"), way, "Prefect", tried)
    assert state_of(up, deployment) == before


def test_no_preflight_allows_a_foreign_page_and_the_own_page_is_allowed(up: Up, tried: Callable) -> None:
    for port, path in ((up.prefect, "/api/flows/filter"), (up.mlflow, "/ajax-api/2.0/mlflow/experiments/create")):
        own = f"http://localhost:{port}"
        for origin in ("https://evil.example", "null", "http://localhost:9", own):
            wish = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "content-type")]
            answer = ask(port, "OPTIONS", path, [("Host", f"127.0.0.1:{port}"), ("Origin", origin), *wish])
            if origin != own:
                assert answer.status in REFUSED and ALLOW_ORIGIN not in answer.headers, origin
                tried(
                    "Prefect" if port == up.prefect else "MLflow", f"page of {origin}", "preflight", str(answer.status)
                )
            elif port == up.prefect:  # MLflow's page asks under the name that it was opened by
                assert answer.headers[ALLOW_ORIGIN] == own


@pytest.mark.parametrize("path", SOCKETS)
def test_no_websocket_opens_without_the_string_or_for_a_foreign_page(up: Up, path: str, tried: Callable) -> None:
    right, wrong = ({"type": "auth", "token": token} for token in (up.auth, "guess"))
    for way in WAYS:
        said = handshake(up.prefect, path, way.headers(up.prefect, up.auth), json.dumps(right if way.knows else wrong))
        assert " 403 " in said or " 400 " in said or said.startswith("closed"), f"{way.name}: {said}"
        tried("Prefect", way.name, f"websocket {path}", said[:40])
    own = handshake(up.prefect, path, OWNER.headers(up.prefect, up.auth), json.dumps(right))
    assert "auth_success" in own


def test_the_owner_can_do_what_others_cannot(up: Up, deployment: str) -> None:
    """The control: the same requests are carried out, but for clearing the database."""
    flow = {"name": "by-the-owner"}
    assert up.ask(OWNER, "POST", "/api/flows/", flow).status == 201
    assert up.ask(OWNER, "PATCH", f"/api/deployments/{deployment}", steps("true")).status == 204
    assert up.ask(OWNER, "GET", f"/api/deployments/{deployment}").json()["pull_steps"] == steps("true")["pull_steps"]
    assert up.ask(OWNER, "PATCH", f"/api/deployments/{deployment}", {"pull_steps": None}).status == 204


@pytest.mark.slow
def test_the_attack_runs_a_command_for_who_has_the_string_and_for_nobody_else(
    up: Up, deployment: str, tmp_path: Path, tried: Callable
) -> None:
    """The exploit itself, command and all: what serves the flows runs whatever the server says."""
    before = state_of(up, deployment)[0]
    for way in WAYS:
        refused(attack_on_prefect(up, way, deployment, f"touch {tmp_path / 'stranger'}"), way, "Prefect", tried)
    assert up.ask(OWNER, "PATCH", f"/api/deployments/{deployment}", steps(f"touch {tmp_path / 'owner'}")).status == 204
    assert up.ask(OWNER, "POST", f"/api/deployments/{deployment}/create_flow_run", {}).status == 201
    deadline_s = time.monotonic() + 180
    while not (tmp_path / "owner").exists() and time.monotonic() < deadline_s:
        time.sleep(0.5)
    up.ask(OWNER, "PATCH", f"/api/deployments/{deployment}", {"pull_steps": before})
    assert [file.name for file in tmp_path.iterdir()] == ["owner"]


MLFLOW = "/api/2.0/mlflow"


def attack_on_mlflow(up: Up, way: Way, folder: Path, victim: Path) -> dict[str, Answer]:
    """What reads and writes files as the user of the server: an experiment whose artifacts lie in the attacker's
    folder, where the run's own folder is a link to anywhere.
    """
    name, run = f"planted {way.name} {time.time_ns()}", "0" * 32
    place = {"name": name, "artifact_location": folder.as_uri()}
    made = up.ask(way, "POST", f"{MLFLOW}/experiments/create", place)
    experiment = made.json()["experiment_id"] if made.status == 200 else "0"
    begun = up.ask(way, "POST", f"{MLFLOW}/runs/create", {"experiment_id": experiment, "start_time": 1})
    if begun.status == 200:
        run = begun.json()["run"]["info"]["run_id"]
        (folder / run).mkdir()
        (folder / run / "artifacts").symlink_to(victim)
    return {
        "create an experiment": made,
        "create a run": begun,
        "write a file": up.ask(
            way, "POST", f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=planted.json", {"planted": True}
        ),
        "read a file": up.ask(way, "GET", f"/get-artifact?run_id={run}&path=secret.txt"),
        "write an artifact": up.ask(way, "PUT", "/api/2.0/mlflow-artifacts/artifacts/planted.json", {}),
        "search experiments": up.ask(way, "GET", f"{MLFLOW}/experiments/search?max_results=9"),
        "delete an experiment": up.ask(way, "POST", f"{MLFLOW}/experiments/delete", {"experiment_id": "999"}),
        "ask the assistant": up.ask(way, "GET", "/ajax-api/3.0/mlflow/assistant/config"),
        "open the page": up.ask(way, "GET", "/", typed=False),
    }


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_nobody_else_reads_or_writes_through_mlflow(up: Up, way: Way, tmp_path: Path, tried: Callable) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "secret.txt").write_text("secret")
    names = f"{MLFLOW}/experiments/search?max_results=999"
    before = up.ask(OWNER, "GET", names).text
    refused(attack_on_mlflow(up, way, tmp_path / "mine", tmp_path / "victim"), way, "MLflow", tried)
    assert up.ask(OWNER, "GET", names).text == before
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "victim" / "planted.json").exists()


def test_the_attack_on_mlflow_reads_and_writes_files_for_who_has_the_string(up: Up, tmp_path: Path) -> None:
    """The control, and why MLflow has a password: whoever may speak to it is its user."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "secret.txt").write_text("secret")
    answers = attack_on_mlflow(up, OWNER, tmp_path / "mine", tmp_path / "victim")
    assert answers["read a file"].text == "secret"
    assert (tmp_path / "victim" / "planted.json").exists()


def test_prefects_command_line_finds_the_string_in_the_folder_and_nowhere_else(up: Up, tmp_path: Path) -> None:
    assert "raphael/full" in up.run("prefect", "deployment", "ls").stdout
    elsewhere = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "ls"],
        cwd=tmp_path,
        env={**up.env, "HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert elsewhere.returncode and "401" in elsewhere.stdout + elsewhere.stderr


def test_the_string_is_in_two_private_files_and_in_no_log_no_command_line_and_no_output(up: Up) -> None:
    secret = up.auth.partition(":")[2]
    assert len(secret) >= 43 and secret not in up.said  # 256 bits in base64
    run = up.root / ".run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    holders = set()
    for file in [file for file in up.root.rglob("*") if file.is_file() and "ui" not in file.parts]:
        if secret.encode() in file.read_bytes():
            holders.add(file.relative_to(run).as_posix())
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert holders == {"login", "prefect/profiles.toml"}
    for process in psutil.process_iter():
        try:
            assert secret not in " ".join(process.cmdline()), process
        except psutil.Error:
            continue


def test_what_the_servers_write_is_their_owners_alone(up: Up) -> None:
    files = [
        *(up.root / ".run").rglob("*"),
        *up.root.glob("mlflow.db*"),
        *up.root.glob("mlruns"),
        *up.root.glob("mlart*"),
    ]
    ours = {".json", ".ready"}  # who runs, and Prefect's page, a public copy: .run is closed around them
    files = [file for file in files if file.suffix not in ours and "ui" not in file.parts]
    logs = {f"{name}.log" for name in ("prefect", "mlflow", "serve", "images")}
    assert {"prefect.db", "mlflow.db", *logs} <= {file.name for file in files}
    assert not [file for file in files if file.stat().st_mode & 0o077]


FOR_ONE_RUN = """
import json, os, sys
from pathlib import Path
from flows.environment import prepare, stage_environment
from flows.serve.servers import prefect_for_one_run
prepare(Path.cwd())
with prefect_for_one_run(Path.cwd()):
    print(json.dumps([os.environ["PREFECT_API_URL"], os.environ["PREFECT_API_AUTH_STRING"]]), flush=True)
    assert "PREFECT_API_AUTH_STRING" not in stage_environment(Path.cwd())
    from prefect.client.orchestration import get_client
    with get_client(sync_client=True) as client:
        assert client.read_flows() == []
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_server_of_make_demo_is_closed_in_the_same_way(tmp_path: Path, tried: Callable) -> None:
    root = make_workspace(tmp_path / "demo", [])
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", FOR_ONE_RUN]
    demo = subprocess.Popen(command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url, auth = json.loads(demo.stdout.readline())
        port = int(url.split(":")[2].split("/")[0])
        here = Up(root, port, 0, auth, "", env)
        for way in WAYS:
            refused(attack_on_prefect(here, way, "0" * 32, "touch planted"), way, "Prefect of make demo", tried)
        assert here.ask(OWNER, "POST", "/api/flows/count", {}).text == "0"
    finally:
        demo.communicate(timeout=120)
    assert demo.returncode == 0


def test_an_answer_from_somebody_elses_server_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Who is quicker at the port would be told the string, and would tell the serving process what to run."""
    access.private_folder(tmp_path / ".run")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        created = psutil.Process(sleeper.pid).create_time()
        with socket.socket() as stranger:
            stranger.bind(("127.0.0.1", 0))
            stranger.listen()
            port = stranger.getsockname()[1]
            write_json(record_of(tmp_path, "prefect"), {"pid": sleeper.pid, "created": created})
            assert not owns(tmp_path, "prefect", port)
            me = psutil.Process()
            write_json(record_of(tmp_path, "prefect"), {"pid": me.pid, "created": me.create_time()})
            assert owns(tmp_path, "prefect", port)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_string_is_new_each_time_and_servers_without_one_are_not_taken_over(tmp_path: Path) -> None:
    first, second = auth_string(tmp_path, set()), auth_string(tmp_path, set())
    assert first != second and auth_string(tmp_path, {"prefect"}) == access.known(tmp_path) == second
    access.forget(tmp_path)
    with pytest.raises(StageError, match="got mlflow, prefect running without .run/login; say make down"):
        auth_string(tmp_path, {"prefect", "mlflow"})


def test_a_file_that_others_had_open_or_could_read_is_made_anew(tmp_path: Path) -> None:
    file = access.private_folder(tmp_path / ".run") / access.LOGIN
    file.write_text("old")
    file.chmod(0o644)
    with open(file) as somebody_elses:
        access.renew(tmp_path)
        assert somebody_elses.read() == "old"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and access.known(tmp_path)


@pytest.mark.slow
def test_a_second_up_keeps_the_string_and_down_removes_it(up: Up) -> None:
    assert up.run("flows.serve", "up").returncode == 0
    assert (up.root / ".run" / "login").read_text().strip() == up.auth
    other = up.run("flows.serve", "up", PREFECT_API_AUTH_STRING="raphael:other")
    assert other.returncode == 1 and "unset it" in other.stderr
    assert up.run("flows.serve", "down").returncode == 0
    assert not (up.root / ".run" / "login").exists() and not (up.root / ".run" / "prefect" / "profiles.toml").exists()
