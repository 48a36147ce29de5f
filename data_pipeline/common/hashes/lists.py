"""Lists of hashes of images that nobody may have: what is on one is refused before anything of it is stored.

Text files (`download.hash_lists`), one entry a line, # begins a comment; bare digits are taken by their number, as
hotlines and platforms hand such lists out:

    md5:<32 hex digits>, <32 hex digits>         of the bytes as they came
    sha256:<64 hex digits>, <64 hex digits>      of the bytes as they came
    phash:<16 hex digits>, <16 hex digits>       of what is seen: imagehash's phash, but for `hash_list_bits`
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raphael.base.stage import StageError

if TYPE_CHECKING:
    import numpy as np

ON_LIST = "on a hash list"
KINDS = {"phash": 16, "md5": 32, "sha256": 64}  # hex digits
_BY_DIGITS = {digits: kind for kind, digits in KINDS.items()}
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class HashLists:
    md5: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()
    phash: frozenset[str] = frozenset()
    fingerprint: str = ""  # of the entries; "" without any

    @classmethod
    def read(cls, paths: Sequence[str]) -> HashLists:
        """Raises StageError, with file and line, for a file that is absent or an entry of no known kind: a list that is
        read in part protects nobody."""
        found: dict[str, set[str]] = {kind: set() for kind in KINDS}
        for path in paths:
            try:
                text = Path(path).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise StageError(f"download.hash_lists: {path}: {error}; expected a text file of hashes") from None
            for number, line in enumerate(text.splitlines(), 1):
                entry = line.split("#")[0].strip().lower()
                if not entry:
                    continue
                named, colon, digits = entry.rpartition(":")
                kind = named if colon else _BY_DIGITS.get(len(digits), "")
                if KINDS.get(kind) != len(digits) or not _HEX.fullmatch(digits):
                    raise StageError(
                        f"{path}:{number}: got {entry[:80]!r}, expected md5:, sha256: or phash: and 32, 64 or 16 hex "
                        "digits, or the digits alone"
                    )
                found[kind].add(digits)
            if not any(found.values()):
                raise StageError(f"download.hash_lists: {path}: got no entry, expected hashes; take it out of the list")
        frozen = {kind: frozenset(entries) for kind, entries in found.items()}
        return cls(**frozen, fingerprint=_fingerprint(frozen) if paths else "")

    def has_bytes(self, body: bytes) -> bool:
        """Whether an image as it came is on a list. A body of 200 kB costs 0.4 ms."""
        if self.md5 and hashlib.md5(body, usedforsecurity=False).hexdigest() in self.md5:
            return True
        return bool(self.sha256) and hashlib.sha256(body).hexdigest() in self.sha256

    def has_phash(self, phash: np.ndarray, bits: int) -> bool:
        """phash: uint64 (1,). bits: how many of its 64 may differ from an entry."""
        from data_pipeline.common.hashes.phash import near_any

        return bool(len(self._phashes)) and bool(near_any(phash, self._phashes, bits)[0])

    @functools.cached_property
    def _phashes(self) -> np.ndarray:
        import numpy as np

        return np.array(sorted(int(digits, 16) for digits in self.phash), np.uint64)

    def summary(self) -> dict[str, int]:
        return {kind: len(getattr(self, kind)) for kind in KINDS}


def _fingerprint(entries: dict[str, frozenset[str]]) -> str:
    digest = hashlib.sha256()
    for kind in KINDS:
        digest.update("\n".join([kind, *sorted(entries[kind])]).encode())
    return digest.hexdigest()
