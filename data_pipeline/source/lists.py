"""Link lists from files, CSV, JSON lines or parquet: any LAION release, in any spelling of its columns
(data_pipeline/common/schema.py).

`source.path` is a file, a folder or a pattern, on this machine or at any address that fsspec knows
(`hf://datasets/...`, `s3://...`). The list is streamed into one metadata.parquet, columns and rows as they are; only
rows whose caption is one of the held-out prompts (the list's last captions, at most a tenth of it) are left out.
"""

from __future__ import annotations

import io
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common import schema
from data_pipeline.common.addresses import files_at, identity
from data_pipeline.common.places import SOURCE
from data_pipeline.common.tables import open_file, open_parquet, table_writer
from data_pipeline.source.output import fresh_folder, write_prompts
from raphael.base.config.params import Config
from raphael.base.stage import Stage, StageError

if TYPE_CHECKING:
    import pyarrow as pa

SUITE = "captions"
BATCH_ROWS = 65536
MAX_TEXT_BYTES = 1 << 20  # of a url or a caption; all that are kept have some thousand at most
MAX_LINE_CHARS = 4 << 20  # of JSON lines: all columns of a row
BATCH_CHARS = 128 << 20  # of JSON lines that are held at a time
TOO_LONG = "a text beyond 1 MiB"


def run(config: Config, stage: Stage) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    files = files_at(config.source.path, f".{config.source.kind}", config.file)
    limit = config.source.max_rows
    work = stage.workdir(
        config.source.kind, *map(identity, files), config.source.fingerprint, limit, config.source.max_heldout_prompts
    )
    folder = fresh_folder(work)
    total, heldout = _count(config, files, limit)
    if not total:
        raise StageError(f"{config.source.path}: the list is empty; expected rows of links and captions")
    kept, long, writer, target = 0, 0, None, None
    try:
        with stage.progress(total, "rows") as bar:
            for file, batch, caption in _batches(config.source.kind, files, limit):
                if target is None:
                    target = batch.schema
                    writer = table_writer(folder / "metadata.parquet", target)
                try:
                    table = pa.Table.from_batches([batch]).select(target.names).cast(target)
                except (KeyError, ValueError, pa.ArrowInvalid) as error:
                    names = ", ".join(target.names)
                    raise StageError(
                        f"{file}: columns differ from the first file's ({names}): {' '.join(str(error).split())}"
                    ) from None
                whole = _is_short(table, caption)
                if not pc.all(whole).as_py():
                    table = table.filter(whole)
                    long += len(batch) - len(table)
                table = table.filter(pc.invert(pc.is_in(table[caption], pa.array(list(heldout), table[caption].type))))
                writer.write_table(table)
                kept += len(table)
                bar.update(len(batch))
    finally:
        if writer:
            writer.close()
    prompts = [{"prompt": text, "suite": SUITE, "truth": None, "reference": None} for text in heldout]
    write_prompts(folder, config.source.kind, prompts)
    stage.publish(folder, SOURCE)
    shutil.rmtree(work)
    stage.report(
        total, kept, {"held out for evaluation": total - kept - long, TOO_LONG: long},
        kind=config.source.kind, heldout_prompts=len(prompts),
    )  # fmt: skip


def _is_short(table: pa.Table, caption: str) -> pa.ChunkedArray:
    """Where url and caption have at most MAX_TEXT_BYTES. A caption of 100 MB, once let in, is copied by every stage."""
    import pyarrow.compute as pc

    url = schema.find_columns(table.schema.names)[schema.URL]
    short = (_bytes(table[name]) for name in (url, caption))
    return pc.and_(*(pc.less_equal(length, MAX_TEXT_BYTES) for length in short))


