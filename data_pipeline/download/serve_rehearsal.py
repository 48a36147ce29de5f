"""A rehearsal of the web: every address is answered from a folder of photographs, as well and as badly as the web does.

    with serve(Path("photographs")) as web:
        Policy(resolver=Resolver(web.resolve), rehearsal_port=web.port)

So a list of real links runs through all stages before a machine is rented, and nothing leaves this one. FATES is the
whole table of what may happen. The fate of an address comes from a hash of it, that of a name from a hash of the name:
the same list meets the same web each time. Images are sections of the photographs, so that each address has bytes of
its own. What cannot be rehearsed: TLS, and what the images of the list really show.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.common.places import IMAGE_FORMATS, IMAGE_SUFFIXES
from raphael.base.stage import StageError

STALL_S = 3600.0
TRICKLE_S = 0.2  # between two bytes of a slow server
PUBLIC_ADDRESS = "93.184.215.14"  # any that the gateway takes for public; it is never connected to
GONE = "gone"
MOVED = "/rehearsal-moved/"  # where redirects lead; always an image
PAGE = b"<!doctype html><title>Not here any more</title><p>See our new shop.\n"
LONGEST_PX = (160, 641)  # long side of an image, as wide as lists have them


@dataclass(frozen=True)
class Fate:
    """share: of all links. outcome: what the stage download has to say of it, "success" or a reason."""

    share: float
    outcome: str


# 55 % alive is what docs/data.md expects for late 2026 (67 % in October 2024, 1 % a month); that failures are mostly
# of names, 404 and 403 is what img2dataset's users report. How the rest is divided is our guess.
FATES: dict[str, Fate] = {
    "picture": Fate(0.49, "success"),
    "moved": Fate(0.03, "success"),
    "copy": Fate(0.02, "success"),  # the whole photograph, with the same bytes under other addresses
    "pixel": Fate(0.01, "success"),  # 1 x 1, as trackers leave it; the stage filter's business
    GONE: Fate(0.15, "name not found"),  # by the name: a host is gone with all its links
    "404": Fate(0.143, "http 404"),
    "403": Fate(0.05, "http 403"),
    "410": Fate(0.02, "http 410"),
    "503": Fate(0.01, "http 503"),
    "page": Fate(0.03, "not a picture"),
    "hang up": Fate(0.015, "no connection"),
    "stall": Fate(0.01, "timeout"),
    "cut": Fate(0.004, "truncated"),  # the connection closes within the body
    "half": Fate(0.004, "truncated"),  # half a file, served as whole
    "opt out": Fate(0.004, "opted out by X-Robots-Tag"),
    "empty": Fate(0.003, "empty answer"),
    "trickle": Fate(0.002, "too slow"),
    "loop": Fate(0.002, "too many redirects"),
    "inward": Fate(0.001, "private address"),  # a redirect into somebody's own network
    "bomb": Fate(0.001, "too many pixels"),
    "zipped": Fate(0.001, "compressed answer"),
}


def fate_of(host: str, path: str) -> str:
    """What happens to http(s)://host/path, a key of FATES. path: with the query, as requested."""
    if path.startswith(MOVED):
        return "picture"
    if _share(f"name {host}") < FATES[GONE].share:
        return GONE
    place = _share(f"path {host}{path}") * sum(fate.share for name, fate in FATES.items() if name != GONE)
    for name, fate in FATES.items():
        if name != GONE:
            if place < fate.share:
                return name
            place -= fate.share
    return "404"  # rounding: the sum of the shares was reached


def _share(text: str) -> float:
    """Uniform in [0, 1), by the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


class Photographs:
    """Bodies made from a folder's images."""

    def __init__(self, folder: Path):
        """Raises StageError where there is none."""
        from PIL import Image

        Image.init()  # half a second of imports, which the first client would have to wait for
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise StageError(
                f"download.rehearsal: {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name a folder with "
                'some, or set it to "" to ask the web'
            )

    def fingerprint(self) -> list[tuple[str, int]]:
        return [(str(path), path.stat().st_size) for path in self.files]

    def whole(self, address: str) -> bytes:
        """One of the photographs as it lies there."""
        return self.files[int(_share(f"file {address}") * len(self.files))].read_bytes()

    def section(self, address: str) -> bytes:
        """A piece of a photograph, of a size and in a format of its own: JPEG, PNG, WebP or GIF."""
        from PIL import Image

        low, high = LONGEST_PX
        with Image.open(io.BytesIO(self.whole(address)), formats=IMAGE_FORMATS) as opened:
            opened.draft("RGB", (high, high))  # JPEGs are decoded at no more than is needed
            photo = opened.convert("RGB")
        wide, tall = (0.5 + 0.5 * _share(f"{side} {address}") for side in ("width", "height"))
        left, top = ((1 - size) * _share(f"{side} {address}") for side, size in (("left", wide), ("top", tall)))
        box = (left, top, left + wide, top + tall)
        piece = photo.crop(tuple(int(edge * side) for edge, side in zip(box, photo.size * 2, strict=True)))
        longest = low + int(_share(f"longest {address}") * (high - low))
        piece.thumbnail((longest, longest))
        stream, kind = io.BytesIO(), _share(f"format {address}")
        if kind < 0.86:
            piece.save(stream, "JPEG", quality=85)
        elif kind < 0.94:
            piece.save(stream, "PNG", compress_level=1)
        elif kind < 0.98:
            piece.save(stream, "WEBP", quality=80, method=0)
        else:
            piece.quantize(64, Image.Quantize.FASTOCTREE).save(stream, "GIF")  # median cut takes a second on noise
        return stream.getvalue()


