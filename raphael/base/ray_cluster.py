"""The life of a Ray of ours: its environment, start, end, and what its exceptions mean.

Training (raphael/train/distributed/ray_trainer.py) and the data stages (data_pipeline/engine/on_ray.py) use it alike.

Safety: Ray's own ports can run any code, and its folder of sessions is everyone's by default; ours is this user's
alone and goes with its Ray. They ask for a token that is fresh in every process, and are bound to loopback
as far as Ray can be told to (tests/train/distributed/test_ray_trainer.py lists the listeners and the exceptions). With
RAY_ADDRESS set, an existing cluster is used and its own rules hold.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raphael.base.cores.leftovers import private_folder
from raphael.base.stage import StageError

OBJECT_STORE_BYTES = 200 << 20  # nothing large moves through it; Ray refuses less than 75 MiB
START_ATTEMPTS = 2
MARK = "RAPHAEL_RAY_RUN"  # in the environment of every process of one Ray
START_PATIENCE_S = 120.0
FOLDER = "raphael-ray"  # in /tmp: sockets have names of 107 characters at most, so a workspace's own is too deep
_folders: list[Path] = []  # of this process' Ray, until it has ended
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def prepare_environment() -> None:
    """What Ray reads from the environment, before it is imported. A person's own settings stay."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if package_root not in paths:  # workers start in a folder of Ray's
        os.environ["PYTHONPATH"] = os.pathsep.join([package_root, *paths])
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would pack the whole folder, data too
        # Ray's words for "this machine alone": then it takes 127.0.0.1 for a node's address, on any system
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # on a busy machine its agent needs longer than the raylet would wait
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_worker_niceness": "0",  # 15 by default: whatever else this machine does would come before the training
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # a process more, five seconds of a core, to ask whether a cloud takes this machine back
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    if os.environ.get("RAY_ADDRESS"):
        del defaults["GLOO_SOCKET_IFNAME"], defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
        del defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
    os.environ[MARK] = secrets.token_hex(16)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS") and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = token()
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)


@functools.cache
def token() -> str:
    """This process' own token: Ray reads it once and holds on to it, so a second fit here must use the same."""
    return secrets.token_hex(32)


def start(num_workers: int, without: str) -> None:
    """A private Ray of this process with room for so many workers, or a connection to RAY_ADDRESS.

    without: how to do the work without Ray, for the message of the StageError where it does not start.
    """
    import ray

    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False, logging_level="WARNING")
        except Exception as error:  # of several kinds, by how far it came
            raise StageError(f"no Ray cluster answers at {address} ({reason(error)}); start it, or {without}") from None
        return
    home = private_folder(FOLDER, Path(os.environ.get("RAY_TMPDIR", "/tmp")))
    _folders.append(home)
    for attempt in range(START_ATTEMPTS):
        try:
            with _patience():
                ray.init(
                    address="local",
                    _temp_dir=str(home),
                    num_cpus=num_workers + 1,  # slots, not cores: the workers' and the controller's
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="WARNING",
                    _node_ip_address="127.0.0.1",
                )
            return
        except Exception as error:  # Ray raises a plain Exception when its node does not come up
            ray.shutdown()
            end_processes(_marked())
            if attempt + 1 == START_ATTEMPTS:
                raise StageError(f"Ray does not start ({reason(error)}); {without}") from None
            print(f"Ray did not start ({reason(error)}); trying again", flush=True)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Let a busy machine take its time to start Ray's node.

    Two limits of Ray are numbers in its code: its node must be up after 30 s, and its agents must have written down
    the ports that they chose after 15 s, else it aborts. So the question for the node's entry waits longer, and the
    agents get their ports from us. Where a Ray no longer has these functions, nothing changes.
    """
    from ray._private import services
    from ray._private.parameter import RayParams

    if not (hasattr(services, "get_node") and hasattr(RayParams, "update_pre_selected_port")):
        yield
        return
    get_node, select_ports = services.get_node, RayParams.update_pre_selected_port

    def patient_get_node(*arguments: Any, **keywords: Any) -> Any:
        deadline_s = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                return get_node(*arguments, **keywords)
            except RuntimeError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.5)

    def select_agent_ports(params: Any) -> Any:
        for name, port in zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)), strict=True):
            if not getattr(params, name, None):
                setattr(params, name, port)
        return select_ports(params)

    services.get_node, RayParams.update_pre_selected_port = patient_get_node, select_agent_ports
    try:
        yield
    finally:
        services.get_node, RayParams.update_pre_selected_port = get_node, select_ports


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now. Where somebody is quicker, Ray does not start, and we try again."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def stop() -> None:
    """Shut Ray down and see to it that nothing of it is left."""
    import ray

    ray.shutdown()
    end_processes(_marked())
    os.environ.pop(MARK, None)
    while _folders:
        folder = _folders.pop()
        if not os.environ.get("RAPHAEL_TRACEBACK"):  # who looks for a fault wants Ray's logs
            shutil.rmtree(folder, ignore_errors=True)


def kill_actors_here(kind: str) -> None:
    """SIGKILL this driver's actors of that class on this machine: who waits for them is told that they are gone.

    For actors whose handles are Ray's own, as its train controller's, which always runs beside its driver.
    """
    from ray import JobID, get_runtime_context
    from ray._private.state import actors

    here = get_runtime_context()
    job = JobID.from_hex(here.get_job_id())
    for actor in actors(job_id=job, actor_state_name="ALIVE").values():
        if actor["ActorClassName"] == kind and actor["Address"]["NodeID"] == here.get_node_id():
            with contextlib.suppress(ProcessLookupError):
                os.kill(actor["Pid"], signal.SIGKILL)


def end_processes(processes: list[Any], grace_s: float = 5.0) -> None:
    """Ask processes (psutil's) to end, then make them."""
    import psutil

    for signal_name in ("terminate", "kill"):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, signal_name)()
        _, processes = psutil.wait_procs(processes, timeout=grace_s)


def _marked() -> list[Any]:
    """Processes started below this one since `prepare_environment`, also those whose parent has died since."""
    import psutil

    mark, found = os.environ.get(MARK), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another person's, or just gone
            if mark and process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def reason(error: BaseException) -> str:
    """The line that a person needs of an exception that has travelled through several processes.

    Ray wraps a worker's exception, with its traceback as text, at each border; the innermost one is the cause.
    """
    failures = getattr(error, "worker_failures", None)
    if failures:
        first = min(failures)
        return f"worker {first}: {reason(failures[first])}"
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, BaseException) and cause is not error:
        return reason(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and type(error).__name__ == "OutOfMemoryError":  # Ray's: what happened, then pages of what one may set
        return lines[0]
    return lines[-1] if lines else type(error).__name__
