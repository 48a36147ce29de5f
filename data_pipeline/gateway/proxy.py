"""The only door between the downloader and the world.

img2dataset by itself opens file:, loopback and private addresses, follows redirects to them, reads bodies without a
cap, waits without a total deadline, and decodes an image before it looks at its size. So it is given urls of this
gateway alone (a free port of 127.0.0.1, each url signed with this run's key), and the gateway fetches for it: http
and https only, every address public, also after redirects, connected to exactly as checked (no rebinding in between),
within a byte cap and a deadline, and nothing passes that is not a whole JPEG, PNG, WebP or GIF of at most so many
pixels. One configured host leads to the local image server; in a rehearsal all of them lead to another
(data_pipeline/download/serve_rehearsal.py), after the same checks. An answer is held in memory until it is judged: at
most `max_bytes` for each of the downloader's threads.

`fetch(url, policy)` is the same from Python. A refusal's reason travels as the status text, which img2dataset keeps
row by row.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import io
import secrets
import socket
import socketserver
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from data_pipeline.gateway.addresses import Refusal, Resolver, Target, judge, parse
from data_pipeline.gateway.bodies import BodyLimits, not_whole
from data_pipeline.gateway.image_header import Header, NotAnImage, read_header
from data_pipeline.gateway.received import PIECE_BYTES, CountedSocket, TooMuchAround

REFUSED_STATUS = 502
SLOT_WAIT_S = 60.0
REDIRECTS = (301, 302, 303, 307, 308)
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none: noindex, nofollow
_BUSY = {f"http {status}" for status in (429, 500, 502, 503, 504)}
_MAY_PASS = _BUSY | {"timeout", "no connection", "name not found", "truncated"}


@dataclass(frozen=True)
class Policy:
    """What the gateway allows. Defaults are for the public web."""

    timeout_s: float = 10.0  # silence on a connection
    deadline_s: float = 30.0  # one attempt as a whole, redirects included
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_decoded_bytes: int = 200_000_000  # pixels times channels times depth: 16-bit RGBA is 8 bytes a pixel
    max_redirects: int = 5
    retries: int = 1  # only after failures that may pass: no connection, silence, a busy server
    per_host: int = 8  # connections at a time
    user_agent: str = "raphael-open"
    refused_networks: tuple[str, ...] = ()  # addresses and networks, public or not, that are never connected to
    why_not: Callable[[bytes], str] = lambda body: ""  # of every whole image: the reason to refuse it, or ""
    local_host: str = ""  # this name, and no other, leads to local_port of this machine
    local_port: int = 0
    rehearsal_port: int = 0  # not 0: nothing leaves this machine, every public address leads to this port of it
    resolver: Resolver = field(default_factory=Resolver, compare=False)
    hosts: HostSlots = field(default_factory=lambda: HostSlots(), compare=False)


@dataclass(frozen=True)
class Fetched:
    """A whole image of an accepted kind."""

    body: bytes
    header: Header
    robots: tuple[str, ...] = ()  # X-Robots-Tag values of the answer and of the redirects to it
    url: str = ""  # after redirects


@dataclass(frozen=True)
class Refused:
    """No image. `reason` is from a fixed vocabulary ("private address", "http 404", "too many pixels" ...)."""

    reason: str


def fetch(url: str, policy: Policy | None = None) -> Fetched | Refused:
    """Fetch one image, or say why not. Never raises for what a url or a server does; returns within the deadlines."""
    policy = policy or Policy()
    reason = ""
    for attempt in range(policy.retries + 1):
        if attempt:
            time.sleep(0.2 * attempt)
        try:
            return _Attempt(policy).follow(url)
        except Refusal as refusal:
            reason = refusal.reason
        if reason not in _MAY_PASS:
            break
    return Refused(reason)


def opted_out(values: Iterable[str], user_agent: str) -> bool:
    """Whether X-Robots-Tag values forbid the use: `noai`, or `name: noai` where the name is ours. Directives for
    another robot (`googlebot: noindex`) stay within their value."""
    for value in values:
        name, colon, rest = value.lower().rpartition(":")
        if colon and name.strip() not in ("", "*", user_agent.lower().split("/")[0]):
            continue
        if OPT_OUTS & {directive.strip() for directive in rest.split(",")}:
            return True
    return False


class HostSlots:
    """At most so many connections to one host at a time."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.busy: dict[str, int] = {}

    @contextmanager
    def slot(self, host: str, limit: int) -> Iterator[None]:
        with self.lock:
            if not self.lock.wait_for(lambda: self.busy.get(host, 0) < limit, SLOT_WAIT_S):
                raise Refusal("host busy")
            self.busy[host] = self.busy.get(host, 0) + 1
        try:
            yield
        finally:
            with self.lock:
                self.busy[host] -= 1
                if not self.busy[host]:
                    del self.busy[host]
                self.lock.notify_all()


