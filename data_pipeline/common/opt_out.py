"""Images whose owners said no: a list of urls, domains and hashes that `select` and `filter` obey.

A text file (`filter.opt_out` in params.yaml), one entry a line, # begins a comment:

    https://a.example/picture.jpg      this address, whatever its scheme or fragment
    a.example                          every host of this domain
    md5:<32 hex digits>                the image as it came; where the list has md5 (LAION's *-md5), before the request
    sha256:<64 hex digits>             the image as it came, or as it is stored
"""

from __future__ import annotations

import functools
import hashlib
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raphael.base.stage import StageError

if TYPE_CHECKING:
    import numpy as np

_HASHES = {"md5": re.compile(r"[0-9a-f]{32}"), "sha256": re.compile(r"[0-9a-f]{64}")}
_PLAIN_HOST = re.compile(r"https?://([A-Za-z0-9.-]+)(?=[/?#]|\Z)")  # no user, no port, no letters beyond ASCII
MOST_HOSTS = 1_000_000  # that are remembered
_DOMAIN = re.compile(r"(?:[\w-]+\.)+[\w-]+")


@dataclass(frozen=True)
class OptOut:
    urls: frozenset[str] = frozenset()  # as `bare` leaves them
    domains: frozenset[str] = frozenset()
    md5: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()
    fingerprint: str = ""  # of the file

    @classmethod
    def read(cls, path: str) -> OptOut:
        """The list at `path`; "" is an empty one. Raises StageError for a line that is none of the four kinds."""
        if not path:
            return cls()
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StageError(f"filter.opt_out: {path}: {error}; expected a text file of urls and domains") from None
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, name: str) -> OptOut:
        """The entries of a list's text. name: of the file, for errors. Raises StageError."""
        found: dict[str, set[str]] = {"urls": set(), "domains": set(), "md5": set(), "sha256": set()}
        for number, line in enumerate(text.splitlines(), 1):
            entry = line.split(" #")[0].strip() if not line.lstrip().startswith("#") else ""
            if not entry:
                continue
            kind, _, rest = entry.partition(":")
            if kind in _HASHES and _HASHES[kind].fullmatch(rest.strip().lower()):
                found[kind].add(rest.strip().lower())
            elif "://" in entry:
                found["urls"].add(bare(entry)[0])
            elif _DOMAIN.fullmatch(entry):
                found["domains"].add(_ascii(entry))
            else:
                raise StageError(
                    f"{name}:{number}: got {entry[:60]!r}, expected a url, a domain, md5:... or sha256:..."
                )
        frozen = {kind: frozenset(entries) for kind, entries in found.items()}
        return cls(**frozen, fingerprint=hashlib.sha256(text.encode()).hexdigest())

    def __bool__(self) -> bool:
        return bool(self.urls or self.domains or self.md5 or self.sha256)

    def summary(self) -> dict[str, int]:
        """How many entries of each kind, for a report."""
        kinds = {"urls": self.urls, "domains": self.domains, "md5": self.md5, "sha256": self.sha256}
        return {name: len(entries) for name, entries in kinds.items()}

    def marks(self, urls: Sequence[str | None], md5: Sequence[str | None]) -> np.ndarray:
        """Which rows are opted out, bool (n,), by address and by the list's own md5."""
        import numpy as np

        pairs = zip(urls, md5, strict=True)
        return np.fromiter(
            (self.has_url(url) or bool(digest) and digest.lower() in self.md5 for url, digest in pairs), bool
        )

    def has_url(self, url: str | None) -> bool:
        if not url or not (self.urls or self.domains):
            return False
        if (plain := _PLAIN_HOST.match(url)) and (verdict := self._of_host(plain[1])) is not None:
            return verdict
        address, host = bare(url)
        return address in self.urls or self._has_domain(host)

    def _of_host(self, host: str) -> bool | None:
        """Whether all addresses of a host are opted out, or none; None: it depends. Remembered: a release has millions
        of addresses on thousands of hosts, and taking one apart takes ten times as long."""
        known = self._known
        if host not in known:
            if len(known) >= MOST_HOSTS:
                known.clear()
            name = _ascii(host)
            known[host] = True if self._has_domain(name) else None if name in self._hosts else False
        return known[host]

    def _has_domain(self, host: str) -> bool:
        return any(domain in self.domains for domain in _parents(host))

    @functools.cached_property
    def _hosts(self) -> frozenset[str]:
        return frozenset(address.split("/")[0] for address in self.urls)

    @functools.cached_property
    def _known(self) -> dict[str, bool | None]:
        return {}

    def has_sha256(self, digests: Iterable[str | None]) -> bool:
        return any(digest in self.sha256 for digest in digests)


def bare(url: str) -> tuple[str, str]:
    """(host, path and query without scheme, port, user or fragment; the host): so is one address written in many
    ways."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = _ascii(parts.hostname or "")
    except ValueError:  # not a url at all: nothing to compare it by but itself
        return url.strip(), ""
    path = urllib.parse.unquote(parts.path or "/")
    return f"{host}{path}?{parts.query}" if parts.query else f"{host}{path}", host


def _ascii(host: str) -> str:
    host = host.lower().strip(".")
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return host


def _parents(host: str) -> Iterable[str]:
    """a.b.example: itself, b.example, example."""
    labels = host.split(".")
    return (".".join(labels[start:]) for start in range(len(labels)))
