"""What Prometheus is told at /metrics: requests, the queue, seconds by part. One registry an application."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

App = Callable[[dict, Callable, Callable], Awaitable[None]]  # ASGI
TEXT = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "raphael_requests", "answers, by route and status", ["route", "status"], registry=registry
        )
        self.answer_s = Histogram(
            "raphael_request_seconds", "from request to answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.jobs = Counter("raphael_jobs", "jobs that ended, by kind and state", ["kind", "state"], registry=registry)
        self.images = Counter("raphael_images", "images generated", ["model"], registry=registry)
        self.part_s = Histogram(
            "raphael_job_seconds", "seconds of a job by part", ["part"], buckets=SECONDS, registry=registry
        )
        self.queue = Gauge("raphael_queue_jobs", "jobs that wait", registry=registry)
        self.running = Gauge("raphael_running_jobs", "jobs that run", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counting:
    """An ASGI application in front of another, which counts its answers by route; foreign paths count as one."""

    def __init__(self, app: App, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 500

        async def seen(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # the application writes the route it found there
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.answer_s.labels(route).observe(time.perf_counter() - started_s)
