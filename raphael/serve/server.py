"""One process that serves: models in memory, one thread that draws, uvicorn in front."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from raphael.base.stage import StageError
from raphael.base.web.door import own_names
from raphael.serve.app import Settings, create_app
from raphael.serve.info import Catalogue
from raphael.serve.jobs import Limits
from raphael.serve.work import IMAGES, Task, perform

if TYPE_CHECKING:
    from raphael.serve.models import Served

CONNECTIONS = 400  # at one time; more are told 503
HEAD_S = 10.0  # for a request's first line and headers
LEAVE_S = 2.0  # for a thread that draws to come to the network's next evaluation
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class PatientProtocol(H11Protocol):
    """uvicorn's, with a bound on how long the head of a request may take: connections that say nothing, or a byte a
    second, are closed."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # a request has begun, or was answered and the next one waits
            self._forget_head()
        elif self._head is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # pipelined: the next head has begun
            self._await_head()

    def _await_head(self) -> None:
        self._forget_head()
        self._head = self.loop.call_later(HEAD_S, self.transport.close)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class OneSignal(uvicorn.Server):
    """Ends at the first SIGTERM or Ctrl-C: streams are closed, jobs fail, nothing is waited for."""

    def __init__(self, config: uvicorn.Config, line: str):
        """line: printed when requests are taken."""
        super().__init__(config)
        self.line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.line, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.shutdown()  # jobs end, and with them whoever waits for one; uvicorn would wait first
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.should_exit = True  # uvicorn would raise the signal again once all is done


@dataclass(frozen=True)
class Unwatched:
    """A Watch that nobody looks through."""

    def waiting(self) -> None:
        return

    def evaluation(self) -> None:
        return

    def step(self, done: int, sigma: float | None, previews: Any) -> None:
        return


def local_perform(models: dict[str, Served]) -> Any:
    """What does tasks with models of this process; not safe for two threads."""
    return lambda task, watch: perform(models[task.model], task, watch)


def warm(models: dict[str, Served]) -> None:
    """One image of each model in memory in one step: the first use of a network costs more than those that follow."""
    from raphael.serve.bodies import ImagesBody

    for name, served in models.items():
        if not served.here:
            continue
        body = ImagesBody(prompt="", seed=0, num_inference_steps=1)
        perform(served, Task(IMAGES, name, body), Unwatched())


@dataclass(frozen=True)
class Address:
    """Where a server listens and by which names it may be asked. Raises StageError for an open door without a token."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and self.token is None:
            raise StageError(
                f"--host: got {self.host}, which other machines reach, without a token; expected --token FILE (made "
                "where it is not there), or --host 127.0.0.1"
            )

    def bind(self) -> socket.socket:
        """Raises StageError where the port is taken."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            listener.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise StageError(f"{self.host}:{self.port}: {reason}; expected a free port, such as --port 0") from None
        return listener

    def hosts(self, port: int) -> tuple[str, ...]:
        """HOST:PORT of every name; a browser leaves out port 80."""
        own = own_names(port) + [f"[::1]:{port}"]
        if self.host not in (*LOOPBACK, "0.0.0.0", "::"):
            own.append(f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}")
        given = [name if _has_port(name) else f"{name}:{port}" for name in self.names]
        known = [*own, *given, *(name for name in self.names if not _has_port(name))]
        return tuple(known + [name.removesuffix(":80") for name in known if name.endswith(":80")])


def serve(
    models: dict[str, Served], address: Address, listener: socket.socket, limits: Limits, started_s: float
) -> None:
    """Until a signal. started_s: of time.monotonic, when the program began."""
    warm(models)
    catalogue = Catalogue(tuple(served.info for served in models.values()))
    port = listener.getsockname()[1]
    app = create_app(catalogue, local_perform(models), Settings(address.hosts(port), address.token, limits))
    named = ", ".join(models)
    url = f"http://{'127.0.0.1' if address.host in ('0.0.0.0', '127.0.0.1') else address.host}:{port}/"
    line = f"raphael serve: {url} ({named}), ready after {time.monotonic() - started_s:.1f} s; Ctrl-C ends it"
    asyncio.run(OneSignal(uvicorn_config(app), line).serve([listener]))
    _leave()


def uvicorn_config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=16 << 10,
    )


def _leave() -> None:
    """Ends the process now where the thread that draws does not come to an evaluation of the network soon."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("work")]
    deadline_s = time.monotonic() + LEAVE_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _has_port(name: str) -> bool:
    return name.rpartition(":")[2].isdecimal() and not name.endswith("]")
