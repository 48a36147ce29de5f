"""Train with Ray Train workers.

Ray starts the workers, forms the process group and restarts the group when one dies; the loop is the same as without.
Our own checkpoints are the truth: a restarted group goes on from the newest one, and nothing is reported to Ray but
the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael.ray_cluster import prepare_environment, reason, start, stop
from raphael.stage import StageError

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
        start(cluster.num_workers, "set train.num_workers to 0 to train in this process")
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


def threads_per_worker(cluster: Cluster) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // cluster.num_workers)
