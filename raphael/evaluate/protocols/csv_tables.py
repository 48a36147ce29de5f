"""Tables of texts as the public has them, CSV or TSV: read row by row, each error one line with file and row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from raphael.base.stage import StageError

TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


class Table:
    """`columns`, and by iteration a dict for each row. Raises StageError."""

    def __init__(self, source: Path, what: str, tabs: bool = False):
        """what: the file that is expected, for the messages. Texts are UTF-8, with or without a byte order mark."""
        self.source, self.what = source, what
        try:
            text = source.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise StageError(f"{source}: no such file; expected {what}") from None
        except UnicodeDecodeError as error:
            raise StageError(f"{source}: not UTF-8 ({error}); expected {what}") from None
        self.reader = csv.DictReader(io.StringIO(text, newline=""), **(TABS if tabs else {}))
        try:
            self.columns = list(self.reader.fieldnames or [])
        except csv.Error as error:
            raise self._broken(error) from None

    def __iter__(self) -> Iterator[dict[str, str]]:
        try:
            yield from self.reader
        except csv.Error as error:  # a cell of more than 131,072 characters, a NUL
            raise self._broken(error) from None

    def _broken(self, error: csv.Error) -> StageError:
        return StageError(f"{self.source}: line {self.reader.line_num + 1}: {error}; expected {self.what}")

    def need(self, *columns: str) -> None:
        for column in columns:
            if column not in self.columns:
                raise StageError(f"{self.source}: has no column {column!r}, got {', '.join(self.columns) or 'none'}")
