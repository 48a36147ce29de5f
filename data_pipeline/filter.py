"""Which downloaded pictures are kept: data/shards/ and links.parquet -> data/filtered/pictures.parquet.

Scores come from the list or the stage score, sizes from the stored pictures. Duplicates are pictures with equal bytes
(the lowest id stays) and, where asked for, pictures that look alike (data_pipeline/near_duplicates.py). The rules and
their order are those of data_pipeline/rules.py.
"""

from __future__ import annotations

import shutil
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
from data_pipeline.shard_rows import SCORED, SHARDS, ListScores, computed_scores, shard_tables
from raphael.stage import Stage, StageError, main

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.config import Config

PICTURES = Path("data/filtered/pictures.parquet")


def run(config: Config, stage: Stage) -> None:
    import pyarrow.parquet as pq

    tables = shard_tables(SHARDS)
    opt_out = OptOut.read(config.filter.opt_out)
    scored = SCORED if SCORED.is_dir() else ""  # absent where the stage is run by itself
    evaluation = Path(config.filter.evaluation_pictures) if config.filter.evaluation_pictures else ""
    work = stage.workdir(LINKS, tables, scored, evaluation, repr(config.filter), opt_out.fingerprint)
    scores = ListScores(LINKS)
    rules = score_rules(config.filter)
    seen: set[bytes] = set()
    dropped: dict[str, int] = {}
    total = kept = 0
    rows = sum(open_parquet(table).metadata.num_rows for table in tables)
    near = _near_duplicates(config, work, rows)
    writer = pq.ParquetWriter(work / "pictures.parquet", picture_schema(), compression="zstd")
    with stage.progress(rows, "rows") as bar, writer:
        for path in tables:
            table = open_parquet(path).read()
            ids = table[ID].to_numpy()
            scored = scores.of(ids, path) | computed_scores(path, ids)
            alive, successes = _judge(table, scored, _opt_out_rules(table, opt_out) + rules, seen, dropped)
            if near:
                alive = near.look(table[KEY].to_pylist(), path.with_suffix(".tar"), alive, dropped)
            total, kept = total + successes, kept + int(alive.sum())
            writer.write_table(_pictures(table, scored, path, alive))
            bar.update(len(table), kept=kept)
    if near:
        kept -= near.take_out(work / "pictures.parquet", dropped)
    if not kept:
        raise StageError(f"no picture of {total:,} is left ({dropped}); loosen filter in {config.file}")
    stage.publish(work / "pictures.parquet", PICTURES)
    shutil.rmtree(work)
    stage.report(total, kept, dropped)


def _near_duplicates(config: Config, work: Path, rows: int):
    """The search for pictures that look alike; None where it is off. Pictures are opened for it alone."""
    if not (config.filter.near_duplicate_bits or config.filter.evaluation_pictures):
        return None
    from data_pipeline.near_duplicates import NearDuplicates

    shutil.rmtree(work / "near", ignore_errors=True)  # of a killed run
    return NearDuplicates(config.filter, work / "near", rows)


def picture_schema() -> pa.Schema:
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    types = {ID: pa.int64(), WIDTH: number, HEIGHT: number, **dict.fromkeys(SCORES, pa.float64())}
    return pa.schema([(name, types.get(name, text)) for name in PICTURE_COLUMNS])


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
