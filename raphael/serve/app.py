"""The application: what is asked over HTTP, turned into jobs.

`create_app` wants a catalogue and a function that performs tasks; whether that is a thread beside it (server.py) or
replicas elsewhere (replicas.py) makes no difference here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from raphael.edit.paint import COLOURS
from raphael.serve.bodies import (
    MAX_IMAGES,
    MAX_STEPS,
    PROMPT_CHARS,
    ImagesBody,
    InsideBody,
    OpenAiBody,
    SamplingBody,
)
from raphael.serve.door.access import Access
from raphael.serve.door.intake import Bounds, Intake
from raphael.serve.door.metrics import TEXT, Counting, Metrics
from raphael.serve.door.problems import Problem, add_handlers
from raphael.serve.edits import KINDS
from raphael.serve.info import Catalogue, ModelInfo
from raphael.serve.jobs import CANCELLED, DONE, ENDED, FAILED, QUEUED, Job, Jobs, Limits, Perform
from raphael.serve.work import EDIT, IMAGES, INSIDE, Task

PAGE = Path(__file__).with_name("page")
DOCS = Path(__file__).with_name("docs")
BEAT_S = 15.0  # between words to a watcher, so that a connection that is gone is noticed
PNG = "image/png"
Wait = Annotated[bool, Query(description="false: answer 202 with a job at once")]


@dataclass(frozen=True)
class Settings:
    """hosts: HOST:PORT by which the server may be asked. workers: tasks performed at one time."""

    hosts: tuple[str, ...]
    token: str | None = None
    limits: Limits = Limits()
    bounds: Bounds = Bounds()
    workers: int = 1


class Server:
    """What the routes share."""

    def __init__(self, catalogue: Catalogue, perform: Perform, settings: Settings):
        self.catalogue, self.settings, self.metrics = catalogue, settings, Metrics()
        self.jobs = Jobs(perform, settings.limits, self.metrics, settings.workers)
        self.decoding = CapacityLimiter(1)  # of uploads: one at a time, so that memory is bounded

    def submit(self, kind: str, body: SamplingBody, wait: bool, images: dict[str, Any] | None = None) -> Job:
        """A checked body as a job; without a seed it gets one. Raises Problem."""
        info = self.catalogue.find(body.model)
        info.check(body)
        seed = secrets.randbelow(2**32) if body.seed is None else body.seed
        body = body.model_copy(update={"model": info.id, "seed": seed})
        task = Task(kind, info.id, body, images or {}, watched=not wait)
        return self.jobs.submit(task, task.steps(info.sampling(body)))

    async def answer(self, request: Request, job: Job, wait: bool) -> Response:
        """The job's result, or where to ask for it. A client that goes away takes its job with it."""
        if not wait:
            told = json.loads(job.told(with_result=False))
            headers = {"Location": f"/v1/jobs/{job.id}"}
            return JSONResponse({name: told[name] for name in ("id", "state", "position")}, 202, headers)
        await self.ended(request, job)
        if PNG in request.headers.get("accept", "") and job.task.kind == IMAGES:
            headers = {"Raphael-Seed": str(job.task.body.seed), **warned(job)}
            return Response(first_png(job), media_type=PNG, headers=headers)
        return Response(job.result, media_type="application/json")

    async def ended(self, request: Request, job: Job) -> None:
        """Returns when the job is done. Raises Problem where it failed or was cancelled."""
        waiting = [asyncio.create_task(job.ended()), asyncio.create_task(_gone(request))]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            if job.state not in ENDED:
                self.jobs.cancel(job)
        if job.state == FAILED:
            raise job.error or Problem(500, "the job failed")
        if job.state != DONE:
            raise Problem(409, "the job was cancelled")

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """Server-sent events: the present state, then each that follows; a slow reader gets the newest alone."""
        job.watchers += 1
        try:
            while True:
                changed = job.changed
                yield _event(job)
                if job.state in ENDED:
                    return
                while True:
                    try:
                        await asyncio.wait_for(changed.wait(), BEAT_S)
                        break
                    except TimeoutError:
                        yield b": still here\n\n"
        finally:
            job.watchers -= 1


def create_app(catalogue: Catalogue, perform: Perform, settings: Settings) -> Any:
    """An ASGI application. perform: called in threads, as many as `settings.workers`."""
    server = Server(catalogue, perform, settings)

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        server.jobs.start()
        yield
        server.jobs.close()

    api = FastAPI(title="RAPHAEL", version="1", docs_url=None, redoc_url=None, lifespan=living)
    api.state.server = server
    add_handlers(api)
    _add_work(api, server)
    _add_edits(api, server)
    _add_jobs(api, server)
    _add_facts(api, server)
    _add_pages(api)
    guarded = Access(Intake(api, ("/v1/edits/",), settings.bounds), settings.hosts, settings.token)
    return Counting(guarded, server.metrics)


def _add_work(api: FastAPI, server: Server) -> None:
    responses = {200: {"content": {PNG: {}}, "description": "JSON, or the first image for `Accept: image/png`"}}

    @api.post("/v1/images", responses=responses, summary="Generate images")
    async def images(request: Request, body: ImagesBody, wait: Wait = True) -> Response:
        return await server.answer(request, server.submit(IMAGES, body, wait), wait)

    @api.post("/v1/inside", summary="Generate an image and tell what the network did while it drew it")
    async def inside(request: Request, body: InsideBody, wait: Wait = True) -> Response:
        if not server.catalogue.find(body.model).inside:
            raise Problem(422, "model: this one has no maps to show", "model")
        return await server.answer(request, server.submit(INSIDE, body, wait), wait)

    @api.post("/v1/images/generations", summary="Generate images, in OpenAI's shape")
    async def generations(request: Request, response: Response, body: OpenAiBody) -> dict[str, Any]:
        job = server.submit(IMAGES, body.images_body(), wait=True)
        await server.ended(request, job)
        made = json.loads(job.result or "null")["images"]
        response.headers.update(warned(job))
        return {"created": int(time.time()), "data": [{"b64_json": image["b64_png"]} for image in made]}


