"""Train with Ray Train workers. The only `import ray` of the project.

Ray starts the workers, forms the process group and restarts the group when one dies; the loop is the same as without.
Our own checkpoints are the truth: a restarted group goes on from the newest one, and nothing is reported to Ray but
the end.

Safety: Ray's own ports can run any code. They ask for a token that is fresh in every process, and are bound to loopback
as far as Ray can be told to (tests/train/test_ray_trainer.py lists the listeners and the exceptions). With RAY_ADDRESS
set, an existing cluster is used and its own rules hold.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael.stage import StageError

OBJECT_STORE_BYTES = 200 << 20  # the loop moves nothing through it; Ray refuses less than 75 MiB
START_ATTEMPTS = 2
MARK = "RAPHAEL_RAY_RUN"  # in the environment of every process of one Ray
START_PATIENCE_S = 120.0
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
POLL_S = 0.5


@dataclass(frozen=True)
class Cluster:
    """How many workers, and where they work. name: of the run; it must change with the settings.

    max_failures: restarts of the group in one run. timeout_s: after which a message nobody answers is a failure.
    """

    num_workers: int
    use_gpu: bool
    name: str
    storage: Path  # absolute
    max_failures: int = 3
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise StageError(
                f"train.num_workers: got {self.num_workers} Ray workers, expected at least 1; 0 in params.yaml trains "
                "in this process, without Ray"
            )


def fit(work: Callable[[Any, Any], Any], job: Any, cluster: Cluster, watch: Callable[[], None] = lambda: None) -> None:
    """Run work(job, world) in `cluster.num_workers` processes, to the end. watch: called about twice a second
    meanwhile.

    Ctrl-C, SIGTERM (SystemExit) and exceptions end Ray and all its processes before they go on. Raises StageError with
    the worker's own line where the training failed.
    """
    prepare_environment()
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    given_up = cluster.storage / "given_up.txt"
    cluster.storage.mkdir(parents=True, exist_ok=True)
    given_up.unlink(missing_ok=True)
    try:
        start(cluster)
        trainer = TorchTrainer(
            _in_worker,
            train_loop_config={
                "work": work,
                "job": job,
                "threads": threads_per_worker(cluster),
                "use_gpu": cluster.use_gpu,
                "failure": given_up,
            },
            torch_config=TorchConfig(
                backend="nccl" if cluster.use_gpu else "gloo", timeout_s=max(1, round(cluster.timeout_s))
            ),
            scaling_config=ScalingConfig(num_workers=cluster.num_workers, use_gpu=cluster.use_gpu),
            run_config=RunConfig(
                name=cluster.name,
                storage_path=str(cluster.storage),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        _wait(trainer, watch, given_up)
    finally:
        stop()


def _wait(trainer: Any, watch: Callable[[], None], given_up: Path) -> None:
    """fit() in a thread of its own: in the main thread it would take over Ctrl-C and leave with status 0."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        watch()
        if given_up.exists():
            raise StageError(given_up.read_text(encoding="utf-8"))
    if given_up.exists():
        raise StageError(given_up.read_text(encoding="utf-8"))
    if failure:
        raise StageError(reason(failure[0])) from (failure[0] if os.environ.get("RAPHAEL_TRACEBACK") else None)


def _in_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from raphael.train.loop import World

    torch.set_num_threads(settings["threads"])  # Ray gives each worker one
    device = str(ray.train.torch.get_device()) if settings["use_gpu"] else "cpu"
    try:
        settings["work"](settings["job"], World.current(device))
    except StageError as error:  # would fail again at every restart: the driver ends it all when it sees this file
        temporary = settings["failure"].with_suffix(f".{os.getpid()}")
        temporary.write_text(str(error), encoding="utf-8")
        os.replace(temporary, settings["failure"])
        raise


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
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    if os.environ.get("RAY_ADDRESS"):
        del defaults["GLOO_SOCKET_IFNAME"], defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
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


def start(cluster: Cluster) -> None:
    """A private Ray of this process, or a connection to RAY_ADDRESS."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="WARNING")
        return
    for attempt in range(START_ATTEMPTS):
        try:
            with _patience():
                ray.init(
                    address="local",
                    num_cpus=cluster.num_workers + 1,  # slots, not cores: the workers' and the controller's
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
                raise StageError(
                    f"Ray does not start ({reason(error)}); set train.num_workers to 0 to train in this process"
                ) from None
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


def threads_per_worker(cluster: Cluster) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // cluster.num_workers)


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
    return lines[-1] if lines else type(error).__name__
