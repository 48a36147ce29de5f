"""Errors as RFC 9457 has them: application/problem+json of type, title, status, detail; also field and allowed."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

TYPE = "application/problem+json"
SHOWN = 80  # characters of a wrong value that an answer repeats


class Problem(Exception):  # noqa: N818  RFC 9457's word
    """field: of the body, which is wrong; allowed: what it may be; retry_s: after which asking again makes sense."""

    def __init__(
        self, status: int, detail: str, field: str | None = None, allowed: Any = None, retry_s: int | None = None
    ):
        super().__init__(detail)
        self.status, self.detail, self.field, self.allowed, self.retry_s = status, detail, field, allowed, retry_s

    def told(self) -> dict[str, Any]:
        """The body of the answer."""
        more = {"field": self.field, "allowed": self.allowed}
        told = {"type": "about:blank", "title": title_of(self.status), "status": self.status, "detail": self.detail}
        return told | {name: value for name, value in more.items() if value is not None}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}

    @classmethod
    def again(cls, told: Mapping[str, Any]) -> Problem:
        """Of what `told` said, in another process."""
        return cls(told["status"], told["detail"], told.get("field"), told.get("allowed"))


def of_value_error(error: Exception, fields: Mapping[str, Any]) -> Problem:
    """What a pipeline refuses: its messages begin with the argument that is wrong, where that is one field."""
    text = " ".join(str(error).split())
    name = text.partition(":")[0]
    return Problem(422, text, name if name in fields else None)


def title_of(status: int) -> str:
    return HTTPStatus(status).phrase


async def send_problem(send: Callable, problem: Problem) -> None:
    """As an ASGI answer, for what stands before the application; the connection ends with it."""
    body = json.dumps(problem.told()).encode()
    headers = {"content-type": TYPE, "content-length": str(len(body)), "connection": "close", **problem.headers()}
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = 'Bearer realm="raphael"'
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def add_handlers(app: FastAPI) -> None:
    """Every error of the application becomes a problem; one of ours keeps its traceback for the log alone."""
    ours = Problem(500, "an error of the server; its log has more")
    makers: dict[type[Exception], Callable[[Request, Any], Problem]] = {
        Problem: lambda request, error: error,
        RequestValidationError: lambda request, error: _of_validation(error),
        HTTPException: _of_http,
        Exception: lambda request, error: ours,
    }
    for kind, make in makers.items():
        app.add_exception_handler(kind, _handler(make))


def _handler(make: Callable[[Request, Any], Problem]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        problem = make(request, error)
        return JSONResponse(problem.told(), problem.status, problem.headers(), TYPE)

    return answer


def _of_http(request: Request, error: HTTPException) -> Problem:
    detail = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"no such address; /docs lists what there is ({request.method} {request.url.path[:SHOWN]})"
    return Problem(error.status_code, detail)


def _of_validation(error: RequestValidationError) -> Problem:
    """The first that is wrong: its path in the body, pydantic's words, and what was got."""
    first = error.errors()[0]
    kind, place = first["type"], [str(part) for part in first["loc"][1:]]
    if kind == "json_invalid" or not place:
        return Problem(400, f"the body is no JSON object: {first['msg'].lower()}")
    # a name can be any text of the sender's, also one that UTF-8 cannot write
    field = ".".join(place).encode("utf-8", "replace").decode()[:SHOWN]
    if kind == "extra_forbidden":
        return Problem(422, f"{field}: no such field; /docs lists what there is", field)
    got = "" if kind == "missing" else f"; got {_short(first.get('input'))}"
    return Problem(422, f"{field}: {first['msg'].lower()}{got}", field, first.get("ctx", {}).get("expected"))


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
