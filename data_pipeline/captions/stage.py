"""From raw captions to clean ones: data/filtered/pictures.parquet -> data/captions/captions.parquet.

As in the paper, URLs, HTML tags and e-mail addresses are deleted; the table is data_pipeline/common/caption_rules.py. A
caption of which too little or too much is left drops its image. Being the last that drops images, the stage also
leaves a few of each reason for the report: reports/dropped.json. Parts of the table are the tasks that `pipeline`
spreads (data_pipeline/engine).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.captions.part import CHUNK_ROWS, PART_ROWS, Cleaner, Found, Part, captions_schema, read_part
from data_pipeline.common.places import CAPTIONS, DROPPED, FILTERED
from data_pipeline.engine.partitions import partitions
from data_pipeline.engine.run import finish
from data_pipeline.engine.work import Work
from raphael.base.stage import Stage, StageError, write_json

if TYPE_CHECKING:
    from raphael.base.config.params import Config


def run(config: Config, stage: Stage) -> None:
    from data_pipeline.common.dropped import dropped as dropped_images
    from data_pipeline.common.tables import open_parquet

    with open_parquet(FILTERED) as file:
        total = file.metadata.num_rows
    work = stage.workdir(FILTERED, repr(config.captions))
    parts = [
        Part(work / f"part_{start:012d}.arrow", start, min(PART_ROWS, total - start))
        for start in range(0, total, PART_ROWS)
    ]
    cleaning = Work(stage.name, stage.root, Cleaner, (FILTERED.resolve(), config.captions, CHUNK_ROWS))
    with partitions(config.pipeline, work, stage) as pieces, stage.progress(total, "captions") as bar:
        engine = finish(config.pipeline, cleaning, parts, pieces, stage, bar)
    found = _write(work / "captions.parquet", parts)
    if not found.kept:
        raise StageError(f"no caption is left ({dict(found.dropped)}); loosen captions in {config.file}")
    stage.publish(work / "captions.parquet", CAPTIONS)
    write_json(stage.root / DROPPED, dropped_images(config))
    shutil.rmtree(work)
    stage.report(
        total,
        found.kept,
        dict(sorted(found.dropped.items())),
        **engine,
        changed=found.changed,
        changed_by=dict(sorted(found.changed_by.items())),
        examples=found.examples(),
    )


def _write(path: Path, parts: list[Part]) -> Found:
    """The parts' rows in their order, a row group for each batch that was read. Returns what became of all."""
    from data_pipeline.common.tables import table_writer

    whole = Found()
    with table_writer(path, captions_schema(), compression="zstd") as writer:
        for part in parts:
            found, tables = read_part(part.done)
            whole.join(found)
            for table in tables:
                writer.write_table(table)
    return whole
