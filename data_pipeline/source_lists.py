"""Link lists from files, CSV, JSON lines or parquet: any LAION release, in any spelling of its columns
(data_pipeline/schema.py).

The list is streamed into one metadata.parquet, columns and rows as they are; only rows whose caption is one of the
held-out prompts (the list's last captions, at most a tenth of it) are left out.
"""

from __future__ import annotations

import glob
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_pipeline import schema
from data_pipeline.source import OUT, fresh_folder, write_prompts
from raphael.config import Config
from raphael.stage import Stage, StageError

SUITE = "captions"
BATCH_ROWS = 65536


def run(config: Config, stage: Stage) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _files(config)
    limit = config.source.max_rows
    work = stage.workdir(
        config.source.kind, *files, config.source.fingerprint, limit, config.source.max_heldout_prompts
    )
    folder = fresh_folder(work)
    total, heldout = _count(config, files, limit)
    if not total:
        raise StageError(f"{config.source.path}: the list is empty; expected rows of links and captions")
    kept, writer, target = 0, None, None
    try:
        with stage.progress(total, "rows") as bar:
            for file, batch, caption in _batches(config.source.kind, files, limit):
                if target is None:
                    target = batch.schema
                    writer = pq.ParquetWriter(folder / "metadata.parquet", target)
                try:
                    table = pa.Table.from_batches([batch]).select(target.names).cast(target)
                except (KeyError, ValueError, pa.ArrowInvalid) as error:
                    names = ", ".join(target.names)
                    raise StageError(
                        f"{file}: columns differ from the first file's ({names}): {' '.join(str(error).split())}"
                    ) from None
                stay = [value not in heldout for value in table[caption].to_pylist()]
                table = table.filter(pa.array(stay))
                writer.write_table(table)
                kept += len(table)
                bar.update(len(batch))
    finally:
        if writer:
            writer.close()
    prompts = [{"prompt": text, "suite": SUITE, "truth": None, "reference": None} for text in heldout]
    write_prompts(folder, config.source.kind, prompts)
    stage.publish(folder, OUT)
    shutil.rmtree(work)
    stage.report(
        total, kept, {"held out for evaluation": total - kept}, kind=config.source.kind, heldout_prompts=len(prompts)
    )


def _files(config: Config) -> list[Path]:
    """The files that source.path names: one file, a folder of them, or a pattern."""
    path = Path(config.source.path)
    suffix = f".{config.source.kind}"
    if path.is_dir():
        files = sorted(path.glob(f"*{suffix}"))
    else:
        files = (
            [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(config.source.path, recursive=True))]
        )
    files = [file for file in files if file.is_file()]
    if not config.source.path or not files:
        raise StageError(
            f"source.path: got {config.source.path!r}, expected a {suffix} file, a folder of them or a pattern; "
            f"set it in {config.file}"
        )
    return files


def _batches(kind: str, files: list[Path], limit: int) -> Iterator[tuple[Path, object, str]]:
    """(file, record batch, name of its caption column), `limit` rows at most (0: all)."""
    import pyarrow as pa

    left = limit or None
    for file in files:
        try:
            for batch in {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}[kind](file):
                caption = schema.find_columns(batch.schema.names)[schema.CAPTION]
                batch = batch if left is None else batch.slice(0, left)
                if len(batch):
                    yield file, batch, caption
                if left is not None:
                    left -= len(batch)
                    if left <= 0:
                        return
        except (pa.ArrowInvalid, ValueError) as error:
            raise StageError(f"{file}: {' '.join(str(error).split())}") from None


def _parquet(file: Path) -> Iterator[object]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as reader:
        yield from reader.iter_batches(BATCH_ROWS)


def _jsonl(file: Path) -> Iterator[object]:
    """One object a line; the keys of the first are the columns, and every value stays a text or a number as it is."""
    import itertools
    import json

    import pyarrow as pa

    target = None
    with open(file, encoding="utf-8-sig") as lines:
        rows = (json.loads(line) for line in lines if line.strip())  # JSONDecodeError is a ValueError
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            if not all(isinstance(row, dict) for row in batch):
                raise ValueError("got a line that is no JSON object, expected one object a line")
            yield pa.RecordBatch.from_pylist(batch, target)
            target = target or pa.RecordBatch.from_pylist(batch).schema


def _csv(file: Path) -> Iterator[object]:
    """UTF-8 (with or without a byte order mark), quoted line breaks allowed, separated by commas or tabs."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    with open(file, encoding="utf-8-sig", errors="replace") as text:
        header = text.readline()
    parse = pacsv.ParseOptions(delimiter="\t" if "\t" in header else ",", newlines_in_values=True)
    names = [name.strip().strip('"') for name in header.rstrip("\r\n").split(parse.delimiter)]
    columns = schema.find_columns(names)  # texts stay texts, even where a first block looks like numbers
    texts = {columns[part]: pa.string() for part in (schema.URL, schema.CAPTION)}
    convert = pacsv.ConvertOptions(column_types=texts, strings_can_be_null=False)
    with pacsv.open_csv(file, parse_options=parse, convert_options=convert) as reader:
        yield from reader


def _count(config: Config, files: list[Path], limit: int) -> tuple[int, dict[str, None]]:
    """The number of rows, and the held-out captions: the last distinct ones (a dict, for its order)."""
    last: deque[str] = deque(maxlen=4 * config.source.max_heldout_prompts)
    total = 0
    for _, batch, caption in _batches(config.source.kind, files, limit):
        total += len(batch)
        last.extend(
            text for text in batch.column(caption).to_pylist()[-last.maxlen :] if text and len(text.strip()) >= 3
        )
    number = min(config.source.max_heldout_prompts, total // 10)
    distinct = list(dict.fromkeys(reversed(last)))[:number]
    return total, dict.fromkeys(reversed(distinct))
