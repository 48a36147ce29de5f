"""Prefect's server and MLflow's behind one door: requests for its own names, from its own page, with its string.

    python -m flows.serve.guard prefect --port 4200
    python -m flows.serve.guard mlflow --port 5000 ...        options of `mlflow server`

Prefect knows a password and CORS, but answers to any Host (DNS rebinding), and CORS only hides answers: a request
without preflight is carried out. MLflow knows hosts and origins (by default also 10.evil.example and every port of
localhost), but no password without another database of users; and who may speak to it reads and writes any file of the
user who runs it, by experiments whose artifacts lie elsewhere.

The door's settings are in the environment: RAPHAEL_GUARD_HOSTS (HOST:PORT, by commas), RAPHAEL_GUARD_AUTH (MLflow's
user:password). A server without a password does not start.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import os
from collections.abc import Awaitable, Callable, Iterable

from raphael.base.stage import StageError, one_clear_line
from raphael.base.web.door import MISDIRECTED, REFUSED, UNAUTHORIZED, Door, header

App = Callable[[dict, Callable, Callable], Awaitable[None]]  # ASGI
HEALTH = frozenset({"/health"})


class Guard:
    """An ASGI application in front of another.

    hosts: the names by which it may be asked, HOST:PORT; pages of these names are its own.
    auth: "user:password" for Basic authentication of everything but /health; None: the application asks by itself.
    """

    def __init__(self, app: App, hosts: Iterable[str], auth: str | None = None):
        self.app, self.door = app, Door(hosts)
        self.auth = auth.encode() if auth else None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        status = self.refusal(scope) if scope["type"] in ("http", "websocket") else None
        if status is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it was accepted: the handshake says 403
        else:
            await _answer(send, status)

    def refusal(self, scope: dict) -> int | None:
        """The HTTP status by which a request is refused, or None."""
        if status := self.door.refusal(scope):
            return status
        if self.auth and scope.get("path") not in HEALTH and not self._knows_password(scope):
            return UNAUTHORIZED
        return None

    def _knows_password(self, scope: dict) -> bool:
        for value in header(scope, b"authorization"):
            scheme, _, credentials = value.partition(" ")
            try:
                given = base64.b64decode(credentials.strip(), validate=True)
            except (binascii.Error, ValueError):
                return False
            if scheme.lower() == "basic" and hmac.compare_digest(given, self.auth or b""):
                return True
        return False


async def _answer(send: Callable, status: int) -> None:
    words = {
        MISDIRECTED: "this server is not known by that name: open the address that make up printed",
        REFUSED: "refused: the request comes from another page",
        UNAUTHORIZED: "user and password: the line in .run/login",
    }[status]
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    if status == UNAUTHORIZED:
        headers.append((b"www-authenticate", b'Basic realm="raphael", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{words}\n".encode()})


def prefect_app() -> Guard:
    """Prefect's API and page. Raises StageError where no auth string is set: it would run commands for anyone."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    auth = get_current_settings().server.api.auth_string
    if auth is None or not auth.get_secret_value():
        raise StageError(
            "got no PREFECT_SERVER_API_AUTH_STRING; without one anybody who reaches the server runs commands"
        )
    return Guard(create_app(final=True), _hosts())


def mlflow_app() -> Guard:
    """MLflow's API and page, in the process that `mlflow server` starts."""
    from mlflow.server.fastapi_app import app

    if not (auth := os.environ.get("RAPHAEL_GUARD_AUTH")):
        raise StageError("got no RAPHAEL_GUARD_AUTH; without one anybody who reaches MLflow reads and writes our files")
    return Guard(app, _hosts(), auth)


def serve_prefect(host: str, port: int) -> None:
    """What `prefect server start` does, with the door in front."""
    import uvicorn
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    uvicorn.run(
        prefect_app(),
        host=host,
        port=port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )


def serve_mlflow(options: list[str]) -> None:
    """`mlflow server`, whose application is ours.

    MLflow looks for applications among the entry points of installed packages, and we run from a folder; where a later
    MLflow looks in another way, it finds none of our name and does not start.
    """
    from importlib.metadata import EntryPoint

    from mlflow.utils import plugins

    installed = plugins.get_entry_points
    ours = EntryPoint("raphael", f"flows.serve.guard:{mlflow_app.__name__}", "mlflow.app")
    plugins.get_entry_points = lambda group: [ours] if group == ours.group else installed(group)
    from mlflow.cli import server

    server.main([*options, "--app-name", ours.name], prog_name="mlflow server")


def _hosts() -> list[str]:
    return os.environ.get("RAPHAEL_GUARD_HOSTS", "").split(",")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", choices=["prefect", "mlflow"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments, more = parser.parse_known_args(argv)
    with one_clear_line("guard") as outcome:
        if arguments.server == "mlflow":
            serve_mlflow(["--host", arguments.host, "--port", str(arguments.port), "--workers", "1", *more])
        else:
            serve_prefect(arguments.host, arguments.port)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
