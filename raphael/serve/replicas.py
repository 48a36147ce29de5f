"""The same application as a Ray Serve deployment: a front with the queue, replicas that hold the models.

    serve run cluster/serve.yaml          on a running Ray

The front is `create_app`; its threads hand each task to a replica and wait. A replica that dies under a task loses
nothing: the task goes to another one with its seed, and gives the same bytes. The front is one process: what waits in
it ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from raphael.base import devices
from raphael.base.cores.threads import wait_passively
from raphael.base.stage import StageError
from raphael.base.strict import load
from raphael.base.web.door import own_names
from raphael.serve.app import Settings, create_app
from raphael.serve.door.access import read_token
from raphael.serve.door.problems import Problem
from raphael.serve.info import Catalogue, ModelInfo
from raphael.serve.jobs import Limits
from raphael.serve.models import open_models
from raphael.serve.server import local_perform, warm
from raphael.serve.work import Stopped, Task, Watch

log = logging.getLogger("raphael.serve")
ATTEMPTS = 10  # of a task whose replica is lost: more often than that is no accident
PAUSE_S = 0.5
LOOK_S = 0.25  # how often a front that waits for a replica looks whether the job is still wanted
EVALUATION, STEP, DONE, PROBLEM = "evaluation", "step", "done", "problem"


@dataclass(frozen=True)
class Replicas:
    """The `args` of cluster/serve.yaml. gpus: of each replica. names: HOST:PORT by which the proxy is asked, beside
    loopback's; with any, RAPHAEL_SERVE_TOKEN has to be set where the front runs. port: the proxy's."""

    checkpoints: tuple[str, ...]
    replicas: int
    gpus: float = 0.0
    cpus: float = 1.0
    device: str = "auto"
    precision: str = "fp32"
    port: int = 8000
    names: tuple[str, ...] = ()
    queue: int = 32
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.replicas < 1 or not self.checkpoints:
            raise ValueError(f"replicas: got {self.replicas} of {list(self.checkpoints)}, expected 1 or more of some")


def build(args: dict[str, Any]) -> Any:
    """What Ray Serve runs: `import_path: raphael.serve.replicas:build`. Raises ConfigError."""
    from ray import serve

    asked = load(Replicas, args, "cluster/serve.yaml", "args")
    resources = {"num_cpus": asked.cpus, "num_gpus": asked.gpus}
    painter = serve.deployment(Painter).options(
        name="painter",
        num_replicas=asked.replicas,
        max_ongoing_requests=2,  # one draws, one waits at its side
        ray_actor_options=resources,
        health_check_period_s=2,
    )
    # every request of a client is one of the front's: a limit here would hold back those that only ask how far a job is
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(painter.bind(asked), asked)


class Painter:
    """A replica: the models in memory, one thread that uses them."""

    def __init__(self, asked: Replicas):
        wait_passively()
        self.models = open_models(asked.checkpoints, devices.resolve(asked.device), asked.precision)
        warm(self.models)
        self.perform = local_perform(self.models)
        self.busy = threading.Lock()

    def infos(self) -> list[ModelInfo]:
        return [served.info for served in self.models.values()]

    async def work(self, task: Task) -> AsyncIterator[tuple[str, Any]]:
        """What `Watch` is told, as it comes, then ("done", answer) or ("problem", what a Problem tells)."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue()

        def tell(*said: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the replica ends
                loop.call_soon_threadsafe(told.put_nowait, said)

        watch = _Telling(tell, task.watched)
        thread = threading.Thread(target=self._work, args=(task, watch), name="work", daemon=True)
        thread.start()
        try:
            while True:
                said = await told.get()
                yield said
                if said[0] in (DONE, PROBLEM):
                    return
        finally:  # also when the caller has gone: the network is not asked again
            watch.stop.set()

    def _work(self, task: Task, watch: _Telling) -> None:
        with self.busy:
            try:
                watch.evaluation()
                watch.tell(DONE, self.perform(task, watch))
            except Stopped:
                watch.tell(PROBLEM, Problem(409, "the job was cancelled").told())
            except Problem as problem:
                watch.tell(PROBLEM, problem.told())
            except Exception:
                log.exception("a task of %s failed", task.kind)
                watch.tell(PROBLEM, Problem(500, "an error of the server; its log has more").told())


class Front:
    """The application with its queue; tasks are done by a handle of `Painter`."""

    async def __init__(self, painter: Any, asked: Replicas):
        # as `raphael serve` does: who is reached from elsewhere asks for a token
        token = read_token(None)
        if asked.names and token is None:
            raise StageError("names: got some without a token, expected RAPHAEL_SERVE_TOKEN where the front runs")
        self.catalogue = Catalogue(tuple(await painter.infos.remote()))
        hosts = (*own_names(asked.port), *asked.names)
        limits = Limits(asked.queue, asked.seconds)
        # two for each replica: while one draws, the next is at its side
        self.settings = Settings(hosts, token, limits, workers=2 * asked.replicas)
        self.perform = remote_perform(painter)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.catalogue, self.perform, self.settings)


def remote_perform(painter: Any) -> Callable[[Task, Watch], dict[str, Any]]:
    """Tasks by a handle of Painter, again by another replica where one is lost. Blocks the thread that calls it."""

    def perform(task: Task, watch: Watch) -> dict[str, Any]:
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return asyncio.run(_follow(painter, task, watch))
            except (RayTaskError, TaskCancelledError):
                raise
            except RayError as error:  # of actors and nodes that are gone
                log.warning("a replica was lost (%s); attempt %d of a task", type(error).__name__, attempt)
                watch.evaluation()
                time.sleep(PAUSE_S)
        raise Problem(503, f"replicas were lost {ATTEMPTS} times under this job; try again", retry_s=10)

    return perform


async def _follow(painter: Any, task: Task, watch: Watch) -> dict[str, Any]:
    """Tells the watch what the replica says; -> its answer. Raises Problem, what the watch raises, and Ray's errors."""
    response = painter.options(stream=True).work.remote(task)
    try:
        while True:
            waiting = asyncio.ensure_future(anext(response))
            while not (await asyncio.wait({waiting}, timeout=LOOK_S))[0]:
                watch.evaluation()
            name, *said = waiting.result()
            if name == DONE:
                return said[0]
            if name == PROBLEM:
                raise Problem.again(said[0])
            if name == STEP:
                done, sigma, previews = said
                watch.step(done, sigma, lambda previews=previews: previews)
            else:
                watch.evaluation()
    finally:
        response.cancel()


class _Telling:
    """A replica's Watch: what it is told goes back as it comes."""

    def __init__(self, tell: Callable[..., None], watched: bool):
        self.tell, self.watched, self.stop = tell, watched, threading.Event()

    def evaluation(self) -> None:
        if self.stop.is_set():
            raise Stopped
        self.tell(EVALUATION)

    def step(self, done: int, sigma: float | None, previews: Callable[[], list[str]]) -> None:
        self.tell(STEP, done, sigma, previews() if self.watched else [])
