"""Pictures whose owners said no: a list of urls, domains and hashes that `select` and `filter` obey.

A text file (`filter.opt_out` in params.yaml), one entry a line, # begins a comment:

    https://a.example/picture.jpg      this address, whatever its scheme or fragment
    a.example                          every host of this domain
    md5:<32 hex digits>                the picture, where the list has md5 (LAION's *-md5 releases); before the request
    sha256:<64 hex digits>             the picture as it came or as it is stored; after the download
"""

from __future__ import annotations

import functools
import hashlib
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raphael.stage import StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_HASHES = {"md5": re.compile(r"[0-9a-f]{32}"), "sha256": re.compile(r"[0-9a-f]{64}")}
_PLAIN_HOST = r"^(?i:https?)://(?P<host>[A-Za-z0-9.-]+)(?:[/?#]|$)"  # no user, no port, no other letters
_NONE, _ALL, _LOOK = 0, 1, 2  # of a host's addresses: none is opted out, all are, each has to be looked at
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

    def marks(self, urls: pa.Array, md5: pa.Array) -> np.ndarray:
        """Which rows are opted out, bool (n,), by address and by the list's own md5; both columns are of strings, nulls
        allowed. What has_url says of each, but by hosts: only where one has addresses on the list, or is written in an
        unusual way, is the address taken apart, which takes microseconds."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        marked = pc.is_in(pc.ascii_lower(md5), pa.array(sorted(self.md5), pa.string())).to_numpy(zero_copy_only=False)
        if not (self.urls or self.domains):
            return marked
        hosts = pc.struct_field(pc.extract_regex(urls, _PLAIN_HOST), "host").dictionary_encode()
        verdicts = np.array([*map(self._verdict, hosts.dictionary.to_pylist()), _LOOK], np.int8)
        rows = verdicts[hosts.indices.fill_null(-1).to_numpy()]  # no usual host: the last verdict
        looked_at = np.flatnonzero(rows == _LOOK)
        found = [self.has_url(url) for url in urls.take(pa.array(looked_at)).to_pylist()]
        rows[looked_at] = np.where(found, _ALL, _NONE)
        return marked | (rows == _ALL)

    def _verdict(self, host: str) -> int:
        host = _ascii(host)
        if any(domain in self.domains for domain in _parents(host)):
            return _ALL
        return _LOOK if host in self._hosts else _NONE

    @functools.cached_property
    def _hosts(self) -> frozenset[str]:
        return frozenset(address.split("/")[0] for address in self.urls)

    def has_url(self, url: str | None) -> bool:
        if not url or not (self.urls or self.domains):
            return False
        address, host = bare(url)
        return address in self.urls or any(domain in self.domains for domain in _parents(host))

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
