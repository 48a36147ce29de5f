"""Select on large and odd files: what is decoded, how much memory it takes, and that no short cut changes a count."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline.common import tables
from data_pipeline.select import stage as select
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError

COLUMNS = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")


@pytest.fixture
def config(project):
    return load_config(project / "params.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch, config):
    """run(table, row_group_size, select={...}, filter={...}) -> (links, report) in a workspace of its own."""
    monkeypatch.chdir(tmp_path)

    def go(table: pa.Table, row_group_size: int, **changes):
        select.METADATA.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, select.METADATA, row_group_size=row_group_size)
        changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
        select.run(dataclasses.replace(config, **changed), Stage("select", tmp_path))
        return pq.read_table(select.LINKS), json.loads((tmp_path / "reports/select.json").read_text())

    return go


def random_rows(seed: int, count: int) -> list[dict]:
    rng = random.Random(seed)

    def number(*values: float | None) -> float | None:
        return rng.choice([*values, None]) if rng.random() < 0.3 else rng.choice(values)

    urls = (None, "", " ", "ftp://x", "http://", "http://a.example/%d", " https://ü.example?%d ", "HTTP://b.example/%d")
    texts = (None, "", " \u3000", "ab", " ab ", "a red circle", "ein Hund", "x" * 30)
    return [
        {
            "URL": rng.choice(urls[:5]) if rng.random() < 0.2 else rng.choice(urls[5:]) % rng.randrange(count // 3),
            "TEXT": rng.choice(texts[:5]) if rng.random() < 0.2 else rng.choice(texts[5:]),
            "WIDTH": number(640, 48, 47, 0), "HEIGHT": number(480, 48, 200),
            "similarity": number(0.3, 0.0, -0.1), "punsafe": number(0.1, 0.5, math.nan),
            "pwatermark": number(0.1, 0.499, 0.5), "AESTHETIC_SCORE": number(5.0, 4.7, 4.69, 9.0),
        }
        for _ in range(count)
    ]  # fmt: skip


def reason_of(row: dict, first: dict[str, str], keeps_missing: bool, unique: bool) -> str:
    """Why a row goes, "" where it stays: the rules of docs/data.md, one row at a time."""
    parts = ("similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")
    similarity, unsafe, watermark, aesthetic = (math.nan if row[part] is None else row[part] for part in parts)
    if not keeps_missing:
        for part, value in zip(
            ("similarity", "unsafe", "watermark", "aesthetic"), (similarity, unsafe, watermark, aesthetic)
        ):
            if math.isnan(value):
                return f"no {part} score"
    sides = [side for side in (row["WIDTH"], row["HEIGHT"]) if side is not None and side >= 1]
    url, text = row["URL"], row["TEXT"]
    checks = (
        (aesthetic < 4.7, "aesthetic too low"), (watermark >= 0.5, "watermarked"), (unsafe >= 0.5, "unsafe"),
        (similarity < 0, "caption unlike picture"), (bool(sides) and min(sides) < 48, "too small"),
        (len(sides) == 2 and max(sides) > 2.5 * min(sides), "too long and narrow"),
        (url is None or not url.strip(), "no url"),
        (not re.match(r"(?i)https?://[^\s/?#\\@]+([/?#]|$)", (url or "").strip()), "bad url"),
        (text is None or not text.strip(), "no caption"), (len((text or "").strip()) < 3, "caption too short"),
        (len((text or "").strip()) > 20, "caption too long"),
    )  # fmt: skip
    for drops, reason in checks:
        if drops:
            return reason
    url = url.strip()
    if unique and url in first:
        return "duplicate url" if first[url] == text else "another caption of a kept url"
    first.setdefault(url, text)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_a_loop_over_the_rows_whatever_the_row_groups_and_batches(run, seed):
    rows = random_rows(seed, 900)
    rng = random.Random(seed)
    keeps_missing, unique = seed % 2 == 1, seed != 2
    first: dict[str, str] = {}
    reasons = [reason_of(row, first, keeps_missing, unique) for row in rows]
    links, report = run(
        pa.Table.from_pylist(rows), rng.choice((7, 100, 2000)),
        select={"score_rules": True, "chunk_rows": rng.randrange(1, 300), "max_caption_chars": 20,
                "unique_urls": unique},
        filter=dict.fromkeys(("missing_score", "missing_unsafe"), "keep" if keeps_missing else "drop"),
    )  # fmt: skip
    assert links["id"].to_pylist() == [number for number, reason in enumerate(reasons) if not reason]
    assert report["dropped"] == {reason: reasons.count(reason) for reason in set(reasons) - {""}}
    assert report["total"] == 900 == report["kept"] + sum(report["dropped"].values())


def made_up(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    number = pc.cast(pa.array(rng.integers(0, rows, rows)), pa.string())
    url = pc.binary_join_element_wise("https://cdn.example/pictures/2019/", number, "/a-usual-name.jpg", "")
    text = pc.binary_join_element_wise("A caption of a usual length, and a number: ", number, "")
    numbers = (rng.integers(300, 700, rows), rng.integers(300, 700, rows), rng.uniform(0.2, 0.5, rows),
               rng.beta(1, 8, rows), rng.beta(1, 2, rows), rng.normal(5.0, 0.5, rows))  # fmt: skip
    return pa.table([url, text, *map(pa.array, numbers)], names=COLUMNS)


def test_texts_are_decoded_only_where_the_footer_leaves_hope(run, monkeypatch):
    table = made_up(4000).sort_by("AESTHETIC_SCORE")
    read, real = [], pq.ParquetFile.iter_batches

    def spy(self, *arguments, columns, row_groups, **named):
        read.append((row_groups[0], "URL" in columns))
        return real(self, *arguments, columns=columns, row_groups=row_groups, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    links, report = run(table, 200, select={"score_rules": True})
    scores = table["AESTHETIC_SCORE"].to_numpy().reshape(-1, 200)
    assert dict(read) == {group: bool((scores[group] >= 4.7).any()) for group in range(20)}
    assert report["dropped"]["aesthetic too low"] == int((scores < 4.7).sum())
    again = run(table.take(pa.array(np.random.default_rng(1).permutation(4000))), 4000, select={"score_rules": True})
    assert again[1]["dropped"]["aesthetic too low"] == report["dropped"]["aesthetic too low"]


def test_a_list_without_use_is_refused_by_its_footer_before_a_row_is_read(run, monkeypatch):
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("a row was read"))
    high = made_up(100).set_column(7, "AESTHETIC_SCORE", pa.array(np.full(100, 7.0)))
    with pytest.raises(StageError, match="the lowest AESTHETIC_SCORE is 7, above filter.min_aesthetic 4.7"):
        run(high, 30)
    empty = made_up(100).set_column(5, "punsafe", pa.nulls(100, pa.float64()))
    with pytest.raises(StageError, match="no row has a unsafe score and filter.missing_unsafe is drop"):
        run(empty, 30)


def test_links_are_the_same_bytes_whatever_the_batches(run, monkeypatch):
    monkeypatch.setattr(tables, "GROUP_ROWS", 300)
    bodies = []
    for chunk in (64, 5000):
        run(made_up(2000), 700, select={"score_rules": True, "chunk_rows": chunk})
        bodies.append(select.LINKS.read_bytes())
    assert bodies[0] == bodies[1]
    assert pq.ParquetFile(select.LINKS).metadata.row_group(0).num_rows == 300


def test_one_row_group_of_a_whole_file_is_not_held_in_memory(config, tmp_path, monkeypatch):
    """800,000 rows in one row group, plainly stored: Arrow holds a few batches of it, and a group being written."""
    monkeypatch.chdir(tmp_path)
    select.METADATA.parent.mkdir(parents=True)
    table = made_up(800_000)
    size = table.nbytes
    pq.write_table(table, select.METADATA, row_group_size=len(table), compression="none", use_dictionary=False)
    del table
    settings = dataclasses.replace(config.select, score_rules=True, unique_urls=False, chunk_rows=16384)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        select.run(dataclasses.replace(config, select=settings), Stage("select", tmp_path))
    finally:
        pa.set_memory_pool(before)
    assert size > 120e6 and pool.max_memory() < 0.5 * size, (size, pool.max_memory())


MANY = """
import dataclasses, json, resource, sys
from data_pipeline.common.tables import keep_freed_memory
keep_freed_memory()
import pandas, pyarrow.parquet as pq
from data_pipeline import select
from raphael.base.config.params import load_config
from raphael.base.stage import Stage
config = load_config(sys.argv[1])
config = dataclasses.replace(config, select=dataclasses.replace(config.select, score_rules=True))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
select.run(config, Stage("select", "."))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 1024))
"""


@pytest.mark.slow
def test_two_million_rows_in_one_row_group_stay_within_400_megabytes(tmp_path, project):
    path = tmp_path / select.METADATA
    path.parent.mkdir(parents=True)
    schema = made_up(1).schema
    table = pa.concat_tables([made_up(500_000, seed) for seed in range(4)])
    pq.write_table(table, path, row_group_size=len(table), compression="zstd")
    size = table.nbytes
    assert schema == table.schema and size > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(project / "params.yaml")],
        cwd=tmp_path, env={"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 400, done.stdout
