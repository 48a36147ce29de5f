"""The contract of a collection of images.

A collection names each image by a path of its own ("cats/1.jpg", "train.parquet/image/17", "00000.tar/cat.jpg").
`source` writes the names into its list as addresses of a host that does not exist; `download` asks for the bytes by
them. A new kind: a module with a class like these, and a line in data_pipeline/local_images/kinds.py.
"""

from __future__ import annotations

import urllib.parse
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

NO_HOST = "images.invalid"  # where download.local_host names none
NO_CAPTION, UNREADABLE = "no caption", "not a readable picture"
NOT_HERE, OUTSIDE = "picture not in the folder", "leads out of the folder"


@dataclass(frozen=True)
class Captioned:
    """An image with one of its captions. repeats: how often it comes in an epoch, beside others that come once."""

    name: str
    caption: str
    repeats: int = 1


@dataclass(frozen=True)
class Found:
    """rows: in the collection's order, those of an image side by side. heldout: (caption, name) of the prompts that the
    collection sets apart itself; None: `source` chooses. facts: what the report says beside its counts."""

    rows: list[Captioned]
    heldout: list[tuple[str, str]] | None
    facts: dict[str, object]


class Collection(Protocol):
    """expected: what would have been read, for the message where nothing was."""

    expected: str

    def find(self, dropped: Counter[str]) -> Found:
        """Everything with a caption; what has none is counted in `dropped`. Raises StageError."""

    def size(self, name: str) -> tuple[int, int] | None:
        """(width, height) by the image's header; None where that would cost reading it. Raises OSError, ValueError."""

    def body(self, name: str) -> bytes | None:
        """The image's bytes; None where there is none of that name. Names are asked for in the order of `find`."""

    def close(self) -> None: ...


def address_of(host: str, name: str) -> str:
    return f"http://{host or NO_HOST}/{urllib.parse.quote(name)}"


def name_of(address: str) -> str:
    return urllib.parse.unquote(address.split("/", 3)[3])