def pixel() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("P", (1, 1)).save(stream, "GIF")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 3.6 thousand million pixels."""
    header = (60_000).to_bytes(4, "big") * 2 + b"\x08\x06\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + len(header).to_bytes(4, "big") + b"IHDR" + header + b"\0" * 4000


@dataclass
class Web:
    """The running rehearsal. counts: requests by fate, repetitions included."""

    port: int
    photographs: int
    counts: dict[str, int] = field(default_factory=dict)

    def resolve(self, host: str, port: int) -> list[str]:
        """For the gateway's Resolver. Raises OSError for a name that is gone."""
        if _share(f"name {host}") < FATES[GONE].share:
            raise OSError(f"{host}: gone")
        return [PUBLIC_ADDRESS]


@contextlib.contextmanager
def serve(folder: str | Path) -> Iterator[Web]:
    """Answer for the whole web on a free port of 127.0.0.1 while the block runs, from threads of this process."""
    server = _Server(("127.0.0.1", 0), _Handler)
    try:
        server.photographs, server.closing = Photographs(Path(folder)), threading.Event()
        server.web = Web(server.server_address[1], len(server.photographs.files))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.web
        finally:
            server.closing.set()  # lets go of whoever is stalled
            server.shutdown()
            thread.join()
    finally:
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    photographs: Photographs
    closing: threading.Event
    web: Web

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is no news; anything else is a bug and is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = 30.0
    server: _Server
    lock = threading.Lock()

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition("]")[2].split(":")[0]
        path = self.requestline.split()[1]  # self.path has lost a second slash at its beginning
        address, fate = host + path, fate_of(host, path)
        with self.lock:
            self.server.web.counts[fate] = self.server.web.counts.get(fate, 0) + 1
        make = {
            "picture": lambda: self._answer(200, self.server.photographs.section(address)),
            "moved": lambda: self._redirect(f"https://{host}{MOVED}{hashlib.md5(address.encode()).hexdigest()}.jpg"),
            "copy": lambda: self._answer(200, self.server.photographs.whole(address)),
            "pixel": lambda: self._answer(200, pixel()),
            "page": lambda: self._answer(200, PAGE),
            "hang up": lambda: None,
            "stall": lambda: self.server.closing.wait(STALL_S),
            "cut": lambda: self._part_of(self.server.photographs.section(address), promised=True),
            "half": lambda: self._part_of(self.server.photographs.section(address), promised=False),
            "opt out": lambda: self._answer(200, self.server.photographs.section(address), "X-Robots-Tag: noai"),
            "empty": lambda: self._answer(200, b""),
            "trickle": self._trickle,
            "loop": lambda: self._redirect(f"http://{host}{path}"),
            "inward": lambda: self._redirect("http://192.168.0.1/camera.jpg"),
            "bomb": lambda: self._answer(200, bomb()),
            "zipped": lambda: self._answer(200, b"\x1f\x8b" + b"\0" * 100, "Content-Encoding: gzip"),
        }
        make.get(fate, lambda: self._answer(int(fate), PAGE))()

    def _answer(self, status: int, body: bytes, more: str = "", promised: int | None = None) -> None:
        self.send_response(status)
        for line in filter(None, (more,)):
            self.send_header(*line.split(": "))
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, where: str) -> None:
        self._answer(302, b"", f"Location: {where}")

    def _part_of(self, body: bytes, promised: bool) -> None:
        half = body[: len(body) // 2]
        self._answer(200, half, promised=len(body) if promised else None)

    def _trickle(self) -> None:
        self._answer(200, b"\xff\xd8\xff", promised=1_000_000)
        while not self.server.closing.wait(TRICKLE_S):
            self.wfile.write(b"\xe0")

    def log_message(self, *_: object) -> None:
        """Quiet: the downloader's report says what happened to every row."""
