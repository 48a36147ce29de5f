"""Train with Ray Train workers.

Ray starts the workers, forms the process group and restarts the group when one dies; the loop is the same as without.
Our own checkpoints are the truth: a restarted group resumes from the newest one, and nothing is reported to Ray but
the end.

On a cluster a node may be lost for good. Then a group of fewer workers goes on (min_workers), and grows again after a
checkpoint when there is room. Ray's own elastic groups would take any number of workers; ours must share a batch
evenly, and end with a checkpoint just written. So each size is a fit of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raphael.base.ray_cluster import kill_actors_here, prepare_environment, reason, start, stop
from raphael.base.stage import StageError
from raphael.train.distributed.lean_ray import lean
from raphael.train.stopping import ASKED, StopRequest

POLL_S = 0.5
NODES_POLL_S = 5.0
PROBE_S = 3.0  # for room that is there, Ray needs well under a second
START_RETRIES = 5  # of a group whose worker dies while it starts: on a node that is gone, say, before Ray knows it
RETRY_S = 5.0
STOP = "stop "  # before a group's token
LAST_WAIT_S = 20.0  # for the thread in which Ray waits, once what it waits for is gone


@dataclass(frozen=True)
class Cluster:
    """How many workers, and where they work. name: of the run; it must change with the settings.

    max_failures: restarts of a group. timeout_s: after which a message nobody answers is a failure.
    min_workers: so many may go on where there is no room for all; 0: only all. placement_timeout_s: how long the
    cluster may take to find room. batch_size: of all workers; a group's number divides it. checkpoints: the folder in
    which a new name says that a restart loses nothing; None: a group never grows.
    """

    num_workers: int
    use_gpu: bool
    name: str
    storage: Path  # absolute
    max_failures: int = 3
    timeout_s: float = 600.0
    min_workers: int = 0
    placement_timeout_s: float = 300.0
    batch_size: int = 0
    checkpoints: Path | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise StageError(
                f"train.num_workers: got {self.num_workers} Ray workers, expected at least 1; 0 in params.yaml trains "
                "in this process, without Ray"
            )

    @property
    def need(self) -> str:
        """What of Ray's resources a worker takes one of."""
        return "GPU" if self.use_gpu else "CPU"

    def sizes(self) -> list[int]:
        """How many workers a group may have, the largest first."""
        fewest = self.min_workers or self.num_workers
        return [count for count in range(self.num_workers, fewest - 1, -1) if self.batch_size % count == 0]


class Regroup(Exception):
    """This group is over, another of so many workers begins. line: why, for a person."""

    def __init__(self, workers: int, line: str, failed: bool = False):
        super().__init__(line)
        self.workers, self.line, self.failed = workers, line, failed


