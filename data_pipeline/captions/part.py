"""Consecutive captions cleaned into one file: a task of data_pipeline/engine, and the worker that does it.

The file is in Arrow's own format, a batch for every CHUNK_ROWS rows that were read; what was dropped and changed stands
in its schema's metadata. The stage writes the batches one after the other, so that its table is the same however many
parts there were.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.caption_rules import clean, drop_reason
from data_pipeline.common.schema import CAPTION, CAPTION_COLUMNS, HEIGHT, KEY, WIDTH
from raphael.base.files import written_whole

if TYPE_CHECKING:
    import pyarrow as pa

    from raphael.base.config.data import CaptionsConfig

CHUNK_ROWS = 16384
PART_ROWS = 8 * CHUNK_ROWS  # some seconds of work
NUM_EXAMPLES = 5
FOUND = b"found"


@dataclass(frozen=True)
class Part:
    """The rows [start, start + count) of the table."""

    done: Path
    start: int
    count: int


@dataclass
class Found:
    """What became of captions: dropped and changed_by by reason, how many changed; of each rule the first caption, in
    the order of the keys, before and after."""

    kept: int = 0
    changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed_by: Counter[str] = field(default_factory=Counter)
    by_rule: dict[str, dict[str, Any]] = field(default_factory=dict)

    def offer(self, key: str, before: str, after: str | None, reasons: tuple[str, ...]) -> None:
        for reason in reasons:
            self.by_rule.setdefault(reason, {"key": key, "before": before, "after": after, "rule": reason})

    def join(self, later: Found) -> None:
        """Add those of rows that come after these."""
        self.kept, self.changed = self.kept + later.kept, self.changed + later.changed
        self.dropped.update(later.dropped)
        self.changed_by.update(later.changed_by)
        for rule, example in later.by_rule.items():
            self.by_rule.setdefault(rule, example)

    def examples(self) -> list[dict[str, Any]]:
        """The first caption of each rule, each caption once."""
        shown: dict[str, dict[str, Any]] = {}
        for example in self.by_rule.values():
            shown.setdefault(example["key"], example)
        return list(shown.values())[:NUM_EXAMPLES]


def captions_schema() -> pa.Schema:
    import pyarrow as pa

    numbers = {WIDTH: pa.int32(), HEIGHT: pa.int32()}
    return pa.schema([(name, numbers.get(name, pa.string())) for name in CAPTION_COLUMNS])


class Cleaner:
    """A worker. table: absolute, with CAPTION_COLUMNS; chunk_rows: of a batch in a part's file."""

    def __init__(self, table: Path, settings: CaptionsConfig, chunk_rows: int):
        self.table, self.settings, self.chunk_rows = table, settings, chunk_rows

    def __call__(self, part: Part) -> Path:
        import pyarrow as pa

        found, schema = Found(), captions_schema()
        batches = [pa.RecordBatch.from_pylist(self._cleaned(rows, found), schema) for rows in self._rows(part)]
        said = json.dumps(vars(found), ensure_ascii=False).encode()
        told = schema.with_metadata({FOUND: said})
        with written_whole(part.done) as temporary, pa.OSFile(str(temporary), "wb") as file:
            with pa.ipc.new_file(file, told, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
                for batch in batches:
                    writer.write_batch(batch.replace_schema_metadata(told.metadata))
        return part.done

    def _rows(self, part: Part) -> Iterator[list[dict[str, Any]]]:
        """The part's rows, chunk_rows at a time; of the row groups that hold any, nothing else is decoded."""
        import pyarrow as pa

        from data_pipeline.common.tables import open_parquet

        with open_parquet(self.table) as file:
            groups, skipped, row = [], 0, 0
            for group in range(file.metadata.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if row < part.start + part.count and end > part.start:
                    skipped = part.start - row if not groups else skipped
                    groups.append(group)
                row = end
            read = file.iter_batches(batch_size=self.chunk_rows, row_groups=groups, columns=list(CAPTION_COLUMNS))
            rows = pa.Table.from_batches(list(read)).slice(skipped, part.count)
        for start in range(0, part.count, self.chunk_rows):
            yield rows.slice(start, self.chunk_rows).to_pylist()

    def _cleaned(self, rows: list[dict[str, Any]], found: Found) -> list[dict[str, Any]]:
        """Those that are kept, counted with the others in `found`."""
        kept = []
        for row in rows:
            cleaned = clean(row[CAPTION])
            if reason := drop_reason(cleaned, self.settings):
                found.dropped[reason] += 1
                found.offer(row[KEY], row[CAPTION], None, (reason,))
                continue
            found.changed_by.update(cleaned.reasons)
            found.changed += cleaned.text != row[CAPTION]
            found.offer(row[KEY], row[CAPTION], cleaned.text, cleaned.reasons)
            kept.append({**row, CAPTION: f"{self.settings.prefix} {cleaned.text}".strip()})
        found.kept += len(kept)
        return kept


def read_part(path: Path) -> tuple[Found, Iterator[pa.Table]]:
    """What a part's file says, and its rows, batch by batch, as they were written."""
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    said = json.loads(reader.schema.metadata[FOUND])
    found = Found(**{**said, "dropped": Counter(said["dropped"]), "changed_by": Counter(said["changed_by"])})
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    return found, (pa.Table.from_batches([batch.replace_schema_metadata(None)]) for batch in batches)
