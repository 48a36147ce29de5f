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
from flows.processes import Family
from raphael.stage import StageError, read_json, write_json

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
    if running(root, "prefect") and answers(f"{prefect_api(root)}/health"):
        os.environ["PREFECT_API_URL"] = prefect_api(root)
        yield
        return
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = "prefect-temporary"
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    try:
        start(root, name, prefect_command(port), port, {"PREFECT_UI_ENABLED": "false"})
        wait(root, name, lambda: answers(f"http://127.0.0.1:{port}/api/health"))
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
    return [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]


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


def loopback_port(api: str) -> int:
    """The port of http://127.0.0.1:PORT/api. Raises StageError for any other host."""
    parts = urlsplit(api)
    if parts.hostname not in ("127.0.0.1", "localhost") or not parts.port:
        raise StageError(
            f"got the Prefect address {api}, expected http://127.0.0.1:PORT/api: servers start on loopback"
        )
    return parts.port


def start(root: Path, name: str, command: list[str], port: int | None, extra: dict[str, str] | None = None) -> None:
    """Start `command` in the background unless it runs already. Raises StageError where its port is taken."""
    import psutil

    if running(root, name):
        return
    if port is not None:
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                other = "RAPHAEL_MLFLOW_PORT=PORT" if name == "mlflow" else "PREFECT_API_URL=http://127.0.0.1:PORT/api"
                raise StageError(
                    f"{name}: port {port} is in use by another program; stop it, or choose another: {other} make up"
                ) from None
    with open(log_of(root, name), "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=root,
            env={**stage_environment(root), **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
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