def fit(
    work: Callable[[Any, Any], Any],
    job: Any,
    cluster: Cluster,
    watch: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> None:
    """Run work(job, world) in `cluster.num_workers` processes, to the end. watch: called about twice a second
    meanwhile. say(line): a node is lost, the group changes.

    Ctrl-C and SIGTERM ask the workers to save and leave (raphael/train/stopping.py); a second one, and any exception,
    ends Ray and all its processes before it goes on. Raises StageError with the worker's own line where the training
    failed, or with what is missing where the cluster has no room.
    """
    workers, failures = cluster.num_workers, 0
    cluster.storage.mkdir(parents=True, exist_ok=True)
    (cluster.storage / "given_up.txt").unlink(missing_ok=True)
    with StopRequest() as stop_request:
        while True:
            prepare_environment()
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{cluster.placement_timeout_s:g}"
            group = Group(cluster, workers)
            try:
                start(workers, "set train.num_workers to 0 to train in this process")
                stop_request.listen()  # Ray has brought handlers of its own
                _wait(_trainer(work, job, group), group, watch, say, stop_request)
                return
            except Regroup as change:
                failures += change.failed
                if failures > START_RETRIES:
                    raise StageError(change.line) from None
                say(change.line)
                workers = change.workers
            finally:
                group.end()
                stop()


class Group:
    """Some workers that train together, and what they and the driver say to each other by files in cluster.storage."""

    def __init__(self, cluster: Cluster, workers: int):
        self.cluster, self.workers = cluster, workers
        self.given_up = cluster.storage / "given_up.txt"
        self.fence, self.token = cluster.storage / "group.txt", secrets.token_hex(8)
        self.fence.write_text(self.token, encoding="utf-8")
        self.room, self.looked_s, self.newest = workers, time.monotonic(), self._newest()

    def end(self) -> None:
        """Workers that are still there, on a node that cannot be reached say, leave when they read it."""
        self.fence.write_text("over", encoding="utf-8")

    def ask_to_stop(self, say: Callable[[str], None]) -> None:
        """The workers agree to stop at the next point logged."""
        self.fence.write_text(STOP + self.token, encoding="utf-8")
        say("asked to stop: the workers save after the next point logged (a second time ends them at once)")

    def _newest(self) -> str:
        folder = self.cluster.checkpoints
        return max((path.name for path in folder.glob("[0-9]*")), default="") if folder is not None else ""

    def look(self, say: Callable[[str], None]) -> None:
        """Say when nodes come and go. Raises Regroup where a checkpoint was just written and more workers find room."""
        if not os.environ.get("RAY_ADDRESS") or time.monotonic() - self.looked_s < NODES_POLL_S:
            return
        self.looked_s = time.monotonic()
        with contextlib.suppress(Exception):  # only lines hang on it; where the cluster is gone, fit() says so
            room, nodes = room_in_cluster(self.cluster.need)
            if room < self.workers <= self.room:
                say(f"a node is lost: {nodes}; {self._what_then()}")
            elif self.room < self.workers <= room:
                say(f"the cluster has room for {self.workers} workers again: {nodes}")
            self.room = room
        newest = self._newest()
        if newest != self.newest:
            self.newest = newest
            if more := self._may_grow_to():
                raise Regroup(more, f"room for {more} workers again: on with them instead of {self.workers}")

    def _may_grow_to(self) -> int:
        """How many workers there is room for, if they are more than these; else 0."""
        with contextlib.suppress(Exception):
            for count in self.cluster.sizes():
                if self.workers < count <= self.room and fits(count - self.workers, self.cluster.need):
                    return count
        return 0

    def _what_then(self) -> str:
        fewer = [count for count in self.cluster.sizes() if count < self.workers]
        then = f"on with {fewer[0]} or fewer" if fewer else "an end (train.parallel.min_workers lets fewer go on)"
        return (
            f"waiting for room for {self.workers} workers, up to {self.cluster.placement_timeout_s:g} s "
            f"(train.parallel.placement_timeout_s), then {then}"
        )

    def no_room(self) -> Regroup | StageError:
        """What follows when Ray has waited for room in vain."""
        waited = f"no room for {self.workers} workers within {self.cluster.placement_timeout_s:g} s"
        for count in self.cluster.sizes():
            if count <= self.workers and fits(count, self.cluster.need):
                return Regroup(count, f"{waited}: resuming with {count} from the newest checkpoint")
        fewest = min(self.cluster.sizes(), default=self.cluster.num_workers)
        return StageError(
            f"{waited}: got {room_in_cluster(self.cluster.need)[1]} (less what others use), expected "
            f"{fewest} {self.cluster.need} at least, one a worker; nothing is lost: the same command resumes from the "
            "newest checkpoint when there is room, or lower train.num_workers, or train.parallel.min_workers"
        )


def room_in_cluster(need: str) -> tuple[int, str]:
    """(workers that an idle cluster would hold, in words what it has)."""
    import ray

    found = [int(node["Resources"].get(need, 0)) for node in ray.nodes() if node["Alive"]]
    return sum(found), f"{len(found)} node{'' if len(found) == 1 else 's'} with {sum(found)} {need} in all"


def fits(count: int, need: str) -> bool:
    """Whether the cluster has room for so many more workers now: asked by reserving it, and giving it back."""
    from ray.util import placement_group, remove_placement_group

    reserved = placement_group([{need: 1}] * count)
    try:
        return bool(reserved.wait(PROBE_S))
    finally:
        remove_placement_group(reserved)


def _trainer(work: Callable[[Any, Any], Any], job: Any, group: Group) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = group.cluster
    settings = {"work": work, "job": job, "threads": threads_per_worker(cluster), "use_gpu": cluster.use_gpu}
    settings |= {"failure": group.given_up, "fence": group.fence, "token": group.token}
    return lean(TorchTrainer)(
        _in_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo", timeout_s=max(1, round(cluster.timeout_s))
        ),
        scaling_config=ScalingConfig(num_workers=group.workers, use_gpu=cluster.use_gpu),
        run_config=RunConfig(
            name=cluster.name,
            storage_path=str(cluster.storage),
            # a group that finds no room: Ray would try again for ever, and in silence
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _wait(
    trainer: Any, group: Group, watch: Callable[[], None], say: Callable[[str], None], stop_request: StopRequest
) -> None:
    """fit() in a thread of its own: in the main thread it would take over Ctrl-C and leave with status 0."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="ray-train-fit", daemon=True)
    thread.start()
    asked = False
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            watch()
            if group.given_up.exists():
                break
            if not stop_request.requested:
                group.look(say)
            elif not asked:
                asked = True
                group.ask_to_stop(say)
    finally:
        _end_waiting(thread)
    if group.given_up.exists():
        raise StageError(group.given_up.read_text(encoding="utf-8"))
    if stop_request.requested:
        stop_request.leave()
    if failure:
        raise _what_follows(failure[0], group) from (failure[0] if os.environ.get("RAPHAEL_TRACEBACK") else None)


def _what_follows(failure: BaseException, group: Group) -> Regroup | StageError:
    kind = type(getattr(failure, "controller_failure", None)).__name__  # Ray's own classes are private
    if kind == "WorkerGroupStartupTimeoutError":
        return group.no_room()
    if kind == "WorkerGroupStartupFailedError":
        time.sleep(RETRY_S)
        return Regroup(group.workers, f"a worker did not start ({reason(failure)})", failed=True)
    return StageError(reason(failure))


def _end_waiting(thread: threading.Thread) -> None:
    """A thread that waits for Ray's answer does so in C++: disconnecting under it is a segmentation fault of ours. So
    what it waits for has to go first."""
    deadline_s = time.monotonic() + LAST_WAIT_S
    while thread.is_alive() and time.monotonic() < deadline_s:
        with contextlib.suppress(Exception):  # where the cluster is gone, so is the controller
            kill_actors_here("TrainController")
        thread.join(POLL_S)


def _in_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from raphael.train.distributed.versions import check_versions
    from raphael.train.loop import World

    follow_fence(settings["fence"], settings["token"])
    if ASKED.is_set():
        return
    torch.set_num_threads(settings["threads"])  # Ray gives each worker one
    device = str(ray.train.torch.get_device()) if settings["use_gpu"] else "cpu"
    try:
        world = replace(World.current(device), preempted=lambda: ray.train.get_preemption_info() is not None)
        check_versions(world)
        settings["work"](settings["job"], world)
    except SystemExit:
        if not ASKED.is_set():
            raise
    except StageError as error:  # would fail again at every restart: the driver ends it all when it sees this file
        temporary = settings["failure"].with_suffix(f".{os.getpid()}")
        temporary.write_text(str(error), encoding="utf-8")
        os.replace(temporary, settings["failure"])
        raise


def follow_fence(fence: Path, token: str, period_s: float = 1.0) -> None:
    """Do from now on what the file says that the driver writes: ASKED is set when this group shall save and leave.

    End this process as soon as it holds another group's token: two groups must not write checkpoints side by side. Ray
    ends the workers that it can reach; this is for those that it cannot, and for a driver that was killed.
    """

    def look() -> None:
        with contextlib.suppress(OSError):  # a file system that is slow or away says nothing
            now = fence.read_text(encoding="utf-8")
            if now == STOP + token:
                ASKED.set()
            elif now and now != token:
                os._exit(1)

    def follow() -> None:
        while True:
            time.sleep(period_s)
            look()

    look()
    threading.Thread(target=follow, name="raphael-fence", daemon=True).start()


def threads_per_worker(cluster: Cluster) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // cluster.num_workers)
