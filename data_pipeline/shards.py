"""A downloaded shard in its lasting form.

img2dataset writes members in the order in which answers came, with times, and the gateway's addresses in its tables.
`pack` writes the same pictures again as a plain webdataset tar: in the order of the keys, undated, with the original
url; and a parquet table with every row of the shard, failures and their reasons included. Equal downloads give equal
bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

from data_pipeline.schema import (
    CAPTION,
    FAILED,
    HEIGHT,
    ID,
    KEY,
    REASON,
    SHA256,
    SOURCE_SHA256,
    STATUS,
    SUCCESS,
    URL,
    WIDTH,
)

ROBOTS_MESSAGE = "Use of image disallowed by X-Robots-Tag directive"
_HTTP_ERROR = re.compile(r"HTTP Error \d+: ?(.*)", re.DOTALL)


class BrokenShard(ValueError):
    """A shard's files are damaged or do not belong together; it has to be downloaded again."""


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def pack(raw: Path, links: Path, out: Path, shard: int) -> Counter[str]:
    """Pack shard number `shard` from img2dataset's folder `raw` into `out`; the table comes last and makes it count.

    links: a parquet with the id, url and caption of the shard's rows. Returns rows by outcome: "success" or the reason.
    Raises BrokenShard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = shard_name(shard)
    try:
        found = {row[ID]: row for row in pq.read_table(raw / f"{name}.parquet").to_pylist()}
        rows = [_row(link, found.get(link[ID])) for link in pq.read_table(links).to_pylist()]
        partial = out / f".{name}.tar"
        tar = tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT)
        with tar, tarfile.open(raw / f"{name}.tar") as source:
            members = {member.name: member for member in source if member.isfile()}
            _copy(rows, source, members, tar)
    except (tarfile.TarError, pa.ArrowInvalid, EOFError, KeyError, FileNotFoundError) as error:
        raise BrokenShard(f"shard {name}: {' '.join(str(error).split())}") from None
    table = pa.Table.from_pylist([{**row, "member": None} for row in rows], table_schema())
    pq.write_table(table, out / f".{name}.parquet", compression="zstd")
    os.replace(partial, out / f"{name}.tar")
    os.replace(out / f".{name}.parquet", out / f"{name}.parquet")
    return outcomes(table)


def outcomes(table) -> Counter[str]:
    """Rows of a packed table by outcome."""
    return Counter(reason or SUCCESS for reason in table[REASON].to_pylist())


def table_schema():
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    types = {
        KEY: text, ID: pa.int64(), URL: text, CAPTION: text, STATUS: text, REASON: text, WIDTH: number, HEIGHT: number,
        "original_width": number, "original_height": number, SHA256: text, SOURCE_SHA256: text,
    }  # fmt: skip
    return pa.schema(list(types.items()))


def reason_of(status: str, message: str | None) -> str:
    """The reason in plain words. The gateway's own comes as the status text of its answer."""
    message = message or ""
    from_gateway = _HTTP_ERROR.fullmatch(message)
    if from_gateway:
        return from_gateway[1]
    if message == ROBOTS_MESSAGE:
        return "opted out by X-Robots-Tag"
    return "undecodable" if status == "failed_to_resize" else "downloader error"


def _row(link: dict, found: dict | None) -> dict:
    """One row of the packed table. A row that img2dataset lost on the way has no entry, and is counted as that."""
    status = found["status"] if found else "lost"
    row = {**{name: link[name] for name in (ID, URL, CAPTION)}, STATUS: SUCCESS, REASON: None}
    if status != "success":
        reason = reason_of(status, found["error_message"]) if found else "lost by the downloader"
        return {**row, STATUS: FAILED, REASON: reason, KEY: f"{int(found['key']):09d}" if found else None}
    sizes = {name: found[name] for name in (WIDTH, HEIGHT, "original_width", "original_height")}
    return {**row, **sizes, KEY: f"{int(found['key']):09d}", SOURCE_SHA256: found["sha256"], "member": found["key"]}


def _copy(rows: list[dict], source: tarfile.TarFile, members: dict, target: tarfile.TarFile) -> None:
    """Copy the pictures in the rows' order (ids and keys rise together), each with its caption and its facts."""
    by_key = {name.partition(".")[0]: name for name in members if not name.endswith((".json", ".txt"))}
    for row in rows:
        if row[STATUS] != SUCCESS:
            continue
        name = by_key[row["member"]]
        body = source.extractfile(members[name]).read()
        if len(body) != members[name].size:
            raise EOFError(f"{name} is cut short")
        row[SHA256] = hashlib.sha256(body).hexdigest()
        facts = {part: row[part] for part in (KEY, ID, URL, CAPTION, WIDTH, HEIGHT, SHA256)}
        _add(target, f"{row[KEY]}.{name.partition('.')[2]}", body)
        _add(target, f"{row[KEY]}.txt", row[CAPTION].encode())
        _add(target, f"{row[KEY]}.json", json.dumps(facts, ensure_ascii=False).encode())


def _add(target: tarfile.TarFile, name: str, body: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, mode 0644
    info.size = len(body)
    target.addfile(info, io.BytesIO(body))
