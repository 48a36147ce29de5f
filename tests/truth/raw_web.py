"""A web server on loopback that sends whatever bytes a test says."""

from __future__ import annotations

import socketserver
import threading
from contextlib import contextmanager

HOST = "pictures.invalid"


def answer(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@contextmanager
def web(pages: dict[str, object]):
    """A server on loopback. pages: path -> the raw answer, or a function of the socket. Yields (port, paths asked)."""
    asked: list[str] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            request = b""
            while b"\r\n\r\n" not in request:
                piece = self.request.recv(65536)
                if not piece:
                    return
                request += piece
            path = request.split(b" ")[1].decode()
            asked.append(path)
            page = pages.get(path, answer(b"", "404 Not Found"))
            try:
                page(self.request) if callable(page) else self.request.sendall(page)
            except OSError:
                pass  # the gateway hung up, as it should

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()
