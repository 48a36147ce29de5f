"""An image server on loopback: the embedded corpus's site (data/source/site.zip), or a folder of images.

    with serve(Path("data/source/site.zip")) as server:
        ... f"http://127.0.0.1:{server.port}/a/000001.png" ...

The site is as broken as its `behaviours.json` says: "stall" answers never, "cut" closes in the middle of the body.
Everything unknown is a 404. A folder is served by its images alone; a path that leads out of it, by dots or by a
link, is a 404.
"""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.common.places import IMAGE_SUFFIXES
from raphael.base.config.params import Config
from raphael.base.stage import StageError

BEHAVIOURS = "behaviours.json"
STALL_S = 3600.0  # a stalled answer ends with the client's patience or with the server
IDLE_S = 30.0  # a kept-alive connection without a request is closed
SIGNATURES = (  # first bytes -> what they are; a name may lie about it, as on the web
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"RIFF", "image/webp"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"<", "text/html; charset=utf-8"),
)


@dataclass
class Served:
    """A running server. counts: answers by status, "stall" and "cut" beside them."""

    port: int
    counts: dict[str, int] = field(default_factory=dict)


class ZipSite:
    """Bodies from an archive, read under a lock (a ZipFile has one file position)."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)
        self.names = set(self.archive.namelist()) - {BEHAVIOURS}
        self.lock = threading.Lock()
        listed = BEHAVIOURS in self.archive.namelist()
        self.behaviours: dict[str, str] = json.loads(self.archive.read(BEHAVIOURS)) if listed else {}

    def body(self, name: str) -> bytes | None:
        if name not in self.names:
            return None
        with self.lock:
            return self.archive.read(name)

    def close(self) -> None:
        self.archive.close()


class FolderSite:
    """Images of a folder, nothing outside it, nothing but images."""

    behaviours: dict[str, str] = {}

    def __init__(self, root: Path):
        self.root = root.resolve()

    def body(self, name: str) -> bytes | None:
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root) or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
                return None
            return path.read_bytes()
        except (OSError, ValueError):  # unreadable; a NUL in the name
            return None

    def close(self) -> None:
        pass


def site_of(config: Config, folder: str | Path = "data/source") -> Path | None:
    """What the loopback server has to serve for this configuration; None where all links lead to the real web, or
    images lie here."""
    if config.source.kind == "scenes":
        return Path(folder) / "site.zip"
    return None


@contextlib.contextmanager
def serve(site: str | Path, port: int = 0) -> Iterator[Served]:
    """Serve an archive or a folder on 127.0.0.1 while the block runs, from threads of this process.

    port 0: any free one.
    """
    site = Path(site)
    if not site.exists():
        raise StageError(
            f"{site}: no such file or folder to serve; run the stage that makes it (dvc repro source) "
            "or set source.path"
        )
    try:
        content = FolderSite(site) if site.is_dir() else ZipSite(site)
    except zipfile.BadZipFile:
        raise StageError(
            f"{site}: not a whole archive; delete it and run the stage that makes it (dvc repro source)"
        ) from None
    try:
        server = _Server(("127.0.0.1", port), _Handler)
    except OSError as error:
        content.close()
        raise StageError(f"port {port} on 127.0.0.1: {error.strerror}; choose another or 0 for any free one") from None
    server.site, server.closing = content, threading.Event()
    server.served = Served(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.served
    finally:
        server.closing.set()  # lets go of whoever is stalled
        server.shutdown()
        server.server_close()
        thread.join()
        content.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an open connection must not keep the process
    block_on_close = False
    request_queue_size = 256
    site: ZipSite | FolderSite
    closing: threading.Event
    served: Served

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is no news; anything else is a bug and is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "scenes", ""
    timeout = IDLE_S
    disable_nagle_algorithm = True
    server: _Server
    lock = threading.Lock()

    def do_GET(self) -> None:
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        site = self.server.site
        behaviour = site.behaviours.get(name)
        if behaviour == "stall":
            self._count("stall")
            self.server.closing.wait(STALL_S)
            self.close_connection = True
            return
        body = site.body(name)
        if body is None:
            self._answer(404, b"<!doctype html><title>Not found</title>\n", "text/html; charset=utf-8")
        elif behaviour == "cut":
            self._answer(200, body, _content_type(body), sent=len(body) // 2)
            self.close_connection = True
        else:
            self._answer(200, body, _content_type(body))

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, content_type: str, sent: int | None = None) -> None:
        self._count(str(status) if sent is None else "cut")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def _count(self, what: str) -> None:
        with self.lock:
            self.server.served.counts[what] = self.server.served.counts.get(what, 0) + 1

    def log_message(self, *_: object) -> None:
        """Quiet: the downloader's report says what happened to every row."""


def _content_type(body: bytes) -> str:
    return next((name for start, name in SIGNATURES if body.startswith(start)), "application/octet-stream")


def main(argv: list[str] | None = None) -> int:
    """`python -m data_pipeline.download.serve_images data/source/site.zip --port 8000`: serve until interrupted or
    orphaned."""
    import argparse
    import os
    import time

    from raphael.base.stage import one_clear_line

    parser = argparse.ArgumentParser(
        prog="serve_images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "site", nargs="?", default="data/source/site.zip", help="an archive or a folder (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default)")
    arguments = parser.parse_args(argv)
    parent = os.getppid()
    with one_clear_line("serve_images") as outcome, serve(arguments.site, arguments.port) as server:
        print(f"http://127.0.0.1:{server.port}/", flush=True)
        while os.getppid() == parent:  # ends with whoever started it
            time.sleep(0.5)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