def _bytes(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The length of each text; 0 of a null, and of what is no text: `select` judges those."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_text = any(check(texts.type) for check in (pa.types.is_string, pa.types.is_large_string))
    return pc.fill_null(pc.binary_length(texts), 0) if is_text else pa.chunked_array([[0] * len(texts)], pa.int32())


def _batches(
    kind: str, files: list[Path | str], limit: int, captions_alone: bool = False
) -> Iterator[tuple[Path | str, object, str]]:
    """(file, record batch, name of its caption column), `limit` rows at most (0: all). captions_alone: of a parquet
    file nothing else is decoded."""
    import pyarrow as pa

    left = limit or None
    for file in files:
        try:
            read = {"parquet": lambda file: _parquet(file, captions_alone), "csv": _csv, "jsonl": _jsonl}[kind]
            for batch in read(file):
                caption = schema.find_columns(batch.schema.names)[schema.CAPTION]
                batch = batch if left is None else batch.slice(0, left)
                if len(batch):
                    yield file, batch, caption
                if left is not None:
                    left -= len(batch)
                    if left <= 0:
                        return
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise StageError(f"{file}: {_words(str(error))}") from None


def _words(error: str) -> str:
    if "straddling" in error:  # pyarrow's word for a row that is larger than what it reads at a time
        return "a row of more than 1 MiB, or a quote that is never closed, expected rows of some kB: take it out"
    return " ".join(error.split())[:400]


def _parquet(file: Path | str, captions_alone: bool) -> Iterator[object]:
    with open_parquet(file) as reader:
        names = reader.schema_arrow.names
        columns = schema.find_columns(names)
        few = [columns[schema.URL], columns[schema.CAPTION]]  # both, since who reads the batch asks for both
        yield from reader.iter_batches(BATCH_ROWS, columns=few if captions_alone else names)


def _jsonl(file: Path) -> Iterator[object]:
    """One object a line; the keys of the first are the columns, and every value stays a text or a number as it is."""
    import pyarrow as pa

    target = None
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig") as lines:
        rows = _objects(lines)
        while batch := _next_rows(rows):
            made = pa.RecordBatch.from_pylist(batch, target)
            target = target or made.schema
            yield made


def _objects(lines: io.TextIOWrapper) -> Iterator[tuple[int, dict]]:
    """(characters, object) of each line that is not empty. Raises ValueError with the line's number."""
    import json

    number = 0
    while line := lines.readline(MAX_LINE_CHARS + 1):
        number += 1
        if len(line) > MAX_LINE_CHARS:
            raise ValueError(f"line {number}: got more than {MAX_LINE_CHARS:,} characters, expected a row of some kB")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise ValueError(f"line {number}: got lists in lists beyond all reason, expected an object") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError("got a line that is no JSON object, expected one object a line")
        yield len(line), row


def _next_rows(rows: Iterator[tuple[int, dict]]) -> list[dict]:
    """As many as a batch has; fewer where they are long."""
    batch, chars = [], 0
    for size, row in rows:
        batch.append(row)
        chars += size
        if len(batch) == BATCH_ROWS or chars > BATCH_CHARS:
            break
    return batch


def _csv(file: Path) -> Iterator[object]:
    """UTF-8 (with or without a byte order mark), quoted line breaks allowed, separated by commas or tabs."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig", errors="replace") as text:
        header = text.readline()
    parse = pacsv.ParseOptions(delimiter="\t" if "\t" in header else ",", newlines_in_values=True)
    names = [name.strip().strip('"') for name in header.rstrip("\r\n").split(parse.delimiter)]
    columns = schema.find_columns(names)  # texts stay texts, even where a first block looks like numbers
    texts = {columns[part]: pa.string() for part in (schema.URL, schema.CAPTION)}
    convert = pacsv.ConvertOptions(column_types=texts, strings_can_be_null=False)
    with open_file(file) as binary, pacsv.open_csv(binary, parse_options=parse, convert_options=convert) as reader:
        yield from reader


def _count(config: Config, files: list[Path | str], limit: int) -> tuple[int, dict[str, None]]:
    """The number of rows, and the held-out captions: the last distinct ones (a dict, for its order)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    last: deque[str] = deque(maxlen=4 * config.source.max_heldout_prompts)
    total = 0
    for _, batch, caption in _batches(config.source.kind, files, limit, captions_alone=True):
        total += len(batch)
        if last.maxlen:
            tail = pa.chunked_array([batch.column(caption)[-last.maxlen :]])
            short = tail.filter(pc.less_equal(_bytes(tail), MAX_TEXT_BYTES))  # before any becomes a text of Python's
            last.extend(text for text in short.to_pylist() if text and len(text.strip()) >= 3)
    number = min(config.source.max_heldout_prompts, total // 10)
    distinct = list(dict.fromkeys(reversed(last)))[:number]
    return total, dict.fromkeys(reversed(distinct))
