"""`make up` and `make down`: the Prefect server, the MLflow page, and the process that serves the deployments.

    python -m flows.serve up      start what does not run yet, wait until it answers, print the addresses
    python -m flows.serve down    end exactly what `up` started
    python -m flows.serve run     serve the deployments in the foreground (what `up` starts in the background)

Everything listens on loopback. Addresses: PREFECT_API_URL (else prefect.toml) and RAPHAEL_MLFLOW_PORT (else 5000).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from flows.demo import check_environment
from flows.environment import prepare, stage_environment
from flows.pipeline import read_pipeline
from flows.processes import Family
from raphael.stage import StageError, one_clear_line, read_json, write_json

START_S = 300.0  # a first start on a busy machine
NAMES = ("full", "data", "train", "evaluate")
READY = "deployments.ready"


def up(root: Path) -> None:
    """Start the three processes that are not running, each once the one before answers. Raises StageError, one line."""
    read_pipeline(root)
    check_environment()
    api, mlflow_port = prefect_api(root), int(os.environ.get("RAPHAEL_MLFLOW_PORT", "5000"))
    host, port = _loopback(api)
    page = f"http://127.0.0.1:{mlflow_port}"
    prefect_server = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    mlflow_server = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(mlflow_port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{root / 'mlflow.db'}",
        "--default-artifact-root",
        str(root / "mlruns"),
    ]
    try:
        _start(root, "prefect", prefect_server, port)
        _start(root, "mlflow", mlflow_server, mlflow_port)
        _wait(root, "prefect", lambda: answers(f"{api}/health"))
        _wait(root, "mlflow", lambda: answers(f"{page}/health"))
        ready = root / ".run" / READY
        if not running(root, "serve"):
            ready.unlink(missing_ok=True)
        _start(root, "serve", [sys.executable, "-m", "flows.serve", "run"], None)
        _wait(root, "serve", ready.exists)
    except BaseException:
        down(root)  # half of it would be no use, and would hold the ports
        raise
    print(f"Prefect      {api.removesuffix('/api')}")
    print(f"MLflow       {page}")
    print(f"deployments  {', '.join(f'raphael/{name}' for name in NAMES)}")
    print("\nnext: source .venv/bin/activate && prefect deployment run raphael/full --watch\nmake down stops all of it")


def down(root: Path) -> None:
    """End what `up` started, known by process id and start time, and whatever that started."""
    for name in ("serve", "mlflow", "prefect"):
        record = _record(root, name)
        if running(root, name):
            process = Family(read_json(record)["pid"])
            process.end()
            print(f"{name}: stopped")
        record.unlink(missing_ok=True)


def run(root: Path) -> None:
    """Register the four deployments and serve them, one run at a time, until told to stop. Raises StageError."""
    import httpx
    from prefect import serve

    from flows.data import data
    from flows.evaluate import evaluate
    from flows.full import full
    from flows.train import train

    flows = {"full": full, "data": data, "train": train, "evaluate": evaluate}
    api = prefect_api(root)
    try:
        deployments = [flow.to_deployment(name, concurrency_limit=1, tags=["raphael"]) for name, flow in flows.items()]
        _announce(root, lambda: all(answers(f"{api}/deployments/name/raphael/{name}") for name in NAMES))
        serve(*deployments, limit=1, print_starting_message=False)
    except httpx.ConnectError:
        raise StageError(f"no Prefect server answers at {api}; start it with make up") from None


def running(root: Path, name: str) -> bool:
    """Whether the process that `up` started under this name lives: same id and same start time."""
    import psutil

    record = _record(root, name)
    if not record.is_file():
        return False
    known = read_json(record)
    try:
        process = psutil.Process(known["pid"])
        return abs(process.create_time() - known["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def answers(url: str) -> bool:
    """Whether GET `url` says 200. Loopback: no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def prefect_api(root: Path) -> str:
    """The address of Prefect's API: the environment's, else prefect.toml's."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url.rstrip("/")
    with open(root / "prefect.toml", "rb") as file:
        return tomllib.load(file)["api"]["url"].rstrip("/")


def _loopback(api: str) -> tuple[str, int]:
    parts = urlsplit(api)
    if parts.hostname not in ("127.0.0.1", "localhost") or not parts.port:
        raise StageError(
            f"got the Prefect address {api}, expected http://127.0.0.1:PORT/api: servers start on loopback"
        )
    return "127.0.0.1", parts.port


def _start(root: Path, name: str, command: list[str], port: int | None) -> None:
    import psutil

    if running(root, name):
        return
    if port is not None:
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                variable = {
                    "prefect": "PREFECT_API_URL=http://127.0.0.1:OTHER/api",
                    "mlflow": "RAPHAEL_MLFLOW_PORT=OTHER",
                }
                raise StageError(
                    f"{name}: port {port} is in use by another program; stop it, or say {variable[name]} make up"
                ) from None
    with open(_log(root, name), "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=stage_environment(root),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    write_json(_record(root, name), {"pid": process.pid, "created": psutil.Process(process.pid).create_time()})


def _wait(root: Path, name: str, ready: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + START_S
    while not ready():
        if not running(root, name):
            said = [line for line in _log(root, name).read_text(errors="replace").splitlines() if line.strip()]
            raise StageError(
                f"{name}: ended while starting: {said[-1] if said else 'without a word'} ({_log(root, name)})"
            )
        if time.monotonic() > deadline_s:
            raise StageError(f"{name}: did not answer within {START_S:.0f} s; its log: {_log(root, name)}")
        time.sleep(0.3)


def _announce(root: Path, registered: Callable[[], bool]) -> None:
    """Write .run/deployments.ready once the server knows all deployments; `serve` itself does not return to say so."""
    import threading

    def watch() -> None:
        while not registered():
            time.sleep(0.3)
        write_json(root / ".run" / READY, list(NAMES))

    threading.Thread(target=watch, daemon=True).start()


def _record(root: Path, name: str) -> Path:
    return root / ".run" / f"{name}.json"


def _log(root: Path, name: str) -> Path:
    return root / ".run" / f"{name}.log"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["up", "down", "run"])
    arguments = parser.parse_args(argv)
    with one_clear_line("serve") as outcome:
        root = Path.cwd()
        prepare(root)
        {"up": up, "down": down, "run": run}[arguments.action](root)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
