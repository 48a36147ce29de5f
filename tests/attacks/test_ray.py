"""Ray, as a training starts it: whoever has not its token joins nothing and submits nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest

from raphael.base.ray_cluster import MARK
from tests.attacks.ways import ALLOW_ORIGIN, JSON, REFUSED, ask

PROJECT = Path(__file__).resolve().parents[2]
JOB = "/api/jobs/"
AGENT_JOB = "/api/job_agent/jobs/"
COUNTERS = 44217  # of Ray's autoscaler, for Prometheus: a fixed port that asks for nothing and takes nothing
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
ray.get(ray.remote(lambda file: open(file, "w").close()).remote(sys.argv[2]), timeout=120)
"""


def without_token() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH") and name != MARK}


@contextmanager
def running(*arguments: str) -> Iterator[dict]:
    paths = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**without_token(), "PYTHONPATH": paths}
    command = [sys.executable, str(Path(__file__).with_name("ray_here.py")), *arguments]
    process = subprocess.Popen(command, cwd=PROJECT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(next(line for line in process.stdout if line.startswith("{")))
    finally:
        process.communicate(timeout=120)


def disguises(port: int, token: str) -> list[tuple[str, list[tuple[str, str]]]]:
    own, evil = ("Host", f"127.0.0.1:{port}"), ("Origin", "https://evil.example")
    return [
        ("another user, no token", [own]),
        ("another user, a wrong token", [own, ("Authorization", f"Bearer {token[::-1]}")]),
        ("a foreign page", [own, evil]),
        ("DNS rebinding", [("Host", f"evil.example:{port}")]),
    ]


def refuse(port: int, headers: list, job: dict, way: str, target: str, tried: Callable) -> None:
    """Read and submit jobs on `port`; what does not speak HTTP at all is no page's business."""
    for method, path in (("GET", JOB), ("POST", JOB), ("POST", AGENT_JOB), ("OPTIONS", JOB)):
        try:
            answer = ask(port, method, path, [*headers, *JSON.items()], job if method == "POST" else None)
        except (OSError, HTTPException) as error:
            tried(target, way, f"{method} {path}", f"no HTTP: {type(error).__name__}")
            continue
        assert ALLOW_ORIGIN not in answer.headers, f"{way}: {method} {path}: a page may read the answer"
        counters = port == COUNTERS and (method == "OPTIONS" or answer.text.startswith("# HELP autoscaler_"))
        if not counters:
            assert answer.status in REFUSED, f"{way}: {method} {path}: got {answer.status} {answer.text[:200]}"
        tried(target, way, f"{method} {path}", "counters alone" if counters else str(answer.status))


def test_no_port_of_ray_takes_a_job_from_a_page_or_a_stranger(tmp_path: Path, tried: Callable) -> None:
    with running() as ray:
        assert len(ray["listeners"]) >= 4
        for port, name in ray["listeners"].items():
            for way, headers in disguises(int(port), ray["token"]):
                job = {"entrypoint": f"touch {tmp_path / 'planted'}"}
                refuse(int(port), headers, job, way, f"Ray, {name}", tried)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nobody_without_the_token_joins_and_runs_a_task(tmp_path: Path, tried: Callable) -> None:
    with running() as ray:
        for way, env in (
            ("another user, no token", {}),
            ("another user, a wrong token", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}),
            ("the owner", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray["token"]}),
        ):
            file = tmp_path / way.replace(" ", "-")
            command = [sys.executable, "-c", STRANGER, ray["gcs"], str(file)]
            same = {name: value for name, value in ray["env"].items() if not name.startswith("RAY_AUTH")}
            env = {**without_token(), **same, **env}  # it knows all but the token
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
            assert (done.returncode == 0) == file.exists() == (way == "the owner"), f"{way}: {done.stderr[-500:]}"
            if way != "the owner":
                tried("Ray", way, "join and run a task", done.stderr.strip().splitlines()[-1].split(":")[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_job_server_of_a_cluster_asks_for_the_token(tmp_path: Path, tried: Callable) -> None:
    pytest.importorskip("aiohttp_cors", reason="Ray's job server needs ray[default]: make cluster")
    with running("dashboard") as ray:
        port = int(ray["dashboard"].rsplit(":", 1)[1])
        for way, headers in disguises(port, ray["token"]):
            job = {"entrypoint": f"touch {tmp_path / 'planted'}"}
            refuse(port, headers, job, way, "Ray's job server", tried)
        right = [("Host", f"127.0.0.1:{port}"), ("Authorization", f"Bearer {ray['token']}"), *JSON.items()]
        assert ask(port, "GET", JOB, right).status == 200
    assert not list(tmp_path.iterdir())
