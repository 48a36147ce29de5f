"""The door of `raphael serve`: names, pages, token; and the headers that tell a browser what the page may do.

No cookie is set or read, and no CORS header sent: a page of another origin gets nothing, whatever it sends along.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from raphael.base.stage import StageError
from raphael.base.web.door import MISDIRECTED, REFUSED, UNAUTHORIZED, Door, header
from raphael.serve.door.problems import Problem, send_problem

App = Callable[[dict, Callable, Callable], Awaitable[None]]  # ASGI
TOKEN = "RAPHAEL_SERVE_TOKEN"
MIN_TOKEN = 16  # characters
ASKS = ("/v1/", "/metrics")  # what the token is asked for; the page, its documentation and /healthz hold no secret
CSP = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
ALWAYS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
WORDS = {
    MISDIRECTED: "this server is not known by that name; open the address that it printed, or start it with --name",
    REFUSED: "refused: the request comes from another page",
    UNAUTHORIZED: "a token is asked for: Authorization: Bearer TOKEN",
}


class Access:
    """An ASGI application in front of another. hosts: HOST:PORT by which it may be asked; token: None asks for none."""

    def __init__(self, app: App, hosts: Iterable[str], token: str | None = None):
        self.app, self.door = app, Door(hosts, ("http", "https"))  # https: behind a proxy that ends TLS
        self.token = token.encode() if token else None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *ALWAYS]}
            await send(message)

        if status := self.refusal(scope):
            await send_problem(send_with_headers, Problem(status, WORDS[status]))
        else:
            await self.app(scope, receive, send_with_headers)

    def refusal(self, scope: dict) -> int | None:
        """The HTTP status by which a request is refused, or None."""
        if status := self.door.refusal(scope):
            return status
        if self.token and scope["path"].startswith(ASKS) and not self._knows_token(scope):
            return UNAUTHORIZED
        return None

    def _knows_token(self, scope: dict) -> bool:
        given = header(scope, b"authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self.token or b"")


def read_token(file: Path | None) -> str | None:
    """The token: of a file, made with 256 random bits where it is not there, else of RAPHAEL_SERVE_TOKEN; or None.

    A command line is no place for one: every user of a machine reads it. Raises StageError for one that can be guessed
    and a file that others can read.
    """
    if file is None:
        return _long_enough(os.environ.get(TOKEN), TOKEN) if os.environ.get(TOKEN) else None
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(f"{secrets.token_urlsafe(32)}\n")
    if file.stat().st_mode & 0o077:
        raise StageError(f"--token: {file} can be read by others, expected a file of yours alone: chmod 600 {file}")
    return _long_enough(file.read_text(encoding="utf-8").strip(), str(file))


def _long_enough(token: str | None, where: str) -> str:
    if not token or len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise StageError(f"{where}: got a token that can be guessed, expected {MIN_TOKEN} letters and digits or more")
    return token
