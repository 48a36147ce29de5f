"""How somebody who may not comes to a server on loopback, and what a refusal looks like."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

REFUSED = {400, 401, 403, 404, 405, 421}
ALLOW_ORIGIN = "access-control-allow-origin"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Way:
    """A disguise. host, origin: None is the server's own, "" sends none. knows: whether it has the password, too.

    A browser that is logged in sends the password along, so a foreign page is tried with it.
    """

    name: str
    origin: str | None = ""
    host: str | None = None
    auth: str | None = None
    knows: bool = False

    def headers(self, port: int, auth: str) -> list[tuple[str, str]]:
        host = f"127.0.0.1:{port}" if self.host is None else self.host.format(port=port)
        headers = [("Host", one) for one in host.split(" and ")]
        if self.origin != "":
            headers.append(("Origin", f"http://127.0.0.1:{port}" if self.origin is None else self.origin))
        if given := auth if self.knows else self.auth:
            headers.append(("Authorization", f"Basic {base64.b64encode(given.encode()).decode()}"))
        return headers


OWNER = Way("the owner, by the own page", origin=None, knows=True)
WAYS = [
    Way("another user, no password"),
    Way("another user, a wrong password", auth="raphael:guess"),
    Way("another user, an empty password", auth=":"),
    Way("a foreign page", origin="https://evil.example"),
    Way("a foreign page, browser logged in", origin="https://evil.example", knows=True),
    Way("a page without origin, browser logged in", origin="null", knows=True),
    Way("another port of this machine, logged in", origin="http://localhost:9", knows=True),
    Way("a page like ours, logged in", origin="http://127.0.0.1.evil.example", knows=True),
    Way("DNS rebinding", host="evil.example:{port}"),
    Way("DNS rebinding, logged in", host="evil.example:{port}", knows=True),
    Way("DNS rebinding, same page", host="evil.example", origin="http://evil.example", knows=True),
    Way("DNS rebinding, 10.evil.example", host="10.evil.example", knows=True),
    Way("DNS rebinding, our name within", host="127.0.0.1.evil.example:{port}", knows=True),
    Way("two names, ours first", host="127.0.0.1:{port} and evil.example", knows=True),
]


def ask(port: int, method: str, path: str, headers: list[tuple[str, str]], body: Any = None) -> Answer:
    """One request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        data = b"" if body is None else json.dumps(body).encode()
        for name, value in [*headers, ("Content-Length", str(len(data)))]:
            connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        known = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, known, answer.read().decode("utf-8", "replace"))
    finally:
        connection.close()


def handshake(port: int, path: str, headers: list[tuple[str, str]], first: str) -> str:
    """Ask for a websocket, say `first`, and return what the server says: its status line, or its first frame's text."""
    fixed = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    fixed += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: prefect\r\n"
    asked = "".join(f"{name}: {value}\r\n" for name, value in headers)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\n{asked}{fixed}\r\n".encode())
        stream = line.makefile("rb")
        status = stream.readline().decode().strip()
        if " 101 " not in status:
            return status
        while stream.readline().strip():
            pass
        data = first.encode()
        line.sendall(bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data)  # one masked text frame, mask 0
        opcode, length = stream.read(2)
        text = stream.read(length & 0x7F).decode("utf-8", "replace")
        return f"closed {text[2:]}" if opcode & 0x0F == 8 else text
