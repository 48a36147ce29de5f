"""The same application as a Ray Serve deployment: a front with the queue, replicas that hold the models.

    serve run cluster/serve.yaml          on a running Ray

With `together` above 1 a replica samples waiting requests of equal settings as one batch: more images a second where a
batch is cheaper than its rows, as on a GPU. An image's last bits then depend on who asks beside it; a retried job's
do, too.

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
from raphael.base.strict import later, load
from raphael.base.web.door import own_names
from raphael.serve.app import Settings, create_app
from raphael.serve.door.access import read_token
from raphael.serve.door.problems import Problem
from raphael.serve.info import Catalogue, ModelInfo
from raphael.serve.jobs import Limits
from raphael.serve.models import Served, open_models
from raphael.serve.server import local_perform, warm
from raphael.serve.work import Stopped, Task, Watch, equal, perform_together

log = logging.getLogger("raphael.serve")
ATTEMPTS = 10  # of a task whose replica is lost: more often than that is no accident
MOST_TOGETHER = 50  # images, as a pipeline samples at one time
PAUSE_S = 0.5
LOOK_S = 0.25  # how often a front that waits for a replica looks whether the job is still wanted
EVALUATION, STEP, DONE, PROBLEM = "evaluation", "step", "done", "problem"


@dataclass(frozen=True)
class Replicas:
    """The `args` of cluster/serve.yaml. gpus: of each replica. names: HOST:PORT by which the proxy is asked, beside
    loopback's; with any, RAPHAEL_SERVE_TOKEN has to be set where the front runs. port: the proxy's. together: images
    that requests of equal settings may share a batch for; 1: none, and the same request gives the same bytes."""

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
    together: int = later(1)

    def __post_init__(self) -> None:
        if self.replicas < 1 or not self.checkpoints:
            raise ValueError(f"replicas: got {self.replicas} of {list(self.checkpoints)}, expected 1 or more of some")
        if not 1 <= self.together <= MOST_TOGETHER:
            raise ValueError(f"together: got {self.together}, expected 1 to {MOST_TOGETHER} images")

    @property
    def at_one_time(self) -> int:
        """Requests that a replica is given: those of the batch that it draws, and as many that wait at its side."""
        return 2 * self.together


def build(args: dict[str, Any]) -> Any:
    """What Ray Serve runs: `import_path: raphael.serve.replicas:build`. Raises ConfigError."""
    from ray import serve

    asked = load(Replicas, args, "cluster/serve.yaml", "args")
    resources = {"num_cpus": asked.cpus, "num_gpus": asked.gpus}
    painter = serve.deployment(Painter).options(
        name="painter",
        num_replicas=asked.replicas,
        max_ongoing_requests=asked.at_one_time,
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
        self.perform = Together(self.models, asked.together)

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
        try:
            watch.tell(DONE, self.perform(task, watch))
        except Stopped:
            watch.tell(PROBLEM, Problem(409, "the job was cancelled").told())
        except Problem as problem:
            watch.tell(PROBLEM, problem.told())
        except Exception:
            log.exception("a task of %s failed", task.kind)
            watch.tell(PROBLEM, Problem(500, "an error of the server; its log has more").told())


@dataclass(eq=False)
class _Waiting:
    """A task at a replica. key: what it may share a batch by; None: it is drawn alone. outcome: once it is done."""

    task: Task
    watch: Watch
    key: tuple | None
    outcome: dict[str, Any] | Exception | None = None


class Together:
    """Does tasks of many threads one after the other; with most above 1, those of equal settings that wait at the same
    time as one batch of up to so many images."""

    def __init__(self, models: dict[str, Served], most: int = 1):
        self.models, self.most = models, most
        self.alone = local_perform(models)
        self.waiting: list[_Waiting] = []
        self.turn = threading.Condition()
        self.busy = False

    def __call__(self, task: Task, watch: Watch) -> dict[str, Any]:
        """Raises Problem, Stopped, and whatever else the work raises."""
        one = _Waiting(task, watch, equal(self.models[task.model], task) if self.most > 1 else None)
        with self.turn:
            self.waiting.append(one)
            self.turn.wait_for(lambda: one.outcome is not None or not self.busy and self.waiting[0] is one)
            mates = [] if one.outcome is not None else self._mates(one)
            self.busy = self.busy or bool(mates)
        if mates:
            self._draw(mates)
        if isinstance(one.outcome, Exception):
            raise one.outcome
        assert one.outcome is not None
        return one.outcome

    def _mates(self, one: _Waiting) -> list[_Waiting]:
        """That one and who may be drawn with it, in the order in which they came; they wait no more."""
        mates, images = [one], one.task.body.n
        for other in self.waiting:
            if other is not one and one.key is not None and other.key == one.key:
                if images + other.task.body.n <= self.most:
                    mates.append(other)
                    images += other.task.body.n
        self.waiting = [other for other in self.waiting if other not in mates]
        return mates

    def _draw(self, mates: list[_Waiting]) -> None:
        outcomes: list[Any]
        try:
            if len(mates) > 1:
                served = self.models[mates[0].task.model]
                outcomes = perform_together(served, [one.task for one in mates], [one.watch for one in mates])
            else:
                mates[0].watch.evaluation()
                outcomes = [self.alone(mates[0].task, mates[0].watch)]
        except ValueError:  # of one's words, and nobody knows whose: each alone is told of its own
            outcomes = [self._by_itself(one) for one in mates]
        except Exception as error:
            outcomes = [error] * len(mates)
        with self.turn:
            for one, outcome in zip(mates, outcomes, strict=True):
                one.outcome = outcome
            self.busy = False
            self.turn.notify_all()

    def _by_itself(self, one: _Waiting) -> dict[str, Any] | Exception:
        try:
            return self.alone(one.task, one.watch)
        except Exception as error:
            return error


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
        # while a replica draws, what comes next is at its side
        self.settings = Settings(hosts, token, limits, workers=asked.at_one_time * asked.replicas)
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
    response, begun = painter.options(stream=True).work.remote(task), False
    watch.waiting()
    try:
        while True:
            waiting = asyncio.ensure_future(anext(response))
            while not (await asyncio.wait({waiting}, timeout=LOOK_S))[0]:
                watch.evaluation() if begun else watch.waiting()
            name, *said = waiting.result()
            begun = True
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

    def waiting(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def evaluation(self) -> None:
        self.waiting()
        self.tell(EVALUATION)

    def step(self, done: int, sigma: float | None, previews: Callable[[], list[str]]) -> None:
        self.tell(STEP, done, sigma, previews() if self.watched else [])
