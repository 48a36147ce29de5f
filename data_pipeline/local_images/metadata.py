"""metadata.jsonl, metadata.csv and metadata.parquet of Hugging Face's imagefolder: file names and captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.common.schema import ALIASES, CAPTION
from raphael.base.stage import StageError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
CAPTION_NAMES = (*ALIASES[CAPTION], "prompt")
MAX_LINE_CHARS = 4 << 20


def caption_rows(file: Path, column: str = "") -> Iterator[tuple[str, list[str]]]:
    """(file name as it is written, captions) of each row; column: of the captions, "": the first of CAPTION_NAMES.

    Raises StageError, one line with the row's number, where a row is broken or a column is absent.
    """
    chosen = ""
    for number, row in enumerate(_rows(file), 1):
        if not chosen:
            chosen = caption_column(row, column, str(file))
            if FILE_NAME not in row:
                raise StageError(f"{file}: got columns {', '.join(map(str, row))}, expected one called {FILE_NAME}")
        name = row.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise StageError(f"{file}: row {number}: got {FILE_NAME} {name!r}, expected the name of an image")
        if "://" in name:
            raise StageError(
                f"{file}: row {number}: got a link, {name[:80]!r}, expected a file's name; a list of links is "
                "source.kind jsonl, csv or parquet"
            )
        yield name, texts(row.get(chosen))


def caption_column(names: Iterable[str], asked: str, where: str) -> str:
    """The column of the captions. Raises StageError that names the columns there are."""
    names = list(names)
    found = next((name for name in ([asked] if asked else CAPTION_NAMES) if name in names), None)
    if found is None:
        expected = repr(asked) if asked else f"one of {', '.join(CAPTION_NAMES)}; source.caption_column names another"
        raise StageError(f"{where}: got columns {', '.join(map(str, names))}, expected {expected}")
    return found


def texts(value: Any) -> list[str]:
    """Captions in a value: a text, or a list of texts; spaces and line breaks become single spaces."""
    values = value if isinstance(value, list) else [value]
    return [words for text in values if isinstance(text, str) and (words := " ".join(text.split()))]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        from data_pipeline.common.tables import open_parquet

        for batch in open_parquet(file).iter_batches():
            yield from batch.to_pylist()
    elif file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as text:
            try:
                yield from csv.DictReader(text)
            except csv.Error as error:
                raise StageError(f"{file}: not a table of comma-separated values ({error})") from None
    else:
        yield from _json_lines(file)


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_CHARS):
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise StageError(f"{file}: line {number}: not JSON ({error}); expected one object a line") from None
            if not isinstance(row, dict):
                raise StageError(f"{file}: line {number}: got {type(row).__name__}, expected one object a line")
            yield row
