"""From raw captions to clean ones: data/filtered/pictures.parquet -> data/captions/captions.parquet.

As in the paper, URLs, HTML tags and e-mail addresses are deleted; the table is data_pipeline/common/caption_rules.py. A
caption of which too little or too much is left drops its image. Being the last that drops images, the stage also
leaves a few of each reason for the report: reports/dropped.json.
"""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

from data_pipeline.common.caption_rules import clean, drop_reason
from data_pipeline.common.places import CAPTIONS, DROPPED, FILTERED
from data_pipeline.common.schema import CAPTION, CAPTION_COLUMNS, HEIGHT, KEY, WIDTH
from raphael.base.stage import Stage, StageError, write_json

if TYPE_CHECKING:
    from raphael.base.config.params import Config

CHUNK_ROWS = 16384
NUM_EXAMPLES = 5


def run(config: Config, stage: Stage) -> None:
    import pyarrow as pa

    from data_pipeline.common.dropped import dropped as dropped_images
    from data_pipeline.common.tables import open_parquet, table_writer

    file = open_parquet(FILTERED)
    work = stage.workdir(FILTERED, repr(config.captions))
    numbers = {WIDTH: pa.int32(), HEIGHT: pa.int32()}
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in CAPTION_COLUMNS])
    dropped: Counter[str] = Counter()
    changed_by: Counter[str] = Counter()
    examples = _Examples()
    kept = changed = 0
    writer = table_writer(work / "captions.parquet", schema, compression="zstd")
    with stage.progress(file.metadata.num_rows, "captions") as bar, writer:
        for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=list(CAPTION_COLUMNS)):
            rows = []
            for row in batch.to_pylist():
                cleaned = clean(row[CAPTION])
                reason = drop_reason(cleaned, config.captions)
                if reason:
                    dropped[reason] += 1
                    examples.offer(row[KEY], row[CAPTION], None, (reason,))
                    continue
                changed_by.update(cleaned.reasons)
                changed += cleaned.text != row[CAPTION]
                examples.offer(row[KEY], row[CAPTION], cleaned.text, cleaned.reasons)
                rows.append({**row, CAPTION: f"{config.captions.prefix} {cleaned.text}".strip()})
            writer.write_table(pa.Table.from_pylist(rows, schema))
            kept += len(rows)
            bar.update(len(batch), kept=kept)
    if not kept:
        raise StageError(f"no caption is left ({dict(dropped)}); loosen captions in {config.file}")
    stage.publish(work / "captions.parquet", CAPTIONS)
    write_json(stage.root / DROPPED, dropped_images(config))
    shutil.rmtree(work)
    stage.report(
        file.metadata.num_rows,
        kept,
        dict(sorted(dropped.items())),
        changed=changed,
        changed_by=dict(sorted(changed_by.items())),
        examples=examples.chosen(),
    )


class _Examples:
    """Before and after: the first caption of each rule, in the order of the keys."""

    def __init__(self) -> None:
        self.by_rule: dict[str, dict] = {}

    def offer(self, key: str, before: str, after: str | None, reasons: tuple[str, ...]) -> None:
        for reason in reasons:
            self.by_rule.setdefault(reason, {"key": key, "before": before, "after": after, "rule": reason})

    def chosen(self) -> list[dict]:
        shown: dict[str, dict] = {}
        for example in self.by_rule.values():
            shown.setdefault(example["key"], example)
        return list(shown.values())[:NUM_EXAMPLES]
