"""What is to be forgotten, and where anything of it lies: every file under data/ is read, whoever wrote it.

`scan` knows parquet tables, tars, zips and JSON by their endings, and looks for addresses and keys in the bytes of all
others. Before a removal it says what there is, afterwards it is the proof that nothing is left.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.opt_out import OptOut
from data_pipeline.common.schema import ALIASES, ID, KEY, MD5

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://[^\s\"'<>\\]+")
BYTES_ADDRESS = re.compile(rb"https?://[\x21-\x7e]+")
BYTES_KEY = re.compile(rb"(?<!\d)\d{9,}(?!\d)")
TEXT_MEMBERS = (".json", ".txt")
METADATA = Path("source/metadata.parquet")
SITE_FACTS = "behaviours.json"  # in the embedded site's archive; no image
PARTIAL = ".forget"  # how names of unfinished rewritings end; hidden, and gone before the scan


@dataclass(frozen=True)
class Gone:
    """What is to be forgotten: entries as the opt-out list has them, and the samples that they turned out to be.

    ids, keys: of the samples. host: the one of the embedded site, whose archive names paths alone.
    """

    asked: OptOut
    ids: frozenset[int] = frozenset()
    keys: frozenset[str] = frozenset()
    host: str = ""

    def in_text(self, text: str) -> bool:
        """Whether an address in the text, or the text itself, is to be forgotten."""
        return text in self.keys or any(map(self.asked.has_url, ADDRESS.findall(text))) or text in self.asked.sha256

    def on_site(self, path: str) -> bool:
        return path != SITE_FACTS and self.asked.has_url(f"http://{self.host}/{path}")

    def rows(self, table: pa.Table | pa.RecordBatch, first_id: int | None = None) -> np.ndarray:
        """Which rows of a table are to go, bool (n,). first_id: of row 0, where ids are places and no column; rows that
        are empty there have gone already."""
        import numpy as np
        import pyarrow as pa

        gone = np.zeros(len(table), bool)
        if first_id is not None and self.ids:
            full = ~np.logical_and.reduce([column.is_null().to_numpy(zero_copy_only=False) for column in table.columns])
            gone |= full & np.isin(np.arange(first_id, first_id + len(table)), list(self.ids))
        for name in table.schema.names:
            column = table[name]
            if name == ID and first_id is None and pa.types.is_integer(column.type):
                gone |= np.isin(column.to_numpy(zero_copy_only=False), list(self.ids))
            elif name in ALIASES[MD5] and self.asked.md5:
                gone |= _where(column, lambda text: text.lower() in self.asked.md5)
            elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                gone |= _where(column, self.in_text if name != KEY else self.keys.__contains__)
        return gone


def _where(column: Any, test: Any) -> np.ndarray:
    import numpy as np

    return np.fromiter((isinstance(text, str) and test(text) for text in column.to_pylist()), bool, len(column))


def data_files(data: Path) -> list[Path]:
    """Every file under data/, unfinished rewritings of a killed run left out."""
    return sorted(path for path in data.rglob("*") if path.is_file() and not path.name.endswith(PARTIAL))


def scan(data: Path, gone: Gone) -> dict[str, int]:
    """How many rows, samples or entries each file under `data` has of what is to be forgotten; files without any are
    left out."""
    found = {path.relative_to(data.parent).as_posix(): traces(path, gone) for path in data_files(data)}
    return {name: count for name, count in found.items() if count}


def traces(path: Path, gone: Gone) -> int:
    reader = {".parquet": _in_parquet, ".tar": _in_tar, ".zip": _in_zip, ".json": _in_json}.get(path.suffix, _in_bytes)
    return reader(path, gone)


def _in_parquet(path: Path, gone: Gone) -> int:
    from data_pipeline.common.tables import open_parquet

    first, count = 0 if is_list(path) else None, 0
    for batch in open_parquet(path).iter_batches():
        count += int(gone.rows(batch, first).sum())
        first = None if first is None else first + len(batch)
    return count


def is_list(path: Path) -> bool:
    """Whether it is the list as it came, where a row's id is its place."""
    return path.parts[-2:] == METADATA.parts


def _in_tar(path: Path, gone: Gone) -> int:
    return len(tar_samples(path, gone))


def tar_samples(path: Path, gone: Gone) -> set[str]:
    """Names without endings of the samples of a webdataset tar that are to go."""
    with tarfile.open(path) as tar:
        return {member.name.partition(".")[0] for member in tar if member.isfile() and _member(tar, member, gone)}


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, gone: Gone) -> bool:
    if member.name.partition(".")[0] in gone.keys:
        return True
    if not member.name.endswith(TEXT_MEMBERS):
        return False
    text = tar.extractfile(member).read().decode("utf-8", "replace")
    if not member.name.endswith(".json"):
        return gone.in_text(text)
    return any(map(gone.in_text, strings(json.loads(text))))


def _in_zip(path: Path, gone: Gone) -> int:
    with zipfile.ZipFile(path) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".json")]
        texts = [text for name in inside for text in strings(json.loads(archive.read(name)))]
        return sum(map(gone.on_site, archive.namelist())) + sum(gone.in_text(t) or gone.on_site(t) for t in texts)


def _in_json(path: Path, gone: Gone) -> int:
    return sum(map(gone.in_text, strings(json.loads(path.read_text(encoding="utf-8")))))


def _in_bytes(path: Path, gone: Gone) -> int:
    """In text and binary files alike: addresses, and numbers as long as a key."""
    if not path.stat().st_size:
        return 0
    keys = {key.encode() for key in gone.keys}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        addresses = sum(gone.asked.has_url(found.decode("ascii")) for found in BYTES_ADDRESS.findall(body))
        return addresses + sum(found in keys for found in BYTES_KEY.findall(body))


def strings(value: Any) -> Iterator[str]:
    """Every text in what JSON holds, names included."""
    if isinstance(value, str):
        yield value
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        yield from value
        parts = value.values()
    elif isinstance(value, list):
        parts = value
    for part in parts:
        yield from strings(part)
