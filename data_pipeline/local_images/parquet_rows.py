"""Parquet files whose rows hold the images themselves, as Hugging Face's data sets have them: a column of
{bytes, path} or of plain bytes, and one of captions. Local, or streamed from any address that fsspec knows (`hf://`).

Captions are read alone first, which costs little of a file; the bytes once, row after row, when `download` packs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_pipeline.common.addresses import files_at
from data_pipeline.common.tables import open_parquet
from data_pipeline.local_images.collection import NO_CAPTION, Captioned, Found
from data_pipeline.local_images.metadata import caption_column, texts
from raphael.base.config.data import SourceConfig
from raphael.base.stage import StageError

if TYPE_CHECKING:
    import pyarrow as pa

CAPTION_ROWS, IMAGE_ROWS = 65536, 64  # rows decoded at a time
BYTES = "bytes"  # of the struct that `datasets` writes


class ParquetRows:
    """Names: <file's name>/<column>/<row>. A file's name has its number before it where two are called alike."""

    def __init__(self, source: SourceConfig):
        self.source = source
        self.expected = "parquet files with a column of images ({bytes, path}, or bytes) and one of captions"
        files = files_at(source.path, ".parquet")
        names = [str(file).replace("\\", "/").rsplit("/", 1)[-1] for file in files]
        if len(set(names)) < len(names):
            names = [f"{number:05d}-{name}" for number, name in enumerate(names)]
        self.files = dict(zip(names, files, strict=True))
        self.reading: tuple[str, str] = ("", "")
        self.rows: Iterator[tuple[int, Any]] = iter(())
        self.ahead: tuple[int, Any] | None = None

    def find(self, dropped: Counter[str]) -> Found:
        rows: list[Captioned] = []
        images, captions = "", ""
        for label, file in self.files.items():
            reader = open_parquet(file)
            schema = reader.schema_arrow
            images = image_column(schema, self.source.image_column, str(file))
            captions = caption_column(schema.names, self.source.caption_column, str(file))
            number = 0
            for batch in reader.iter_batches(CAPTION_ROWS, columns=[captions], use_threads=False):
                for value in batch.column(0).to_pylist():
                    told = texts(value)
                    rows += [Captioned(f"{label}/{images}/{number}", caption) for caption in told]
                    dropped[NO_CAPTION] += not told
                    number += 1
        return Found(rows, None, {"columns": {"image": images, "caption": captions}, "files": len(self.files)})

    def size(self, name: str) -> None:
        return None

    def body(self, name: str) -> bytes | None:
        """None where the row's value is null, or a path without bytes."""
        label, column, row = name.rsplit("/", 2)
        wanted = int(row)
        if label not in self.files:
            return None
        if self.reading != (label, column) or self.ahead is None or self.ahead[0] > wanted:
            self.rows = self._images(label, column)
            self.reading, self.ahead = (label, column), next(self.rows, None)
        while self.ahead is not None and self.ahead[0] < wanted:
            self.ahead = next(self.rows, None)
        if self.ahead is None:
            return None
        value = self.ahead[1].as_py()
        value = value.get(BYTES) if isinstance(value, dict) else value
        return value if isinstance(value, bytes) and value else None

    def close(self) -> None:
        self.rows = iter(())

    def _images(self, label: str, column: str) -> Iterator[tuple[int, Any]]:
        number = 0
        reader = open_parquet(self.files[label])
        for batch in reader.iter_batches(IMAGE_ROWS, columns=[column], use_threads=False):
            for value in batch.column(0):
                yield number, value
                number += 1


def image_column(schema: pa.Schema, asked: str, where: str) -> str:
    """The column of the images. Raises StageError that says what the columns hold, and which kind takes links."""
    import pyarrow as pa

    kinds = {field.name: field.type for field in schema}
    binary = (pa.types.is_binary, pa.types.is_large_binary)

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(part.name == BYTES and holds_images(part.type) for part in kind)
        return any(check(kind) for check in binary)

    found = [name for name, kind in kinds.items() if name == (asked or name) and holds_images(kind)]
    if found:
        return found[0]
    held = ", ".join(f"{name} ({_shown(kind)})" for name, kind in kinds.items())
    text = (pa.types.is_string, pa.types.is_large_string)
    named = (asked,) if asked else ("image", "url", "URL", "image_url", "img")
    links = [name for name in named if name in kinds and any(check(kinds[name]) for check in text)]
    hint = f"; {links[0]} holds texts: a list of links is source.kind parquet" if links else ""
    raise StageError(
        f"{where}: got columns {held}, expected {repr(asked) + ' to hold' if asked else 'one that holds'} images, as "
        f"bytes or as {{bytes, path}}{hint}"
    )


def _shown(kind: pa.DataType) -> str:
    import pyarrow as pa

    return f"{{{', '.join(part.name for part in kind)}}}" if pa.types.is_struct(kind) else str(kind)
