"""The queue of a server: jobs that wait, run and have ended, each watched by whoever asks.

All of a job's state belongs to the event loop. Work runs in threads (one in a single process: a pipeline is not safe
for two) and tells the loop how far it is; what it is told is that it is not wanted any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from raphael.serve.door.metrics import Metrics
from raphael.serve.door.problems import Problem
from raphael.serve.work import IMAGES, Stopped, Task, Watch

log = logging.getLogger("raphael.serve")
Perform = Callable[[Task, Watch], dict[str, Any]]
QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
MOST_WAITS = 10  # times the limit of a job that one waits at a replica before it begins


@dataclass(frozen=True)
class Limits:
    """waiting: jobs in the queue; seconds: of one job, from its start; kept, kept_s, kept_bytes: ended jobs that are
    remembered, how many, how long and how much of results; watchers: of one job at a time."""

    waiting: int = 32
    seconds: float = 120.0
    kept: int = 64
    kept_s: float = 600.0
    kept_bytes: int = 64 << 20
    watchers: int = 16


@dataclass(eq=False)
class Job:
    """One task. changed: set, and exchanged for a new one, whenever anything of this changes."""

    id: str
    task: Task
    steps: int
    state: str = QUEUED
    position: int = 0
    step: int = 0
    sigma: float | None = None
    previews: list[str] = field(default_factory=list)
    result: str | None = None  # JSON: written once, in the thread that made it
    error: Problem | None = None
    watchers: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    queued_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    ended_s: float = 0.0

    def touch(self) -> None:
        before, self.changed = self.changed, asyncio.Event()
        before.set()

    def told(self, with_result: bool = True, with_previews: bool = False) -> str:
        """JSON."""
        share = 1.0 if self.state == DONE else min(1.0, self.step / max(1, self.steps))
        facts = {
            "id": self.id,
            "kind": self.task.kind,
            "state": self.state,
            "position": self.position if self.state == QUEUED else None,
            "step": self.step,
            "steps": self.steps,
            "progress": round(share, 4),
            "error": None if self.error is None else self.error.told(),
        }
        if with_previews:
            facts |= {"sigma": self.sigma, "previews": self.previews}
        result = self.result if with_result and self.result is not None else "null"
        return f'{json.dumps(facts)[:-1]}, "result": {result}}}'

    async def ended(self) -> None:
        while self.state not in ENDED:
            await self.changed.wait()


class Jobs:
    """perform: does a task, in a thread. workers: how many at one time."""

    def __init__(self, perform: Perform, limits: Limits, metrics: Metrics, workers: int = 1):
        self.perform, self.limits, self.metrics, self.workers = perform, limits, metrics, workers
        self.waiting: deque[Job] = deque()
        self.running: set[Job] = set()
        self.known: OrderedDict[str, Job] = OrderedDict()  # by id, ended ones in the order of their ends
        self.closed = False
        self.mean_s = 1.0  # of a job, recent ones count more: what Retry-After is told by
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="work")
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task] = []

    def start(self) -> None:
        """In the event loop."""
        self._tasks = [asyncio.create_task(self._serve()) for _ in range(self.workers)]

    def submit(self, task: Task, steps: int) -> Job:
        """Raises Problem where the queue is full or the server is stopping."""
        if self.closed:
            raise Problem(503, "the server is stopping")
        if len(self.waiting) >= self.limits.waiting:
            retry_s = max(1, round(self.mean_s * len(self.waiting) / self.workers))
            raise Problem(429, f"{len(self.waiting)} jobs wait, which is the limit; try again", retry_s=retry_s)
        self._forget()
        job = Job(secrets.token_urlsafe(12), task, steps, position=len(self.waiting))
        self.known[job.id] = job
        self.waiting.append(job)
        self.metrics.queue.set(len(self.waiting))
        self._arrived.set()
        return job

    def find(self, name: str) -> Job:
        """Raises Problem for one that never was or is forgotten."""
        self._forget()
        if name not in self.known:
            raise Problem(404, "no such job; ended ones are forgotten after a while")
        return self.known[name]

    def cancel(self, job: Job) -> None:
        """One that waits never runs; one that runs ends before the network's next evaluation."""
        job.stop.set()
        if job in self.waiting:
            self.waiting.remove(job)
            self._end(job, CANCELLED)
            self._moved()

    def close(self) -> None:
        """No job is taken any more, those that wait fail, those that run end soon."""
        self.closed = True
        stopping = Problem(503, "the server is stopping")
        while self.waiting:
            self._end(self.waiting.popleft(), FAILED, error=stopping)
        for job in list(self.running):
            job.stop.set()
            self._end(job, FAILED, error=stopping)
        for task in self._tasks:
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _serve(self) -> None:
        while True:
            while not self.waiting:
                self._arrived.clear()
                await self._arrived.wait()
            job = self.waiting.popleft()
            self._moved()
            await self._run(job)

    async def _run(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        job.state, job.started_s = RUNNING, time.monotonic()
        self.running.add(job)
        self.metrics.running.set(len(self.running))
        job.touch()
        try:
            result = await loop.run_in_executor(
                self._pool, self._perform, job, JobWatch(job, loop, self.limits.seconds)
            )
            self._end(job, DONE, result)
        except Stopped:
            self._end(job, CANCELLED)
        except Problem as problem:
            self._end(job, FAILED, error=problem)
        except Exception:
            log.exception("job %s (%s) failed", job.id, job.task.kind)
            self._end(job, FAILED, error=Problem(500, "an error of the server; its log has more"))
        finally:
            self.running.discard(job)
            self.metrics.running.set(len(self.running))

    def _perform(self, job: Job, watch: JobWatch) -> str:
        """In a thread. -> JSON."""
        watch.evaluation()
        answer = {"id": job.id, **self.perform(job.task, watch)}
        answer["seconds"] = {"queue": round(job.started_s - job.queued_s, 4), **answer["seconds"]}
        for part, seconds in answer["seconds"].items():
            self.metrics.part_s.labels(part).observe(seconds)
        if job.task.kind == IMAGES:
            self.metrics.images.labels(job.task.model).inc(len(answer["images"]))
        return json.dumps(answer)

    def _end(self, job: Job, state: str, result: str | None = None, error: Problem | None = None) -> None:
        if job.state in ENDED:  # closed while it ran
            return
        if error is not None:  # its frames hold what the job worked on, and would as long as the job is remembered
            error.__traceback__ = error.__context__ = error.__cause__ = None
        job.state, job.result, job.error, job.ended_s = state, result, error, time.monotonic()
        job.previews, job.task = [], replace(job.task, images={})
        if state == DONE:
            job.step = job.steps
            self.mean_s += 0.2 * (job.ended_s - job.started_s - self.mean_s)
        self.known.move_to_end(job.id)
        self.metrics.jobs.labels(job.task.kind, state).inc()
        job.touch()

    def _moved(self) -> None:
        self.metrics.queue.set(len(self.waiting))
        for position, job in enumerate(self.waiting):
            job.position = position
            job.touch()

    def _forget(self) -> None:
        """Ended jobs beyond the limits, the oldest first."""
        ended = [job for job in self.known.values() if job.state in ENDED]
        size, now_s = sum(len(job.result or "") for job in ended), time.monotonic()
        for place, job in enumerate(ended):
            many = len(ended) - place >= self.limits.kept or size > self.limits.kept_bytes
            if many or now_s - job.ended_s > self.limits.kept_s:
                size -= len(job.result or "")
                del self.known[job.id]


@dataclass
class JobWatch:
    """What a job's thread tells the loop, and where it learns that it shall end."""

    job: Job
    loop: asyncio.AbstractEventLoop
    seconds: float
    begun_s: float | None = None  # None: it waits at a replica for others' jobs

    def waiting(self) -> None:
        self.begun_s = None
        if self.job.stop.is_set():
            raise Stopped
        if time.monotonic() - self.job.started_s > MOST_WAITS * self.seconds:
            raise Problem(504, f"the job waited {MOST_WAITS * self.seconds:g} s for a replica; try again", retry_s=10)

    def evaluation(self) -> None:
        if self.job.stop.is_set():
            raise Stopped
        if self.begun_s is None:
            self.begun_s = time.monotonic()
        if time.monotonic() - self.begun_s > self.seconds:
            advice = "ask for fewer steps, a smaller size or fewer images"
            raise Problem(504, f"the job took longer than {self.seconds:g} s, the limit of one; {advice}")

    def step(self, done: int, sigma: float | None, previews: Callable[[], list[str]]) -> None:
        self.evaluation()
        if not self.job.watchers:  # waking the loop's thread costs this one its turn: once a step, 15 times an image
            self._told(done, sigma, [])
            return
        shown = previews()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
            self.loop.call_soon_threadsafe(self._stepped, done, sigma, shown)

    def _stepped(self, done: int, sigma: float | None, shown: list[str]) -> None:
        if self.job.state == RUNNING:
            self._told(done, sigma, shown)
            self.job.touch()

    def _told(self, done: int, sigma: float | None, shown: list[str]) -> None:
        self.job.step, self.job.previews = min(done, self.job.steps), shown
        # at infinite sigma, where some schedules begin, JSON has no number
        self.job.sigma = sigma if sigma is not None and sigma < float("inf") else None
