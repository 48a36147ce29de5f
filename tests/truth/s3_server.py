"""An S3 server on loopback (moto's), and a proxy before it that fails as networks and servers do."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BUCKET = "pictures"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "a-test",
    "AWS_SECRET_ACCESS_KEY": "of-nothing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
NAMES = (*ENVIRONMENT, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")
QUICK_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)  # waits of a test


@dataclass
class S3Server:
    """moto's, in threads of this process. It believes every signature."""

    port: int
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def names(self, prefix: str = "") -> list[str]:
        """Without the empty objects by which Arrow keeps a folder whose last object it removed."""
        keys = self._backend().buckets[BUCKET].keys
        return sorted(key for key in keys if key.startswith(prefix) and not key.endswith("/"))

    def value(self, name: str) -> bytes:
        return self._backend().buckets[BUCKET].keys[name].value

    def change(self, name: str, data: bytes) -> None:
        """Other bytes under a name, as a disk that fails gives them."""
        self._backend().put_object(BUCKET, name, data)

    def fill(self, folder: Path, prefix: str) -> None:
        """The files of a folder as objects, without a request."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.change(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def fresh(self) -> None:
        """An empty bucket."""
        from moto.backends import get_backend

        for account in list(get_backend("s3")):
            get_backend("s3")[account]["aws"].reset()
        self._backend().create_bucket(BUCKET, "us-east-1")

    def _backend(self) -> Any:
        from moto.backends import get_backend

        return get_backend("s3")["123456789012"]["aws"]


def start_server() -> S3Server:
    server = pytest.importorskip(
        "moto.server", reason="moto is not here (make setup has it): no S3 server on loopback to test against"
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    return S3Server(running.get_host_and_port()[1], running.stop)


@contextlib.contextmanager
def environment(url: str) -> Iterator[None]:
    """Credentials and the address, as a person sets them; nothing of the machine's own."""
    from raphael.base.store import objects

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delenv(name, raising=False)
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        patch.setattr(objects, "WAITS_S", QUICK_S)
        patch.setattr(objects, "PARTS", 1)
        objects.open_store.cache_clear()
        yield
    objects.open_store.cache_clear()


# What befalls requests at random; a flipped byte in three downloads after each other is for tests of that
FAULTS = ("500", "503", "cut answer", "cut request", "slow", "closed")


@dataclass
class FaultyProxy:
    """Between a client and a server. fault(number, method, path): what befalls a request.

    500, 503: answers so. cut answer: half of the body under its whole length. cut request: the server gets half of what
    was sent. closed: no answer. silent: none for long, and the connection stays. flipped: a byte of what is read is
    another. denied: 403 as S3 says it.
    """

    port: int
    fault: Callable[[int, str, str], str]
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    server: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FaultyProxy:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, fault: str) -> int:
        return sum(kind == fault for _, _, kind in self.seen)

    def next(self, method: str, path: str) -> str:
        kind = self.fault(len(self.seen), method, path)
        self.seen.append((method, path, kind))
        return kind


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        fault = self.proxy.next(self.command, self.path)
        body = self._body()
        if fault == "silent":
            time.sleep(8)
        if fault in ("closed", "silent"):
            self._end()
        elif fault in ("500", "503"):
            self._answer(int(fault), b"<Error><Code>InternalError</Code></Error>")
        elif fault == "denied":
            self._answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        elif fault == "cut request" and body:
            self._half(body)
            self._end()
        else:
            if fault == "slow":
                time.sleep(0.2)
            self._relay(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _headers(self, body: bytes) -> dict[str, str]:
        skipped = ("transfer-encoding", "content-length", "connection", "expect")
        kept = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        return {**kept, "Content-Length": str(len(body)), "Connection": "close"}

    def _half(self, body: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.proxy.port)) as there:
            lines = [f"{self.command} {self.path} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in self._headers(body).items()]
            there.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])

    def _relay(self, body: bytes, fault: str) -> None:
        there = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=30)
        try:
            there.request(self.command, self.path, body or None, self._headers(body))
            answer = there.getresponse()
            data = answer.read()
        finally:
            there.close()
        is_data = self.command == "GET" and answer.status == 206 and data
        if fault == "flipped" and is_data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            checked = name.lower().startswith("x-amz-checksum") and fault == "flipped"
            if not checked and name.lower() not in ("transfer-encoding", "content-length", "connection", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut answer" and self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2])
            self._end()
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _end(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *words: object) -> None:
        pass


def at_random(share: float, seed: int, faults: tuple[str, ...] = FAULTS) -> Callable[[int, str, str], str]:
    """Of each request with that probability one of the faults."""
    import random

    draw = random.Random(seed)
    guard = threading.Lock()

    def fault(number: int, method: str, path: str) -> str:
        with guard:
            return draw.choice(faults) if draw.random() < share else ""

    return fault
