"""Who may ask a server in a browser's reach: requests for its own names, from its own page.

A page of anybody's reaches loopback from the visitor's browser, under any name that its DNS gives it (rebinding), and
CORS only hides answers: a request without preflight is carried out. So Host and Origin are looked at before anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from raphael.base.stage import StageError

REFUSED = 403
MISDIRECTED = 421  # HTTP's word for a host that is not served here
UNAUTHORIZED = 401


class Door:
    """hosts: the names by which a server may be asked, HOST:PORT; pages of these names are its own.

    schemes: of those pages. Raises StageError for no names.
    """

    def __init__(self, hosts: Iterable[str], schemes: tuple[str, ...] = ("http",)):
        self.hosts = frozenset(host.strip().lower() for host in hosts if host.strip())
        self.origins = frozenset(f"{scheme}://{host}" for host in self.hosts for scheme in schemes)
        if not self.hosts:
            raise StageError("got no names for the server, expected HOST:PORT; of `make up`: set RAPHAEL_GUARD_HOSTS")

    def refusal(self, scope: dict) -> int | None:
        """The HTTP status by which an ASGI request is refused, or None. Every copy of a header has to be right."""
        hosts = header(scope, b"host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return MISDIRECTED
        origins = header(scope, b"origin")
        if not self.origins.issuperset(origin.lower() for origin in origins):
            return REFUSED
        if not origins and not _may_come_from_elsewhere(scope):
            return REFUSED
        return None


def own_names(port: int) -> list[str]:
    """What a browser calls a server on loopback; any other name got there by DNS rebinding."""
    return [f"127.0.0.1:{port}", f"localhost:{port}"]


def header(scope: dict, name: bytes) -> list[str]:
    """Every value of a header of an ASGI request."""
    return [value.decode("latin-1").strip() for key, value in scope.get("headers", []) if key.lower() == name]


def _may_come_from_elsewhere(scope: dict) -> bool:
    """A browser says where a request comes from: another site may link to a page, not embed it or fetch from it."""
    if not {"cross-site", "same-site"}.intersection(header(scope, b"sec-fetch-site")):
        return True
    return (
        scope.get("method") in ("GET", "HEAD")
        and header(scope, b"sec-fetch-mode") == ["navigate"]
        and header(scope, b"sec-fetch-dest") == ["document"]
    )
