"""From raw captions to clean ones: data/filtered/pictures.parquet -> data/captions/captions.parquet.

As in the paper, URLs, HTML tags and e-mail addresses are deleted; the table is data_pipeline/caption_rules.py. A
caption of which too little or too much is left drops its picture. Being the last that drops pictures, the stage also
leaves a few of each reason for the report: reports/dropped.json.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.caption_rules import Cleaned, clean
from data_pipeline.schema import CAPTION, CAPTION_COLUMNS, HEIGHT, KEY, WIDTH
from raphael.stage import Stage, StageError, main, write_json

if TYPE_CHECKING:
    from raphael.config import Config
    from raphael.config_data import CaptionsConfig

PICTURES = Path("data/filtered/pictures.parquet")
CAPTIONS = Path("data/captions/captions.parquet")
CHUNK_ROWS = 16384
NUM_EXAMPLES = 5


def run(config: Config, stage: Stage) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.card_pictures import DROPPED
    from data_pipeline.card_pictures import dropped as dropped_pictures
    from data_pipeline.select import open_parquet

    file = open_parquet(PICTURES)
    work = stage.workdir(PICTURES, repr(config.captions))
    numbers = {WIDTH: pa.int32(), HEIGHT: pa.int32()}
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in CAPTION_COLUMNS])
    dropped: Counter[str] = Counter()
    changed_by: Counter[str] = Counter()
    examples = _Examples()
    kept = changed = 0
    writer = pq.ParquetWriter(work / "captions.parquet", schema, compression="zstd")
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
                rows.append({**row, CAPTION: cleaned.text})
            writer.write_table(pa.Table.from_pylist(rows, schema))
            kept += len(rows)
            bar.update(len(batch), kept=kept)
    if not kept:
        raise StageError(f"no caption is left ({dict(dropped)}); loosen captions in {config.file}")
    stage.publish(work / "captions.parquet", CAPTIONS)
    write_json(stage.root / DROPPED, dropped_pictures(config))
    shutil.rmtree(work)
    stage.report(
        file.metadata.num_rows,
        kept,
        dict(sorted(dropped.items())),
        changed=changed,
        changed_by=dict(sorted(changed_by.items())),
        examples=examples.chosen(),
    )


def drop_reason(cleaned: Cleaned, config: CaptionsConfig) -> str | None:
    """Why a cleaned caption's picture is dropped; None where it stays."""
    if cleaned.text is None:
        return cleaned.reasons[-1]
    if len(cleaned.text) < config.min_chars:
        return "too short"
    return "too long" if len(cleaned.text) > config.max_chars else None


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


if __name__ == "__main__":
    raise SystemExit(main("captions", run, __doc__))
