"""Where a link may lead: the syntax of a url, and which addresses are public.

A url is refused for its form before anything is resolved, and for its addresses after. Both are needed:
`http://0x7f.1/` and a name that resolves to 10.0.0.1 are the same attack.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Resolve = Callable[[str, int], list[str]]

MAX_URL_CHARS = 8192
CACHED_NAMES = 4096
CACHED_S = 300.0
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\\]")
_NUMERIC_LABEL = re.compile(r"\d+|0x[0-9a-f]*")
_UNQUOTED = "/%:=&?~+!$,;'@()*[]|-._"

OWN_S = 10.0  # how long the list of this machine's addresses is believed; reading it takes 0.2 ms

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # carrier-grade NAT
        "168.63.129.16/32",  # Azure's host: a public number that every virtual machine there reaches, and nobody else
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
        "64:ff9b:1::/48",  # local-use NAT64
        "100::/64",  # discard
        "2001::/23",  # protocol assignments, Teredo among them
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fec0::/10",  # site-local
    )
]


class Refusal(Exception):
    """The link is not followed; `reason` is one of a fixed set of words, the same every time."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Target:
    """A url taken apart: what is resolved, what is connected to, what is asked for."""

    scheme: str
    host: str  # lower case, ASCII, no brackets, no trailing dot
    port: int
    path: str  # with the query, percent-encoded

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def parse(url: str) -> Target:
    """Take a url apart. Raises Refusal for everything that is not a plain http or https link."""
    if not url or len(url) > MAX_URL_CHARS or _CONTROL.search(url) or url != url.strip():
        raise Refusal("bad url")  # control characters and backslashes are read differently by different parsers
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise Refusal("bad url") from None
    if parts.scheme not in ("http", "https"):
        raise Refusal("not http or https")
    if "@" in parts.netloc:
        raise Refusal("credentials in the url")
    host = _host(parts.hostname or "")
    port = {"http": 80, "https": 443}[parts.scheme] if port is None else port
    if port not in (80, 443) and not 1024 <= port <= 65535:
        raise Refusal("port not allowed")  # mail, shells and the like answer to a cleverly made path
    path = urllib.parse.quote(parts.path or "/", safe=_UNQUOTED)
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe=_UNQUOTED)
    return Target(parts.scheme, host, port, path)


def _host(host: str) -> str:
    if ":" in host:
        if "%" in host:
            raise Refusal("odd host")
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise Refusal("odd host") from None
    try:
        host = host.encode("ascii").decode() if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise Refusal("odd host") from None
    host = host.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise Refusal("odd host")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):  # no name ends so; of numbers only four plain decimals are accepted
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise Refusal("odd host") from None
    return host


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet. IPv4 addresses inside IPv6 ones are judged too."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    ip = _plain(ip)
    if any(ip.version == network.version and ip in network for network in _NOT_PUBLIC):
        return False
    private = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local
    return ip.is_global and not private


def _plain(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 one leads to (mapped, NAT64), or the address itself."""
    if ip.version == 6:
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def judge(addresses: list[str], refused_networks: Iterable[str] = ()) -> None:
    """Raises Refusal unless every address is public, not this machine's, and in none of the networks
    ("203.0.113.0/24", "2001:db8::7"). Of several reasons the same one whatever the order of the addresses."""
    if not all(is_public(address) for address in addresses):
        raise Refusal("private address")
    if any(is_own(address) for address in addresses):  # what trusts its own host would trust us
        raise Refusal("own address")
    networks = [ipaddress.ip_network(text, strict=False) for text in refused_networks]
    forms = {form for ip in map(ipaddress.ip_address, addresses) for form in (ip, _plain(ip))}
    if any(form.version == network.version and form in network for form in forms for network in networks):
        raise Refusal("refused network")


def is_own(address: str) -> bool:
    """Whether an IP address is this machine's: of one of its network interfaces, or routed to itself by the kernel.

    An address that a router outside translates into ours cannot be known from here.
    """
    plain = _plain(ipaddress.ip_address(address))
    return plain in _interfaces() or _routed_to(str(plain)) == plain


_known_own: tuple[float, frozenset] = (float("-inf"), frozenset())


def _interfaces() -> frozenset:
    global _known_own
    if time.monotonic() - _known_own[0] > OWN_S:
        import psutil

        entries = [entry for of_one in psutil.net_if_addrs().values() for entry in of_one]
        texts = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        _known_own = (time.monotonic(), frozenset(_plain(ipaddress.ip_address(text)) for text in texts))
    return _known_own[1]


def _routed_to(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address from which the kernel would speak to `address`: itself where a whole network is ours, without an
    interface that lists it. A UDP socket that is only connected sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return _plain(ipaddress.ip_address(probe.getsockname()[0]))
    except OSError:
        return None  # no way there: nothing will be connected to either


def is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def system_resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system's resolver gives them. Raises OSError or UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(entry[4][0] for entry in found))


class Resolver:
    """Names to addresses within a time limit, with a small cache.

    getaddrinfo cannot be interrupted, so it runs in a daemon thread that is left behind when it is late.
    """

    def __init__(self, resolve: Resolve = system_resolve):
        self.resolve = resolve
        self.cache: dict[str, tuple[float, list[str]]] = {}
        self.lock = threading.Lock()

    def addresses(self, host: str, port: int, limit_s: float) -> list[str]:
        """Raises Refusal("name not found")."""
        if is_literal(host):
            return [host]
        with self.lock:
            known = self.cache.get(host)
        if known and time.monotonic() - known[0] < CACHED_S:
            return known[1]
        found: list[str] = []

        def look_up() -> None:
            try:
                found.extend(self.resolve(host, port))
            except (OSError, UnicodeError):
                pass  # an empty answer is the answer

        thread = threading.Thread(target=look_up, daemon=True, name="resolver")
        thread.start()
        thread.join(max(limit_s, 0.01))
        addresses = [] if thread.is_alive() else found
        if not addresses:
            raise Refusal("name not found")
        with self.lock:
            if len(self.cache) >= CACHED_NAMES:
                self.cache.clear()
            self.cache[host] = (time.monotonic(), addresses)
        return addresses