class _Attempt:
    """One try at one url, redirects included."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.limits = BodyLimits(policy.max_bytes, policy.max_pixels, policy.max_decoded_bytes)
        self.deadline_s = time.monotonic() + policy.deadline_s
        self.robots: list[str] = []

    def follow(self, url: str) -> Fetched:
        for hop in range(self.policy.max_redirects + 1):
            target = parse(url)
            is_local = bool(self.policy.local_host) and target.host == self.policy.local_host
            if is_local and hop:
                raise Refusal("redirect to the local host")
            if is_local:
                answer = self._ask(target, "127.0.0.1", self.policy.local_port, secure=False)
            else:
                with self.policy.hosts.slot(target.host, self.policy.per_host):
                    answer = self._ask_public(target)
            if isinstance(answer, Fetched):
                return answer
            url = urllib.parse.urljoin(target.url, answer)
        raise Refusal("too many redirects")

    def _ask_public(self, target: Target) -> Fetched | str:
        addresses = self.policy.resolver.addresses(target.host, target.port, min(self._left_s(), self.policy.timeout_s))
        judge(addresses, self.policy.refused_networks)
        if self.policy.rehearsal_port:
            return self._ask(target, "127.0.0.1", self.policy.rehearsal_port, secure=False)
        return self._ask(target, addresses[0], target.port, secure=target.scheme == "https")

    def _ask(self, target: Target, address: str, port: int, secure: bool) -> Fetched | str:
        """The image, or the Location of a redirect. `address` has been checked and is what is connected to."""
        connection = None
        try:
            connection = self._connect(address, port)
            if secure:
                connection.settimeout(self._wait_s())
                connection = _tls().wrap_socket(connection, server_hostname=target.host)
            connection.settimeout(self._wait_s())
            connection.sendall(self._request(target))
            counted = CountedSocket(connection, self._wait_s)
            response = http.client.HTTPResponse(counted, method="GET")
            response.begin()
            return self._judge(response, counted)
        except TooMuchAround:
            raise Refusal("answer not understood") from None
        except TimeoutError:
            is_over = time.monotonic() >= self.deadline_s - 0.01  # the last wait is cut short by the deadline
            raise Refusal("too slow" if is_over else "timeout") from None
        except ssl.SSLError:
            raise Refusal("tls") from None
        except ConnectionError:
            raise Refusal("no connection") from None
        except (http.client.HTTPException, ValueError):  # http.client raises ValueError for odd chunk sizes and lengths
            raise Refusal("answer not understood") from None
        except OSError:
            raise Refusal("no connection") from None
        finally:
            if connection is not None:
                connection.close()

    def _connect(self, address: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._wait_s())
            connection.connect((address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def _request(self, target: Target) -> bytes:
        lines = (
            f"GET {target.path} HTTP/1.1",
            f"Host: {target.authority}",
            f"User-Agent: {self.policy.user_agent}",
            "Accept: image/jpeg, image/png, image/webp, image/gif",
            "Accept-Encoding: identity",
            "Connection: close",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def _judge(self, response: http.client.HTTPResponse, counted: CountedSocket) -> Fetched | str:
        self.robots += response.headers.get_all("X-Robots-Tag", [])
        if opted_out(self.robots, self.policy.user_agent):
            raise Refusal("opted out by X-Robots-Tag")
        if response.status in REDIRECTS and response.headers.get("Location"):
            return response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace").strip()
        if response.status != 200:
            raise Refusal(f"http {response.status}")
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("identity", ""):
            raise Refusal("compressed answer")  # a gzip bomb, or a server that ignores what was asked for
        if (response.length or 0) > self.policy.max_bytes:
            raise Refusal("too many bytes")
        body, header = self._body(response, counted)
        if reason := not_whole(header, body) or self.policy.why_not(body):
            raise Refusal(reason)
        return Fetched(body, header, tuple(self.robots))

    def _body(self, response: http.client.HTTPResponse, counted: CountedSocket) -> tuple[bytes, Header]:
        promised = response.length
        body, header, looked = bytearray(), None, 0
        while promised is None or len(body) < promised:
            try:
                piece = response.read1(PIECE_BYTES if promised is None else min(PIECE_BYTES, promised - len(body)))
            except (http.client.IncompleteRead, ConnectionError):  # closed or reset: the server's timing, the same loss
                raise Refusal("truncated") from None
            if not piece:
                break
            body += piece
            counted.image_bytes = len(body)
            if len(body) > self.policy.max_bytes:
                raise Refusal("too many bytes")
            if header is None and len(body) >= 2 * looked:  # from the start: at each piece that would be a square
                header, looked = self._header(bytes(body)), len(body)
        if promised is not None and len(body) < promised:
            raise Refusal("truncated")
        header = header or self._header(bytes(body))
        if header is None:
            raise Refusal("not a picture" if body else "empty answer")
        return bytes(body), header

    def _header(self, start: bytes) -> Header | None:
        try:
            header = read_header(start)
        except NotAnImage:
            raise Refusal("not a picture") from None
        if header and (reason := self.limits.too_large(header)):
            raise Refusal(reason)
        return header

    def _left_s(self) -> float:
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise Refusal("too slow")
        return left_s

    def _wait_s(self) -> float:
        """How long the next wait on the network may last. Raises Refusal("too slow") past the deadline."""
        return min(self.policy.timeout_s, self._left_s())


_tls_context: list[ssl.SSLContext] = []


def _tls() -> ssl.SSLContext:
    if not _tls_context:  # loading the system's certificates takes 30 ms
        _tls_context.append(ssl.create_default_context())
    return _tls_context[0]


class Gateway:
    """`with Gateway(policy) as gateway: gateway.sign(row, url)` serves that image on a free port of 127.0.0.1."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.key = secrets.token_bytes(32)
        self.lock = threading.Lock()
        self.answered = 0  # requests answered so far: the sign of life that the stall watch looks at
        self.server: socketserver.ThreadingTCPServer | None = None

    def __enter__(self) -> Gateway:
        gateway = self

        class Handler(socketserver.StreamRequestHandler):
            timeout = 30

            def handle(self) -> None:
                gateway._handle(self.rfile, self.wfile)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 512

            def handle_error(self, request, client_address) -> None:
                pass  # the downloader hung up; it has recorded why, and its row is accounted for from its own table

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True, name="gateway").start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.server is not None
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        assert self.server is not None, "the gateway is not open"
        return self.server.server_address[1]

    def sign(self, row: int, url: str) -> str:
        """The address under which this gateway, and no other run's, serves `url`."""
        encoded = base64.urlsafe_b64encode(url.encode()).decode()
        return f"http://127.0.0.1:{self.port}/{row}/{self._signature(row, url)}/{encoded}"

    def _signature(self, row: int, url: str) -> str:
        return hmac.new(self.key, f"{row} {url}".encode(), hashlib.sha256).hexdigest()[:32]

    def _handle(self, reader: io.BufferedIOBase, writer: io.BufferedIOBase) -> None:
        request = reader.readline(4 * PIECE_BYTES).decode("latin-1").split(" ")
        for _ in range(100):
            if reader.readline(PIECE_BYTES) in (b"\r\n", b"\n", b""):
                break
        url = self._verified(request[1]) if len(request) == 3 and request[0] == "GET" else None
        if url is None:
            writer.write(_answer(403, "not signed by this run"))
            return
        outcome = fetch(url, self.policy)
        with self.lock:
            self.answered += 1
        if isinstance(outcome, Refused):
            writer.write(_answer(REFUSED_STATUS, outcome.reason))
        else:
            writer.write(_answer(200, "OK", outcome.body, outcome.robots))

    def _verified(self, path: str) -> str | None:
        try:
            _, row, signature, encoded = path.split("/")
            url = base64.b64decode(encoded, altchars=b"-_", validate=True).decode()
            is_ours = hmac.compare_digest(signature.encode(), self._signature(int(row), url).encode())
        except ValueError:
            return None
        return url if is_ours else None


def _answer(status: int, text: str, body: bytes = b"", robots: tuple[str, ...] = ()) -> bytes:
    lines = [f"HTTP/1.1 {status} {text}", f"Content-Length: {len(body)}", "Connection: close"]
    for value in robots[:20]:
        printable = "".join(char if " " <= char <= "~" else " " for char in value[:1000])
        lines.append(f"X-Robots-Tag: {printable}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body
