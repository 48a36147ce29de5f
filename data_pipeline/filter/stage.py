"""Which downloaded images are kept: data/shards/ and links.parquet -> data/filtered/pictures.parquet.

Scores come from the list or the stage score, sizes from the stored images. Duplicates are images with equal bytes
(the lowest id stays) and, where asked for, images that look alike (data_pipeline/filter/near_duplicates.py). The
rules and their order are those of data_pipeline/common/rules.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
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
from data_pipeline.common.shard_rows import ListScores, Rows, computed_scores, shard_tables
from data_pipeline.common.tables import open_parquet, table_writer
from raphael.base.stage import Progress, Stage, StageError

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
    rows = sum(open_parquet(table).metadata.num_rows for table in tables)
    judge, engine = _Judge(config, opt_out), {}
    near = _near_duplicates(config, work, rows)
    judged = judge.judged(_shards(tables))
    if near:
        engine = near.hash_images(config, stage, work, judged, rows)
        judged = near.looked_at(_shards(tables), judge.dropped)
    with stage.progress(rows, "rows") as bar:
        kept = _write(work / "pictures.parquet", judged, bar)
    if near:
        kept -= near.take_out(work / "pictures.parquet", judge.dropped)
    if not kept:
        found = f"no image of {judge.total:,} is left ({judge.dropped})"
        raise StageError(f"{found}; {_advice(config, judge.dropped)} in {config.file}")
    stage.publish(work / "pictures.parquet", FILTERED)
    shutil.rmtree(work)
    stage.report(judge.total, kept, judge.dropped, **engine)


def _shards(tables: list[Path]) -> Iterator[Rows]:
    """The rows of every shard, with their scores."""
    scores = ListScores(LINKS)
    for path in tables:
        table = open_parquet(path).read()
        ids = table[ID].to_numpy()
        yield Rows(path, table, scores.of(ids, path) | computed_scores(path, ids))


def _write(path: Path, judged: Iterable[tuple[Rows, np.ndarray]], bar: Progress) -> int:
    """The rows that are alive. Returns how many."""
    kept = 0
    with table_writer(path, image_schema(), compression="zstd") as writer:
        for rows, alive in judged:
            kept += int(alive.sum())
            writer.write_table(_kept_rows(rows.table, rows.scored, rows.path, alive))
            bar.update(len(rows.table), kept=kept)
    return kept


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


class _Judge:
    """The rules, from shard to shard: total, of rows that are images, and what was dropped of them by reason."""

    def __init__(self, config: Config, opt_out: OptOut):
        self.rules, self.opt_out = [*score_rules(config.filter), *size_rules(config.picture)], opt_out
        self.seen: set[bytes] = set()
        self.dropped: dict[str, int] = {}
        self.total = 0

    def judged(self, shards: Iterable[Rows]) -> Iterator[tuple[Rows, np.ndarray]]:
        """Each with which of its rows stay, bool (n,)."""
        for rows in shards:
            yield rows, self._judge(rows.table, rows.scored, opt_out_rules(rows.table, self.opt_out) + self.rules)

    def _judge(self, table: pa.Table, scored: dict[str, np.ndarray], rules: list) -> np.ndarray:
        import numpy as np
        import pyarrow.compute as pc

        success = pc.equal(table[STATUS], SUCCESS).to_numpy(zero_copy_only=False)
        sizes = {part: table[part].cast("float64").to_numpy(zero_copy_only=False) for part in (WIDTH, HEIGHT)}
        alive = apply(rules, {**scored, **sizes}, success.copy(), self.dropped)
        digests = table[SHA256].to_pylist()
        for row in np.flatnonzero(alive):
            digest = bytes.fromhex(digests[row][:32])  # 128 of 256 bits: no accidental match, half the memory
            if digest in self.seen:
                alive[row] = False
                self.dropped[SAME_BYTES] = self.dropped.get(SAME_BYTES, 0) + 1
            self.seen.add(digest)
        self.total += int(success.sum())
        return alive


def _kept_rows(table: pa.Table, scored: dict[str, np.ndarray], path: Path, alive: np.ndarray) -> pa.Table:
    import pyarrow as pa

    columns = {name: table[name] for name in (KEY, ID, URL, CAPTION, WIDTH, HEIGHT, SHA256)}
    columns |= {score: pa.array(values, from_pandas=True) for score, values in scored.items()}
    columns[SHARD] = pa.array([path.with_suffix(".tar").name] * len(table), pa.string())
    ordered = pa.table([columns[name] for name in IMAGE_COLUMNS], names=list(IMAGE_COLUMNS))
    return ordered.filter(pa.array(alive)).cast(image_schema())
