"""Servers in the background: started once, known by process id and start time, ended whole."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from flows.environment import stage_environment
from flows.serve import access
from flows.serve.processes import Family
from raphael.base.stage import StageError, read_json, write_json

START_S = 300.0  # a first start on a busy machine
SENDING_S = 5.0


def stop(root: Path, name: str) -> bool:
    """End the process that was started under this name, and all that it started; whether there was one."""
    lives = running(root, name)
    if lives:
        Family(read_json(record_of(root, name))["pid"]).end()
    record_of(root, name).unlink(missing_ok=True)
    return lives


@contextlib.contextmanager
def prefect_for_one_run(root: Path) -> Iterator[None]:
    """PREFECT_API_URL names a server that answers: the caller's, the one of `make up`, or one that ends with the block.

    Must be entered before Prefect is imported. prefect.toml names a server that need not run. Prefect's own temporary
    server is no way out: an empty PREFECT_API_URL starts it, but then events are sent to nowhere.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    api, auth = prefect_api(root), access.known(root)
    if auth and owns(root, "prefect", urlsplit(api).port or 80) and answers(f"{api}/health"):
        os.environ.update({"PREFECT_API_URL": api, **access.for_prefect_client(auth)})
        yield
        return
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name, api, auth = "prefect-temporary", f"http://127.0.0.1:{port}/api", access.fresh()
    os.environ.update({"PREFECT_API_URL": api, **access.for_prefect_client(auth)})
    try:
        page = {"PREFECT_UI_ENABLED": "false"}
        start(root, name, prefect_command(port), port, {**access.for_prefect_server(auth, port, root), **page})
        wait(root, name, lambda: owns(root, name, port) and answers(f"{api}/health"))
        try:
            yield
        finally:
            _send_what_is_queued()
    finally:
        stop(root, name)


def _send_what_is_queued() -> None:
    """Log lines and events still on their way, sent while the server answers: at exit Prefect tries for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=SENDING_S)


def prefect_command(port: int) -> list[str]:
    return [sys.executable, "-m", "flows.serve.guard", "prefect", "--port", str(port)]


def running(root: Path, name: str) -> bool:
    """Whether the process that `up` started under this name lives: same id and same start time."""
    import psutil

    record = record_of(root, name)
    if not record.is_file():
        return False
    known = read_json(record)
    try:
        process = psutil.Process(known["pid"])
        return abs(process.create_time() - known["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def owns(root: Path, name: str, port: int) -> bool:
    """Whether it is the process started under this name, or a child of it, that listens on `port`.

    Somebody else's server there would be told our string, and would tell our process what to run.
    """
    import psutil

    if not running(root, name):
        return False
    with contextlib.suppress(psutil.Error):  # it may just end
        leader = psutil.Process(read_json(record_of(root, name))["pid"])
        for process in (leader, *leader.children(recursive=True)):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def answers(url: str, auth: str | None = None) -> bool:
    """Whether GET `url` says 200. Loopback: no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=access.header(auth) if auth else {})
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def prefect_api(root: Path) -> str:
    """The address of Prefect's API: the environment's, else prefect.toml's."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url.rstrip("/")
    with open(root / "prefect.toml", "rb") as file:
        return tomllib.load(file)["api"]["url"].rstrip("/")


def loopback_port(api: str) -> int:
    """The port of http://127.0.0.1:PORT/api. Raises StageError for any other host."""
    parts = urlsplit(api)
    if parts.hostname not in ("127.0.0.1", "localhost") or not parts.port:
        raise StageError(
            f"got the Prefect address {api}, expected http://127.0.0.1:PORT/api: servers start on loopback"
        )
    return parts.port


def start(root: Path, name: str, command: list[str], port: int | None, extra: dict[str, str] | None = None) -> None:
    """Start `command` in the background unless it runs already. Raises StageError where its port is taken.

    A server (who has a port) writes files that only their owner reads: databases, artifacts. What serves the flows
    writes data and reports like any other command.
    """
    import psutil

    if running(root, name):
        return
    if port is not None:
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                ways = {"mlflow": "RAPHAEL_MLFLOW_PORT=PORT", "images": "RAPHAEL_SERVE_PORT=PORT"}
                other = ways.get(name, "PREFECT_API_URL=http://127.0.0.1:PORT/api")
                raise StageError(
                    f"{name}: port {port} is in use by another program; stop it, or choose another: {other} make up"
                ) from None
    access.private_folder(root / ".run")
    with open(access.open_private(log_of(root, name)), "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=root,
            env={**stage_environment(root), **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=access.ONLY_THE_OWNER if port is not None else -1,
        )
    write_json(record_of(root, name), {"pid": process.pid, "created": psutil.Process(process.pid).create_time()})


def wait(root: Path, name: str, ready: Callable[[], bool]) -> None:
    """Until `ready()`. Raises StageError where the process ends instead, or nothing happens for START_S."""
    deadline_s = time.monotonic() + START_S
    while not ready():
        if not running(root, name):
            said = [line for line in log_of(root, name).read_text(errors="replace").splitlines() if line.strip()]
            raise StageError(
                f"{name}: ended while starting: {said[-1] if said else 'without a word'} ({log_of(root, name)})"
            )
        if time.monotonic() > deadline_s:
            raise StageError(f"{name}: did not answer within {START_S:.0f} s; its log: {log_of(root, name)}")
        time.sleep(0.3)


def record_of(root: Path, name: str) -> Path:
    return root / ".run" / f"{name}.json"


def log_of(root: Path, name: str) -> Path:
    return root / ".run" / f"{name}.log"
