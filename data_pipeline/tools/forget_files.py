"""Files under data/ written again without what is to be forgotten: each beside its place, then renamed over it.

A file that holds nothing of it is not touched, so that a second run changes nothing, and neither does one that resumes
where another was killed. DVC may have linked the file to its cache: renaming leaves the cached bytes alone.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.tools.forget_matches import PARTIAL, Gone, is_list, tar_samples, traces
from raphael.base.files import put
from raphael.base.integrity import published
from raphael.base.manifest import NAME, read_manifest
from raphael.base.record_files.stored import RECORDS as STORED
from raphael.base.record_files.stored import Shipping, address_of, withdraw
from raphael.base.records import FORM, KEYS, Records, RecordWriter
from raphael.base.stage import StageError, file_sha256, write_json

CAPTIONS, RECORDS = Path("captions/captions.parquet"), Path("records")
CAPTIONS_FILE = "captions.json"  # of the records, beside their manifest
READ_RECORDS = 1024


def remove(data: Path, gone: Gone, work: Path, files: list[Path]) -> None:
    """Rewrite `files`, and the records where they hold a forgotten key. work: for the records while they are made.

    Raises StageError for a file with traces that nobody knows how to rewrite.
    """
    for left in data.rglob(f"*{PARTIAL}"):
        left.unlink()  # of a killed run
    for path in files:
        if RECORDS in path.relative_to(data).parents:
            continue
        if not traces(path, gone):
            continue
        writer = WRITERS.get(path.suffix)
        if writer is None:
            raise StageError(f"{path}: holds what is to be forgotten and is no table, tar, zip or JSON; delete it")
        partial = path.with_name(f".{path.name}{PARTIAL}")
        writer(path, partial, gone)
        put(partial, path)
        published.note_again(Path.cwd(), path.absolute())
    remove_records(data, gone, work)


def _parquet(path: Path, out: Path, gone: Gone) -> None:
    """Rows leave, but in the list itself they become empty: an id is a row's place there, and others keep theirs."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from data_pipeline.common.tables import table_writer

    first = 0 if is_list(path) else None
    with pq.ParquetFile(path) as file, table_writer(out, file.schema_arrow, compression="zstd") as writer:
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group)
            stays = pa.array(~gone.rows(table, first))
            if first is None:
                writer.write_table(table.filter(stays))
                continue
            first += len(table)
            columns = [pc.if_else(stays, column, pa.scalar(None, column.type)) for column in table.columns]
            writer.write_table(pa.table(columns, schema=table.schema))


def _tar(path: Path, out: Path, gone: Gone) -> None:
    """The other members as they were, in their order."""
    samples = tar_samples(path, gone)
    with tarfile.open(path) as source, tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as target:
        for member in source:
            if member.name.partition(".")[0] not in samples:
                target.addfile(member, source.extractfile(member) if member.isfile() else None)


def _zip(path: Path, out: Path, gone: Gone) -> None:
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            if gone.on_site(info.filename):
                continue
            body = source.read(info)
            if info.filename.endswith(".json"):
                value = pruned(json.loads(body), lambda text: gone.in_text(text) or gone.on_site(text))
                body = json.dumps(value).encode()
            target.writestr(info, body, info.compress_type)


def _json(path: Path, out: Path, gone: Gone) -> None:
    value = pruned(json.loads(path.read_text(encoding="utf-8")), gone.in_text)
    out.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Path, Path, Gone], None]] = {
    ".parquet": _parquet,
    ".tar": _tar,
    ".zip": _zip,
    ".json": _json,
}


def pruned(value: Any, is_gone: Callable[[str], bool]) -> Any:
    """What JSON holds without forgotten texts: an entry of a list goes whole where one of its own texts is gone, an
    entry of a mapping where its name or its text is."""
    if isinstance(value, dict):
        return {
            name: pruned(part, is_gone)
            for name, part in value.items()
            if not (is_gone(name) or isinstance(part, str) and is_gone(part))
        }
    if isinstance(value, list):
        return [pruned(part, is_gone) for part in value if not _goes(part, is_gone)]
    return value


def _goes(part: Any, is_gone: Callable[[str], bool]) -> bool:
    texts = part.values() if isinstance(part, dict) else [part]
    return any(isinstance(text, str) and is_gone(text) for text in texts)


def remove_records(data: Path, gone: Gone, work: Path) -> None:
    """Write data/records again without the forgotten keys, its manifest with new hashes, and put it in its place.

    The new folder is finished in `work` before the old one leaves: a run killed between the two finds it there. Records
    in a store are written there anew, and what only the old ones had is removed from it.
    """
    folder, fresh = data / RECORDS, work / "records"
    ready, address = fresh / CAPTIONS_FILE, address_of(folder)  # the first is written last
    if not ready.is_file():
        if not (folder / NAME).is_file() or not gone.keys & set(_keys(folder, address)):
            return
        shutil.rmtree(fresh, ignore_errors=True)
        ship = Shipping(address.removesuffix(f"/{STORED}"), fresh) if address else None
        _write_records(Records(folder), fresh, gone, data / CAPTIONS, ship)
        if ship is not None:
            ship.publish(FORM)
        captions = json.loads((folder / CAPTIONS_FILE).read_text("utf-8")) if (folder / CAPTIONS_FILE).is_file() else {}
        write_json(ready, {key: text for key, text in captions.items() if key not in gone.keys})
    if address and (folder / NAME).is_file():
        withdraw(address, read_manifest(folder, FORM), read_manifest(fresh, FORM))
    if folder.is_dir():
        shutil.rmtree(folder)
    put(fresh, folder)
    published.note(Path.cwd(), folder.absolute())


def _keys(folder: Path, address: str | None) -> Sequence[str]:
    return Records(folder).keys if address else (folder / KEYS).read_text("utf-8").split("\n")


def _write_records(old: Records, fresh: Path, gone: Gone, captions: Path, ship: Shipping | None) -> None:
    import numpy as np

    facts = dict(old.facts)
    if "captions_sha256" in facts and captions.is_file():
        facts["captions_sha256"] = file_sha256(captions)
    fields = {bucket.name: bucket.fields for bucket in old.buckets}
    with RecordWriter(fresh, fields, facts, old.shard_records, ship=ship) as writer:
        for bucket in old.buckets:
            places = range(bucket.start, bucket.start + bucket.count)
            stay = np.array([place for place in places if old.keys[place] not in gone.keys], np.int64)
            for start in range(0, len(stay), READ_RECORDS):
                part = stay[start : start + READ_RECORDS]
                writer.append([old.keys[place] for place in part], old.batch(part), bucket.name)
