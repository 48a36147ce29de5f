"""Which downloaded pictures are kept: data/shards/ and links.parquet -> data/filtered/pictures.parquet.

Scores come from the list, sizes from the stored pictures, duplicates are pictures with equal bytes (the lowest id
stays). The rules and their order are those of data_pipeline/rules.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.opt_out import OptOut
from data_pipeline.rules import Rule, apply, score_rules
from data_pipeline.schema import (
    CAPTION,
    HEIGHT,
    ID,
    KEY,
    PICTURE_COLUMNS,
    SCORES,
    SHA256,
    SHARD,
    SOURCE_SHA256,
    STATUS,
    SUCCESS,
    URL,
    WIDTH,
)
from data_pipeline.select import LINKS, open_parquet
from raphael.stage import Stage, StageError, main

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.config import Config

SHARDS = Path("data/shards")
PICTURES = Path("data/filtered/pictures.parquet")


def run(config: Config, stage: Stage) -> None:
    import pyarrow.parquet as pq

    tables = shard_tables(SHARDS)
    opt_out = OptOut.read(config.filter.opt_out)
    work = stage.workdir(LINKS, tables, repr(config.filter), opt_out.fingerprint)
    scores = _Scores(LINKS)
    rules = score_rules(config.filter)
    seen: set[bytes] = set()
    dropped: dict[str, int] = {}
    total = kept = 0
    rows = sum(open_parquet(table).metadata.num_rows for table in tables)
    writer = pq.ParquetWriter(work / "pictures.parquet", picture_schema(), compression="zstd")
    with stage.progress(rows, "rows") as bar, writer:
        for path in tables:
            table = open_parquet(path).read()
            scored = scores.of(table[ID].to_numpy(), path)
            alive, successes = _judge(table, scored, _opt_out_rules(table, opt_out) + rules, seen, dropped)
            total, kept = total + successes, kept + int(alive.sum())
            writer.write_table(_pictures(table, scored, path, alive))
            bar.update(len(table), kept=kept)
    if not kept:
        raise StageError(f"no picture of {total:,} is left ({dropped}); loosen filter in {config.file}")
    stage.publish(work / "pictures.parquet", PICTURES)
    shutil.rmtree(work)
    stage.report(total, kept, dropped)


def shard_tables(shards: Path) -> list[Path]:
    """The tables of the shards, in order, each beside its tar. Raises StageError where one is missing."""
    tables = sorted(shards.glob("*.parquet"))
    if not tables:
        raise StageError(f"{shards}: no shard; run the stage download (dvc repro download)")
    for number, table in enumerate(tables):
        if int(table.stem) != number or not table.with_suffix(".tar").exists():
            raise StageError(f"{shards}: shard {number:05d} is not whole; run the stage download again")
    return tables


def picture_schema() -> pa.Schema:
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    types = {ID: pa.int64(), WIDTH: number, HEIGHT: number, **dict.fromkeys(SCORES, pa.float64())}
    return pa.schema([(name, types.get(name, text)) for name in PICTURE_COLUMNS])


class _Scores:
    """The scores of the list, handed out shard by shard: shards are consecutive pieces of the list."""

    def __init__(self, links: Path):
        self.batches: Iterator[pa.RecordBatch] = open_parquet(links).iter_batches(columns=[ID, *SCORES])
        self.ahead: list[pa.RecordBatch] = []

    def of(self, ids: np.ndarray, path: Path) -> dict[str, np.ndarray]:
        """Columns of float64 (n,), NaN where null, for the next n = len(ids) rows, which must be those."""
        import numpy as np
        import pyarrow as pa

        while sum(map(len, self.ahead)) < len(ids) and (batch := next(self.batches, None)) is not None:
            self.ahead.append(batch)
        table = pa.Table.from_batches(self.ahead) if self.ahead else pa.table({ID: pa.array([], pa.int64())})
        mine, self.ahead = table.slice(0, len(ids)), table.slice(len(ids)).to_batches()
        if not np.array_equal(mine[ID].to_numpy(), ids):
            raise StageError(f"{path}: its rows are not those of {LINKS}; run the stage download again")
        return {score: mine[score].to_numpy() for score in SCORES}


def _judge(table, scored: dict, rules: list, seen: set[bytes], dropped: dict[str, int]) -> tuple[np.ndarray, int]:
    """Which rows of a shard stay, bool (n,), and how many were pictures at all. Adds to `seen` and `dropped`."""
    import numpy as np
    import pyarrow.compute as pc

    success = pc.equal(table[STATUS], SUCCESS).to_numpy(zero_copy_only=False)
    sizes = {part: table[part].cast("float64").to_numpy(zero_copy_only=False) for part in (WIDTH, HEIGHT)}
    alive = apply(rules, {**scored, **sizes}, success.copy(), dropped)
    digests = table[SHA256].to_pylist()
    for row in np.flatnonzero(alive):
        digest = bytes.fromhex(digests[row][:32])  # 128 of 256 bits: no accidental match, half the memory
        if digest in seen:
            alive[row] = False
            dropped["duplicate picture"] = dropped.get("duplicate picture", 0) + 1
        seen.add(digest)
    return alive, int(success.sum())


def _opt_out_rules(table: pa.Table, opt_out: OptOut) -> list[Rule]:
    """Marks rows whose picture, as it came or as it is stored, or whose address is on the list."""
    import numpy as np

    if not opt_out:
        return []
    columns = (table[name].to_pylist() for name in (URL, SHA256, SOURCE_SHA256))
    rows = zip(*columns, strict=True)
    marks = np.fromiter((opt_out.has_url(url) or opt_out.has_sha256(digests) for url, *digests in rows), bool)
    return [("opted out", lambda _: marks)]


def _pictures(table: pa.Table, scored: dict[str, np.ndarray], path: Path, alive: np.ndarray) -> pa.Table:
    import pyarrow as pa

    columns = {name: table[name] for name in (KEY, ID, URL, CAPTION, WIDTH, HEIGHT, SHA256)}
    columns |= {score: pa.array(values, from_pandas=True) for score, values in scored.items()}
    columns[SHARD] = pa.array([path.with_suffix(".tar").name] * len(table), pa.string())
    ordered = pa.table([columns[name] for name in PICTURE_COLUMNS], names=list(PICTURE_COLUMNS))
    return ordered.filter(pa.array(alive)).cast(picture_schema())


if __name__ == "__main__":
    raise SystemExit(main("filter", run, __doc__))
