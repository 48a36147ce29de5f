"""Link lists from files, CSV, JSON lines or parquet: any LAION release, in any spelling of its columns
(data_pipeline/schema.py).

`source.path` is a file, a folder or a pattern, on this machine or at any address that fsspec knows
(`hf://datasets/...`, `s3://...`). The list is streamed into one metadata.parquet, columns and rows as they are; only
rows whose caption is one of the held-out prompts (the list's last captions, at most a tenth of it) are left out.
"""

from __future__ import annotations

import glob
import io
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_pipeline import schema
from data_pipeline.source import OUT, fresh_folder, write_prompts
from data_pipeline.tables import is_remote, open_file, open_parquet
from raphael.config import Config
from raphael.stage import Stage, StageError

SUITE = "captions"
BATCH_ROWS = 65536


def run(config: Config, stage: Stage) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = _files(config)
    limit = config.source.max_rows
    work = stage.workdir(
        config.source.kind, *map(_identity, files), config.source.fingerprint, limit, config.source.max_heldout_prompts
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
                table = table.filter(pc.invert(pc.is_in(table[caption], pa.array(list(heldout), table[caption].type))))
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


def _files(config: Config) -> list[Path | str]:
    """The files that source.path names: one file, a folder of them, or a pattern. Remote ones are addresses."""
    suffix, address = f".{config.source.kind}", config.source.path
    if is_remote(address):
        files = _remote_files(address, suffix)
    else:
        path = Path(address)
        if path.is_dir():
            files = sorted(path.glob(f"*{suffix}"))
        else:
            files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(address, recursive=True))]
        files = [file for file in files if file.is_file()]
    if not address or not files:
        raise StageError(
            f"source.path: got {address!r}, expected a {suffix} file, a folder of them or a pattern; "
            f"set it in {config.file}"
        )
    return files


def _remote_files(address: str, suffix: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        if "*" in path:
            found = sorted(system.glob(path))
        elif address.startswith(("http://", "https://")) or system.isfile(path):
            return [address]  # a web server has no folders
        else:
            found = sorted(name for name in system.ls(path, detail=False) if name.endswith(suffix))
    except (OSError, ImportError, ValueError) as error:  # ValueError: no such protocol
        raise StageError(f"source.path: {address}: {' '.join(str(error).split())}") from None
    return [system.unstrip_protocol(name) for name in found]


def _identity(file: Path | str) -> object:
    """What a finished piece of work on a file belongs to: a path's content, an address's size, time and tag."""
    if not is_remote(file):
        return file
    import fsspec

    system, path = fsspec.core.url_to_fs(str(file))
    facts = {name.lower(): str(value) for name, value in system.info(path).items()}
    return [
        str(file),
        *(facts.get(name, "") for name in ("size", "etag", "sha256", "mtime", "created", "lastmodified")),
    ]


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
        except (pa.ArrowInvalid, ValueError) as error:
            raise StageError(f"{file}: {' '.join(str(error).split())}") from None


def _parquet(file: Path | str, captions_alone: bool) -> Iterator[object]:
    with open_parquet(file) as reader:
        names = reader.schema_arrow.names
        columns = schema.find_columns(names)
        few = [columns[schema.URL], columns[schema.CAPTION]]  # both, since who reads the batch asks for both
        yield from reader.iter_batches(BATCH_ROWS, columns=few if captions_alone else names)


def _jsonl(file: Path) -> Iterator[object]:
    """One object a line; the keys of the first are the columns, and every value stays a text or a number as it is."""
    import itertools
    import json

    import pyarrow as pa

    target = None
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig") as lines:
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
    last: deque[str] = deque(maxlen=4 * config.source.max_heldout_prompts)
    total = 0
    for _, batch, caption in _batches(config.source.kind, files, limit, captions_alone=True):
        total += len(batch)
        tail = batch.column(caption)[-last.maxlen :] if last.maxlen else []
        last.extend(text for text in (value.as_py() for value in tail) if text and len(text.strip()) >= 3)
    number = min(config.source.max_heldout_prompts, total // 10)
    distinct = list(dict.fromkeys(reversed(last)))[:number]
    return total, dict.fromkeys(reversed(distinct))
