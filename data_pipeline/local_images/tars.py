"""Tars in webdataset's form, img2dataset's output among them: members of one name up to the first dot belong together,
an image, and its caption in .txt or in a column of .json. Members are read where they lie; nothing is extracted."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_pipeline.common.addresses import files_at, one_line
from data_pipeline.common.places import IMAGE_FORMATS, IMAGE_SUFFIXES
from data_pipeline.common.tables import open_file
from data_pipeline.local_images.collection import NO_CAPTION, Captioned, Found
from data_pipeline.local_images.metadata import CAPTION_NAMES, texts
from raphael.base.config.data import SourceConfig
from raphael.base.stage import StageError

NO_IMAGE = "no picture beside the caption"
MAX_TEXT_BYTES = 4 << 20
MOST_BODY_BYTES = 256 << 20  # of an image that is read at all, above any limit of `download`


class Tars:
    """Names: <tar's name>/<member's name>."""

    expected = "tars whose members are images with a .txt or .json of the same name (webdataset's form)"

    def __init__(self, source: SourceConfig):
        self.source = source
        files = files_at(source.path, ".tar")
        names = [str(file).replace("\\", "/").rsplit("/", 1)[-1] for file in files]
        if len(set(names)) < len(names):
            names = [f"{number:05d}-{name}" for number, name in enumerate(names)]
        self.files = dict(zip(names, files, strict=True))
        self.label = ""
        self.tar: tarfile.TarFile | None = None
        self.members: dict[str, tarfile.TarInfo] = {}

    def find(self, dropped: Counter[str]) -> Found:
        rows: list[Captioned] = []
        for label in self.files:
            self._open(label)
            for image, captions in self._samples():
                if not image:
                    dropped[NO_IMAGE] += 1
                elif not captions:
                    dropped[NO_CAPTION] += 1
                rows += [Captioned(f"{label}/{image}", caption) for caption in captions if image]
        return Found(rows, None, {"files": len(self.files)})

    def size(self, name: str) -> tuple[int, int] | None:
        from PIL import Image

        label, member = name.split("/", 1)
        self._open(label)
        with Image.open(self.tar.extractfile(self.members[member]), formats=IMAGE_FORMATS) as image:
            return image.size

    def body(self, name: str) -> bytes | None:
        label, member = name.split("/", 1)
        if label not in self.files:
            return None
        self._open(label)
        return self._read(self.members[member]) if member in self.members else None

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
        self.tar, self.label = None, ""

    def _open(self, label: str) -> None:
        if self.label == label:
            return
        self.close()
        file = self.files[label]
        try:
            self.tar = tarfile.open(fileobj=open_file(file))
            # a sparse member is a kilobyte that says it is a terabyte; no writer of data sets makes one
            members = (member for member in self.tar if member.isfile() and not member.issparse())
            self.members = {member.name: member for member in members}
        except (tarfile.TarError, EOFError, OSError) as error:
            raise StageError(f"{file}: not a whole tar ({one_line(error)}); make it again") from None
        self.label = label

    def _samples(self) -> Iterator[tuple[str, list[str]]]:
        """(member that is the image, "" where there is none; captions), in the order of the tar."""
        samples: dict[str, dict[str, str]] = {}
        for name in self.members:
            folder, _, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            samples.setdefault(f"{folder}/{key}", {})[extension.lower()] = name
        for parts in samples.values():
            images = [name for extension, name in parts.items() if f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES]
            if images or {"txt", "json"} & set(parts):
                yield images[0] if images else "", self._captions(parts)

    def _captions(self, parts: dict[str, str]) -> list[str]:
        if "json" in parts and (self.source.caption_column or "txt" not in parts):
            try:
                facts: Any = json.loads(self._text(parts["json"]))
            except (ValueError, RecursionError):
                return []
            names = [self.source.caption_column] if self.source.caption_column else CAPTION_NAMES
            found = [texts(facts[name]) for name in names if isinstance(facts, dict) and name in facts]
            return found[0] if found else []
        return texts(self._text(parts["txt"])) if "txt" in parts else []

    def _text(self, member: str) -> str:
        info = self.members[member]
        if info.size > MAX_TEXT_BYTES:
            return ""
        return self._read(info).decode("utf-8-sig", errors="replace")

    def _read(self, member: tarfile.TarInfo) -> bytes:
        body = self.tar.extractfile(member).read(MOST_BODY_BYTES)
        if len(body) < min(member.size, MOST_BODY_BYTES):
            raise StageError(f"{self.files[self.label]}: ends within {member.name}; make it again")
        return body