def _add_edits(api: FastAPI, server: Server) -> None:
    for name in KINDS:
        summary = f"Edit: {name}"
        api.post(f"/v1/edits/{name}", name=f"edit_{name}", summary=summary)(_edit_route(server, name))


def _edit_route(server: Server, name: str) -> Callable[..., Any]:
    kind = KINDS[name]

    async def edit(request: Request, body: SamplingBody, wait: bool = True) -> Response:
        info: ModelInfo = server.catalogue.find(body.model)
        if name not in info.edits:
            raise Problem(422, f"model: this one reads no words, which {name} needs", "model", list(info.edits))
        info.check(body)
        images = await to_thread.run_sync(kind.read, info, body, limiter=server.decoding)
        job = server.submit(EDIT + name, _without_uploads(body), wait, images)
        return await server.answer(request, job, wait)

    # what FastAPI reads the body by: one function, a body for each kind
    edit.__annotations__ = {"request": Request, "body": kind.body, "wait": Wait, "return": Response}
    return edit


def _add_jobs(api: FastAPI, server: Server) -> None:
    @api.get("/v1/jobs/{job_id}", summary="State, progress and result of a job")
    async def job(job_id: str) -> Response:
        return Response(server.jobs.find(job_id).told(), media_type="application/json")

    @api.get("/v1/jobs/{job_id}/events", summary="The same as server-sent events, with previews of each step")
    async def events(job_id: str) -> Response:
        found = server.jobs.find(job_id)
        if found.watchers >= server.settings.limits.watchers:
            raise Problem(429, "too many watch this job", retry_s=5)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(server.events(found), media_type="text/event-stream", headers=headers)

    @api.delete("/v1/jobs/{job_id}", status_code=202, summary="Cancel a job")
    async def cancel(job_id: str) -> Response:
        found = server.jobs.find(job_id)
        if found.state not in ENDED:
            server.jobs.cancel(found)
        return Response(found.told(with_result=False), 202, media_type="application/json")


def _add_facts(api: FastAPI, server: Server) -> None:
    @api.get("/v1/models", summary="The models here, and the limits")
    async def models() -> dict[str, Any]:
        told = [info.told(server.catalogue.default) for info in server.catalogue.infos]
        limits = {"steps": MAX_STEPS, "n": MAX_IMAGES, "prompt_chars": PROMPT_CHARS}
        sizes = {"size_px": max(info.max_px for info in server.catalogue.infos)}
        own = {"queue": server.settings.limits.waiting, "job_s": server.settings.limits.seconds}
        body = {"body_bytes": server.settings.bounds.body_bytes, "images_bytes": server.settings.bounds.images_bytes}
        every = {"limits": limits | sizes | own | body, "region_colours": COLOURS}
        return {"object": "list", "models": told, "data": told, **every}

    @api.get("/healthz", summary="Whether the server takes jobs")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "queue": len(server.jobs.waiting), "running": len(server.jobs.running)}

    @api.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        return Response(server.metrics.text(), headers={"Content-Type": TEXT})


def _add_pages(api: FastAPI) -> None:
    """The page at / and its files at /page; the API's own page at /docs, from files here."""
    for path, folder in (("/page", PAGE), ("/docs/start", DOCS), ("/docs/files", _swagger())):
        if folder.is_dir():
            api.mount(path, StaticFiles(directory=folder))

    @api.get("/", include_in_schema=False)
    async def index() -> Response:
        file = PAGE / "index.html"
        return (
            FileResponse(file, headers={"Cache-Control": "no-cache"}) if file.is_file() else RedirectResponse("/docs")
        )

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(DOCS / "index.html", headers={"Cache-Control": "no-cache"})


def _swagger() -> Path:
    """Swagger's files, as they are installed."""
    found = importlib.util.find_spec("fastapi_offline")
    return Path(found.submodule_search_locations[0], "static") if found else Path("absent")


def first_png(job: Job) -> bytes:
    return base64.b64decode(json.loads(job.result or "null")["images"][0]["b64_png"])


def warned(job: Job) -> dict[str, str]:
    """The header of answers whose body has no place for warnings: their list as JSON, in ASCII."""
    texts = json.loads(job.result or "null").get("warnings")
    return {"Raphael-Warnings": json.dumps(texts)} if texts else {}


def _without_uploads(body: SamplingBody) -> SamplingBody:
    """What was decoded is kept as pixels, once."""
    gone = {name: "" for name in ("image", "mask") if getattr(body, name, None)}
    if regions := getattr(body, "regions", None):
        gone["regions"] = [region.model_copy(update={"mask": ""}) for region in regions]
    return body.model_copy(update=gone)


def _event(job: Job) -> bytes:
    name = {QUEUED: QUEUED, DONE: DONE, FAILED: FAILED, CANCELLED: CANCELLED}.get(job.state, "step")
    return f"event: {name}\ndata: {job.told(with_previews=True)}\n\n".encode()


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection. Its body was read whole before (door/intake.py)."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
