"""The stage captions in parts: whoever does them, the table and the report are those of one loop over all rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.captions import stage
from data_pipeline.captions.part import Cleaner, Found, Part, captions_schema, read_part
from data_pipeline.common.caption_rules import clean, drop_reason
from data_pipeline.common.places import CAPTIONS, FILTERED
from data_pipeline.common.schema import CAPTION, CAPTION_COLUMNS, HEIGHT, KEY, SHARD, WIDTH
from data_pipeline.common.tables import table_writer
from raphael.base.config.data import PipelineConfig
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError, read_json

CHUNK, PER_PART = 16, 48
GROUPS = (10, 20, 5, 40, 1, 64, 3, 31, 7)  # rows: parts begin and end within them
TEXTS = (
    "a red circle", "<b>two</b> stars", "IMG_1234.jpg", "a cat https://a.example/1", "a", "a dog &amp; a cat",
    "a cat, 14/05/2016.", "photo by @someone_here of a cat", "a square " * 40, "www.a.example", "#sunset over #paris",
)  # fmt: skip


@pytest.fixture
def filtered(project, tmp_path, monkeypatch):
    """A workspace with data/filtered; (its root, the settings)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_pipeline.common.dropped.dropped", lambda config: {})
    monkeypatch.setattr(stage, "CHUNK_ROWS", CHUNK)
    monkeypatch.setattr(stage, "PART_ROWS", PER_PART)
    (tmp_path / FILTERED).parent.mkdir(parents=True)
    rows = [
        {KEY: f"{n:09d}", SHARD: f"{n // 50:05d}.tar", CAPTION: f"{TEXTS[n * 7 % 11]}", WIDTH: n, HEIGHT: None}
        for n in range(sum(GROUPS))
    ]
    start, schema = 0, captions_schema().append(pa.field("url", pa.string()))
    with pq.ParquetWriter(tmp_path / FILTERED, schema) as writer:
        for size in GROUPS:
            writer.write_table(pa.Table.from_pylist(rows[start : start + size], schema))
            start += size
    config = load_config(project / "params.yaml")
    return tmp_path, replace(config, captions=replace(config.captions, min_chars=2, max_chars=200, prefix="xyz"))


def naive(root, settings):
    """One loop over all rows, as the stage was before there were parts. -> (bytes of the table, facts)."""
    dropped, changed_by, by_rule, kept, changed = Counter(), Counter(), {}, 0, 0
    with table_writer(root / "naive.parquet", captions_schema(), compression="zstd") as writer:
        for batch in pq.ParquetFile(root / FILTERED).iter_batches(batch_size=CHUNK, columns=list(CAPTION_COLUMNS)):
            rows = []
            for row in batch.to_pylist():
                cleaned = clean(row[CAPTION])
                reason = drop_reason(cleaned, settings)
                for rule in (reason,) if reason else cleaned.reasons:
                    after = None if reason else cleaned.text
                    by_rule.setdefault(rule, {"key": row[KEY], "before": row[CAPTION], "after": after, "rule": rule})
                if reason:
                    dropped[reason] += 1
                    continue
                changed_by.update(cleaned.reasons)
                changed += cleaned.text != row[CAPTION]
                rows.append({**row, CAPTION: f"xyz {cleaned.text}"})
            writer.write_table(pa.Table.from_pylist(rows, captions_schema()))
            kept += len(rows)
    shown = {}
    for example in by_rule.values():
        shown.setdefault(example["key"], example)
    facts = {"kept": kept, "dropped": dropped, "changed": changed, "changed_by": changed_by}
    return (root / "naive.parquet").read_bytes(), {**facts, "examples": list(shown.values())[:5]}


@pytest.mark.parametrize(
    ("engine", "workers"),
    [("local", 1), ("local", 2), pytest.param("ray", 2, marks=pytest.mark.slow)],
)
def test_parts_end_in_the_bytes_and_the_report_of_one_loop(filtered, engine, workers):
    root, config = filtered
    table, facts = naive(root, config.captions)
    config = replace(config, pipeline=PipelineConfig(engine=engine, workers=workers))
    here = Stage("captions", root)
    stage.run(config, here)
    assert (root / CAPTIONS).read_bytes() == table
    report = read_json(root / "reports/captions.json")
    assert {name: report[name] for name in facts} == facts and report["engine"] == engine
    assert report["total"] == sum(GROUPS) == report["kept"] + sum(report["dropped"].values())
    assert facts["kept"] > 50 and len(facts["dropped"]) >= 3 and len(facts["examples"]) == 5
    assert here.timings["engine"]["partitions"] == -(-sum(GROUPS) // PER_PART) == 4
    assert not any((root / "work/captions").iterdir())


def test_parts_that_an_earlier_run_finished_are_not_done_again(filtered, monkeypatch):
    root, config = filtered
    table, _ = naive(root, config.captions)
    whole = Cleaner.__call__

    def dies_in_the_third(self, part):
        if part.start >= 2 * PER_PART:
            raise OSError(28, "No space left on device")
        return whole(self, part)

    monkeypatch.setattr(Cleaner, "__call__", dies_in_the_third)
    with pytest.raises(OSError, match="No space"):
        stage.run(config, Stage("captions", root))
    assert not (root / CAPTIONS).exists()
    monkeypatch.setattr(Cleaner, "__call__", whole)
    second = Stage("captions", root)
    stage.run(config, second)
    assert second.timings["engine"]["partitions"] == 2 and (root / CAPTIONS).read_bytes() == table


def test_where_no_caption_is_left_the_stage_says_why_and_publishes_nothing(filtered):
    root, config = filtered
    strict = replace(config, captions=replace(config.captions, min_chars=1000, max_chars=2000))
    with pytest.raises(StageError, match="no caption is left .*too short"):
        stage.run(strict, Stage("captions", root))
    assert not (root / CAPTIONS).exists()


def test_what_a_part_says_comes_back_as_it_was(filtered):
    root, config = filtered
    part = Part(root / "part.arrow", 30, 50)
    Cleaner(root / FILTERED, config.captions, CHUNK)(part)
    found, tables = read_part(part.done)
    tables = list(tables)
    assert isinstance(found, Found) and found.kept == sum(map(len, tables)) and len(tables) == -(-50 // CHUNK)
    assert found.kept + sum(found.dropped.values()) == 50
    assert all(table.schema.equals(captions_schema(), check_metadata=True) for table in tables)
    keys = [key for table in tables for key in table[KEY].to_pylist()]
    assert keys == sorted(keys) and min(keys) >= f"{30:09d}" and max(keys) < f"{80:09d}"
