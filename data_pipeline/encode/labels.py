"""The field label: which class an image is of, read from a caption or from a column of the list.

A caption is what every data set has, and nothing has to be carried through six stages for it: of drawn scenes
`encode.label_pattern: '\\b(circle|square|star)\\b'` labels the images of one object by its shape. A list that has
classes names its column in `encode.label_column`; a row's place in the list is its id, which the shards' tables hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.common.caption_rows import CaptionRow, CaptionRows
from data_pipeline.common.places import CAPTIONS, METADATA, SHARDS
from data_pipeline.common.schema import ID, KEY
from data_pipeline.common.tables import open_parquet
from raphael.base.config.data import EncodeConfig
from raphael.base.records import LABEL, NO_LABEL
from raphael.base.stage import StageError

BATCH_ROWS = 65536
MOST_CLASSES = 0.9  # an image: a column with more has names or addresses, not classes


@dataclass(frozen=True)
class Labels:
    """values: int32 (n,) of the rows in the order of their keys: a place in `classes`, or NO_LABEL."""

    values: np.ndarray
    classes: tuple[str, ...]
    source: str

    def facts(self) -> dict[str, Any]:
        counts = np.bincount(self.values[self.values != NO_LABEL], minlength=len(self.classes))
        classes, unlabelled = list(self.classes), int((self.values == NO_LABEL).sum())
        return {LABEL: {"from": self.source, "classes": classes, "counts": counts.tolist(), "without": unlabelled}}


def read_labels(config: EncodeConfig, rows: CaptionRows) -> Labels:
    """The labels of all rows; classes in the order of their names, numbers by size. Memory: 4 bytes a row, and of the
    list where a column is read. Raises StageError where there are fewer than two classes, or nearly one for each image.
    """
    if config.label_pattern:
        setting, source = "encode.label_pattern", f"captions, {config.label_pattern}"
        codes, names = _of_captions(config.label_pattern, rows)
    else:
        setting, source = "encode.label_column", f"column {config.label_column}"
        codes, names = _of_column(config.label_column, rows)
    used = np.unique(codes[codes != NO_LABEL])
    order = sorted(used.tolist(), key=lambda code: _by_name(names[code]))
    classes = tuple(names[code] for code in order)
    labelled = int((codes != NO_LABEL).sum())
    if len(classes) < 2 or len(classes) > MOST_CLASSES * labelled:
        shown = ", ".join(map(repr, classes[:3])) + (", ..." if len(classes) > 3 else "")
        columns = f"; columns: {', '.join(_columns())}" if config.label_column else ""
        raise StageError(
            f"{setting}: got {len(classes)} classes ({shown or 'none'}) for {labelled} of {len(rows)} images, expected "
            f"two or more, of several images each{columns}"
        )
    places = np.full(len(names) + 1, NO_LABEL, np.int32)  # the last: NO_LABEL, which is -1
    places[order] = np.arange(len(order))
    return Labels(places[codes], classes, source)


def _by_name(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _of_captions(pattern: str, rows: CaptionRows) -> tuple[np.ndarray, list[str]]:
    """(codes int32 (n,), names in lower case): of captions in which the pattern is found exactly once."""
    expression, codes, names = re.compile(pattern, re.IGNORECASE), np.full(len(rows), NO_LABEL, np.int32), {}
    for number, row in enumerate(rows):
        found = [match.group(expression.groups) for match in expression.finditer(row.caption)]
        if len(found) == 1 and found[0]:
            codes[number] = names.setdefault(found[0].lower(), len(names))
    return codes, list(names)


def _columns() -> list[str]:
    return open_parquet(METADATA).schema_arrow.names


def _of_column(column: str, rows: CaptionRows) -> tuple[np.ndarray, list[str]]:
    """(codes int32 (n,), names): what the list says of each row; NO_LABEL where it is null or empty."""
    if column not in _columns():
        raise StageError(
            f"encode.label_column: got {column!r}, expected a column of {METADATA}: {', '.join(_columns())}"
        )
    listed, names = _coded(column)
    ids = np.fromiter(list_ids(rows), np.int64, len(rows))
    if len(ids) and ids.max() >= len(listed):
        raise StageError(f"{CAPTIONS}: got rows of another list than {METADATA}; run the stages from select on again")
    return listed[ids], names


def _coded(column: str) -> tuple[np.ndarray, list[str]]:
    """A column of the list as codes int32 (rows,), and what each stands for, as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names: dict[str, int] = {}
    parts = [np.empty(0, np.int32)]
    for batch in open_parquet(METADATA).iter_batches(BATCH_ROWS, columns=[column]):
        try:
            texts = pc.utf8_trim_whitespace(pc.cast(batch.column(0), pa.string())).dictionary_encode()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            kind = batch.schema.field(0).type
            raise StageError(f"encode.label_column: got {column!r} of type {kind}, expected texts or numbers") from None
        here = [names.setdefault(text, len(names)) if text else NO_LABEL for text in texts.dictionary.to_pylist()]
        indices = pc.fill_null(texts.indices, len(here)).to_numpy(zero_copy_only=False)
        parts.append(np.array([*here, NO_LABEL], np.int32)[indices])
    return np.concatenate(parts), list(names)


def list_ids(rows: CaptionRows) -> Iterator[int]:
    """The place of each row in the list, from the table beside its shard."""
    shard, ids = "", {}
    for row in rows:
        if row.shard != shard:
            shard = row.shard
            path = SHARDS / f"{shard.removesuffix('.tar')}.parquet"
            table = open_parquet(path).read([KEY, ID])
            ids = dict(zip(table[KEY].to_pylist(), table[ID].to_pylist(), strict=True))
        yield _id_of(row, ids)


def _id_of(row: CaptionRow, ids: dict[str, int]) -> int:
    if row.key not in ids:
        raise StageError(f"{CAPTIONS}: got the key {row.key}, which shard {row.shard} has not; run filter and captions")
    return ids[row.key]
