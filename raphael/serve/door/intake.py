"""How much a request may send, and how long it may take: bounds on bodies before anything of them is parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from raphael.base.web.door import header
from raphael.serve.door.problems import Problem, send_problem

App = Callable[[dict, Callable, Callable], Awaitable[None]]  # ASGI


@dataclass(frozen=True)
class Bounds:
    """body_bytes: of a request without images; images_bytes: of one with (base64); all_bytes: of all that are arriving
    at one time; seconds: in which a body has to be there."""

    body_bytes: int = 64 << 10
    images_bytes: int = 16 << 20
    all_bytes: int = 64 << 20
    seconds: float = 20.0


class Intake:
    """An ASGI application in front of another, which gets whole bodies only.

    with_images: beginnings of the addresses that take images.
    """

    def __init__(self, app: App, with_images: tuple[str, ...], bounds: Bounds = Bounds()):  # noqa: B008
        self.app, self.with_images, self.bounds = app, with_images, bounds
        self.arriving = 0  # bytes of bodies that are read and not yet answered

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kept = _Kept(self)
        try:
            async with asyncio.timeout(self.bounds.seconds):
                body = await self._read(scope, receive, kept)
        except TimeoutError:
            await send_problem(send, Problem(408, f"the body was not there after {self.bounds.seconds:g} s"))
            return
        except Problem as problem:
            await send_problem(send, problem)
            return
        else:
            if body is not None:
                await self.app(scope, _replayed(body, receive), send)
        finally:
            kept.release()

    async def _read(self, scope: dict, receive: Callable, kept: _Kept) -> bytes | None:
        """The whole body; None where the client has gone. Raises Problem."""
        if scope["method"] in ("GET", "HEAD", "DELETE"):
            limit = 0
        else:
            limit = self.bounds.images_bytes if scope["path"].startswith(self.with_images) else self.bounds.body_bytes
        for said in header(scope, b"content-length"):
            if not said.isdecimal() or int(said[:20]) > limit:
                raise _too_long(limit)
        parts, length, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            length += len(part)
            if length > limit:
                raise _too_long(limit)
            kept.add(len(part))
            parts.append(part)
        body = b"".join(parts)
        if limit and body and not _is_json(scope):
            raise Problem(415, "the body is no JSON, expected Content-Type: application/json")
        return body


class _Kept:
    """What one request holds of the bytes that all may hold."""

    def __init__(self, intake: Intake):
        self.intake, self.bytes = intake, 0

    def add(self, count: int) -> None:
        if self.intake.arriving + count > self.intake.bounds.all_bytes:
            raise Problem(503, "too much is being sent at one time; try again", retry_s=2)
        self.bytes += count
        self.intake.arriving += count

    def release(self) -> None:
        self.intake.arriving -= self.bytes


def _too_long(limit: int) -> Problem:
    """Made where it is raised: kept in a variable it would hold its frame, and the frame the body's parts, until the
    garbage collector comes by, long after they were counted as given back."""
    return Problem(413, f"the body is too long, expected at most {limit:,} bytes", allowed=limit)


def _is_json(scope: dict) -> bool:
    """A form of another page cannot say this without asking first (CORS' preflight), which is never answered."""
    return [value.partition(";")[0].strip().lower() for value in header(scope, b"content-type")] == ["application/json"]


def _replayed(body: bytes, receive: Callable) -> Callable:
    """A `receive` that hands the body over at once, then waits as the server's own does."""
    handed = False

    async def again() -> dict:
        nonlocal handed
        if handed:
            return await receive()
        handed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
