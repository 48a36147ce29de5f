"""A downloaded shard in its lasting form.

img2dataset writes members in the order in which answers came, with times, and the gateway's addresses in its tables.
`pack` writes the same images again as a plain webdataset tar: in the order of the keys, undated, with the original
url; and a parquet table with every row of the shard, failures and their reasons included. Equal downloads give equal
bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.hashes.lists import ON_LIST
from data_pipeline.common.schema import (
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
from data_pipeline.common.tables import write_table
from data_pipeline.download.colours import UNKNOWN
from data_pipeline.download.decoder import KILLED
from raphael.base.files import written_whole
from raphael.base.strict import to_dict

if TYPE_CHECKING:
    from raphael.base.config.data import DownloadConfig

_NO_EFFECT = ("processes", "threads", "stall_s", "min_success_share")  # settings that do not change the result
ROBOTS_MESSAGE = "Use of image disallowed by X-Robots-Tag directive"
_HTTP_ERROR = re.compile(r"HTTP Error \d+: ?(.*)", re.DOTALL)


class BrokenShard(ValueError):
    """A shard's files are damaged or do not belong together; it has to be downloaded again."""


def settings_of(config: DownloadConfig) -> dict[str, Any]:
    """What of the settings decides the shards' bytes."""
    return {name: value for name, value in to_dict(config).items() if name not in _NO_EFFECT}


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    """Its tar and its table."""
    return folder / f"{shard_name(shard)}.tar", folder / f"{shard_name(shard)}.parquet"


def pack(raw: Path, links: Path, out: Path, shard: int) -> Counter[str]:
    """Pack shard number `shard` from img2dataset's folder `raw` into `out`.

    links: a parquet with the id, url and caption of the shard's rows. Returns rows by outcome: "success" or the reason.
    Raises BrokenShard.
    """
    import pyarrow as pa

    name = shard_name(shard)
    try:
        found = {row[ID]: row for row in _read(raw / f"{name}.parquet")}
        rows = [_row(link, found.get(link[ID])) for link in _read(links)]
        with tarfile.open(raw / f"{name}.tar") as source:
            return write_shard(out, shard, _bodies(rows, source))
    except (tarfile.TarError, pa.ArrowInvalid, EOFError, KeyError, FileNotFoundError) as error:
        raise BrokenShard(f"shard {name}: {' '.join(str(error).split())}") from None


def write_shard(out: Path, shard: int, rows: Iterable[tuple[dict, str, bytes]]) -> Counter[str]:
    """A shard's tar and its table, each atomically; the table comes last. Returns rows by outcome.

    rows: (row of the table, image's suffix, its bytes), in the order of the ids, with which keys rise; a row that is no
    success has no bytes. sha256 is filled in.
    """
    import pyarrow as pa

    (tar_file, table_file), written = shard_files(out, shard), []
    with (
        written_whole(tar_file) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for row, suffix, body in rows:
            if row[STATUS] == SUCCESS:
                row[SHA256] = hashlib.sha256(body).hexdigest()
                facts = {part: row[part] for part in (KEY, ID, URL, CAPTION, WIDTH, HEIGHT, SHA256)}
                _add(tar, f"{row[KEY]}.{suffix}", body)
                _add(tar, f"{row[KEY]}.txt", row[CAPTION].encode())
                _add(tar, f"{row[KEY]}.json", json.dumps(facts, ensure_ascii=False).encode())
            written.append(row)
    table = pa.Table.from_pylist(written, table_schema())
    with written_whole(table_file) as temporary:
        write_table(table, temporary, compression="zstd")
    return outcomes(table)


def _read(path: Path) -> list[dict]:
    """Raises EOFError where pyarrow meets damage as an OSError: an OSError is then a disk that fails on writing."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except OSError as error:
        raise EOFError(f"{path.name}: {error}") from None


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
    if message.startswith(KILLED):
        return KILLED
    for reason in (UNKNOWN, ON_LIST):
        if message.startswith(reason):
            return reason
    if message == "image area too large" or "CV_IO_MAX_IMAGE_PIXELS" in message:  # OpenCV's own reading of the size
        return "too many pixels"
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


def _bodies(rows: list[dict], source: tarfile.TarFile) -> Iterator[tuple[dict, str, bytes]]:
    """The images in the rows' order (ids and keys rise together), as write_shard takes them."""
    members = {member.name: member for member in source if member.isfile()}
    by_key = {name.partition(".")[0]: name for name in members if not name.endswith((".json", ".txt"))}
    for row in rows:
        if row[STATUS] != SUCCESS:
            yield row, "", b""
            continue
        name = by_key[row["member"]]
        body = source.extractfile(members[name]).read()
        if len(body) != members[name].size:
            raise EOFError(f"{name} is cut short")
        yield row, name.partition(".")[2], body


def _add(target: tarfile.TarFile, name: str, body: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, mode 0644
    info.size = len(body)
    target.addfile(info, io.BytesIO(body))
