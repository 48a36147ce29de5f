"""Which downloaded images are kept: data/shards/ and links.parquet -> data/filtered/pictures.parquet.

Scores come from the list or the stage score, sizes from the stored images. Duplicates are images with equal bytes
(the lowest id stays) and, where asked for, images that look alike (data_pipeline/filter/near_duplicates.py). The
rules and their order are those of data_pipeline/common/rules.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.opt_out import OptOut
from data_pipeline.common.places import FILTERED, LINKS, SCORED, SHARDS
from data_pipeline.common.rules import SAME_BYTES, SMALLER, apply, opt_out_rules, score_rules, size_rules
from data_pipeline.common.schema import (
    CAPTION,
    HEIGHT,
    ID,
    IMAGE_COLUMNS,
    KEY,
    SCORES,
    SHA256,
    SHARD,
    STATUS,
    SUCCESS,
    URL,
    WIDTH,
)
from data_pipeline.common.shard_rows import ListScores, computed_scores, shard_tables
from data_pipeline.common.tables import open_parquet, table_writer
from raphael.base.stage import Stage, StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from raphael.base.config.params import Config


def run(config: Config, stage: Stage) -> None:
    tables = shard_tables(SHARDS)
    stage.expect_whole(*tables)
    opt_out = OptOut.read(config.filter.opt_out)
    scored = SCORED if SCORED.is_dir() else ""  # absent where the stage is run by itself
    evaluation = Path(config.filter.evaluation_pictures) if config.filter.evaluation_pictures else ""
    work = stage.workdir(LINKS, tables, scored, evaluation, repr(config.filter), opt_out.fingerprint, *_sizes(config))
    scores = ListScores(LINKS)
    rules = [*score_rules(config.filter), *size_rules(config.picture)]
    seen: set[bytes] = set()
    dropped: dict[str, int] = {}
    total = kept = 0
    rows = sum(open_parquet(table).metadata.num_rows for table in tables)
    near = _near_duplicates(config, work, rows)
    writer = table_writer(work / "pictures.parquet", image_schema(), compression="zstd")
    with stage.progress(rows, "rows") as bar, writer:
        for path in tables:
            table = open_parquet(path).read()
            ids = table[ID].to_numpy()
            scored = scores.of(ids, path) | computed_scores(path, ids)
            alive, successes = _judge(table, scored, opt_out_rules(table, opt_out) + rules, seen, dropped)
            if near:
                alive = near.look(table[KEY].to_pylist(), path.with_suffix(".tar"), alive, dropped)
            total, kept = total + successes, kept + int(alive.sum())
            writer.write_table(_kept_rows(table, scored, path, alive))
            bar.update(len(table), kept=kept)
    if near:
        kept -= near.take_out(work / "pictures.parquet", dropped)
    if not kept:
        raise StageError(f"no image of {total:,} is left ({dropped}); {_advice(config, dropped)} in {config.file}")
    stage.publish(work / "pictures.parquet", FILTERED)
    shutil.rmtree(work)
    stage.report(total, kept, dropped)


def _sizes(config: Config) -> list[Any]:
    """What of `picture` decides which images are kept."""
    return [config.picture.sizes_px] if config.picture.too_small == "drop" else []


def _advice(config: Config, dropped: dict[str, int]) -> str:
    if max(dropped, key=lambda reason: dropped[reason], default="") != SMALLER:
        return "loosen filter"
    height, width = config.picture.sizes_px[0]
    return (
        f"download.image_size_px {config.download.image_size_px} brings short sides down to that, picture.sizes_px "
        f"begins with {height} x {width}: raise the one, lower the other, or set picture.too_small: upscale"
    )


def _near_duplicates(config: Config, work: Path, rows: int):
    """The search for images that look alike; None where it is off. Images are opened for it alone."""
    if not (config.filter.near_duplicate_bits or config.filter.evaluation_pictures):
        return None
    from data_pipeline.filter.near_duplicates import NearDuplicates

    shutil.rmtree(work / "near", ignore_errors=True)  # of a killed run
    return NearDuplicates(config.filter, work / "near", rows)


def image_schema() -> pa.Schema:
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    types = {ID: pa.int64(), WIDTH: number, HEIGHT: number, **dict.fromkeys(SCORES, pa.float64())}
    return pa.schema([(name, types.get(name, text)) for name in IMAGE_COLUMNS])


def _judge(table, scored: dict, rules: list, seen: set[bytes], dropped: dict[str, int]) -> tuple[np.ndarray, int]:
    """Which rows of a shard stay, bool (n,), and how many were images at all. Adds to `seen` and `dropped`."""
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
            dropped[SAME_BYTES] = dropped.get(SAME_BYTES, 0) + 1
        seen.add(digest)
    return alive, int(success.sum())


def _kept_rows(table: pa.Table, scored: dict[str, np.ndarray], path: Path, alive: np.ndarray) -> pa.Table:
    import pyarrow as pa

    columns = {name: table[name] for name in (KEY, ID, URL, CAPTION, WIDTH, HEIGHT, SHA256)}
    columns |= {score: pa.array(values, from_pandas=True) for score, values in scored.items()}
    columns[SHARD] = pa.array([path.with_suffix(".tar").name] * len(table), pa.string())
    ordered = pa.table([columns[name] for name in IMAGE_COLUMNS], names=list(IMAGE_COLUMNS))
    return ordered.filter(pa.array(alive)).cast(image_schema())
