"""How fast `select` goes through a release's metadata, and how much memory it takes, against pandas doing the same.

The list is made up: LAION's columns, one url in 20 a repetition, random scores. Both apply the same rules (url, caption
length, scores, size, shape), drop later rows of a url and write url, caption and numbers to a new parquet. Each runs in
a process of its own, one after the other; its memory is the process's peak. pandas reads the whole list, as scripts do.
Writes results/select_rows-<device>-<yyyymm>.json, unless --quick.

    python benchmarks/select_rows.py [--rows 1000000] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _machine import judged, keep

PROJECT = Path(__file__).resolve().parent.parent
CHUNK_ROWS = 65536


def write_list(path: Path, rows: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    with_schema = None
    for start in range(0, rows, CHUNK_ROWS):
        n = min(CHUNK_ROWS, rows - start)
        ids = np.where(rng.random(n) < 0.05, rng.integers(0, start + 1, n), np.arange(start, start + n))
        table = pa.table(
            {
                "URL": [f"https://cdn{number % 997}.example/pictures/2019/{number:012d}.jpg" for number in ids],
                "TEXT": [f"A made up caption of a usual length, and its number is {number}" for number in ids],
                "WIDTH": rng.integers(30, 2000, n),
                "HEIGHT": rng.integers(30, 2000, n),
                "similarity": rng.uniform(0.2, 0.5, n),
                "punsafe": rng.beta(1, 8, n),
                "pwatermark": rng.beta(1, 2, n),
                "AESTHETIC_SCORE": rng.normal(5.0, 0.5, n),
            }
        )
        with_schema = with_schema or pq.ParquetWriter(path, table.schema, compression="zstd")
        with_schema.write_table(table)
    with_schema.close()


def ours(folder: Path) -> int:
    from data_pipeline import select
    from raphael.config import load_config
    from raphael.stage import Stage, read_json

    os.chdir(folder)
    config = load_config(PROJECT / "params.yaml")
    config = dataclasses.replace(config, select=dataclasses.replace(config.select, score_rules=True))
    select.run(config, Stage("select", folder))
    return read_json(folder / "reports/select.json")["kept"]


def pandas_script(folder: Path) -> int:
    import pandas as pd

    from raphael.config import load_config

    config = load_config(PROJECT / "params.yaml")
    rules, lengths = config.filter, config.select
    rows = pd.read_parquet(folder / "data/source/metadata.parquet")
    chars, short, long = (
        rows.TEXT.str.len(),
        rows[["WIDTH", "HEIGHT"]].min(axis=1),
        rows[["WIDTH", "HEIGHT"]].max(axis=1),
    )
    rows = rows[
        rows.URL.str.match(r"(?i)^https?://[^\s/?#\\@]+([/?#]|$)")
        & (chars >= lengths.min_caption_chars)
        & (chars <= lengths.max_caption_chars)
        & (rows.AESTHETIC_SCORE >= rules.min_aesthetic)
        & (rows.pwatermark < rules.max_watermark)
        & (rows.punsafe < rules.max_unsafe)
        & (rows.similarity >= rules.min_similarity)
        & (short >= rules.min_side_px)
        & (long <= rules.max_aspect_ratio * short)
    ].drop_duplicates("URL")
    rows.to_parquet(folder / "pandas.parquet", compression="zstd")
    return len(rows)


def measured(function: Callable[[Path], int], folder: Path, answers) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    started_s = time.perf_counter()
    kept = function(folder)
    seconds = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answers.put((kept, seconds, cpu_s, after.ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="50,000 rows")
    arguments = parser.parse_args()
    rows = 50_000 if arguments.quick else arguments.rows
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data/source").mkdir(parents=True)
        write_list(folder / "data/source/metadata.parquet", rows)
        print("| who | rows | kept | s | rows/s | CPU s | peak MB |\n| --- | --- | --- | --- | --- | --- | --- |")
        found = {}
        for who, function in (("pandas", pandas_script), ("ours", ours)):
            answers = spawn.SimpleQueue()
            process = spawn.Process(target=measured, args=(function, folder, answers))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{who} ended with status {process.exitcode}")
            kept, seconds, cpu_s, peak_mb = answers.get()
            found[who] = {"who": who, "kept": kept, "seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb}
            print(
                f"| {who} | {rows:,} | {kept:,} | {seconds:.1f} | {rows / seconds:,.0f} | {cpu_s:.1f} | {peak_mb:.0f} |"
            )
    if not arguments.quick:
        mine, theirs = found["ours"], found["pandas"]
        case = f"{rows:,} rows; peer: pandas"
        summary = [
            judged(f"{case}, time", mine["seconds"], theirs["seconds"], "s", "<= 1.0"),
            judged(f"{case}, peak memory", mine["peak_mb"], theirs["peak_mb"], "MB", "<= 1.0"),
        ]
        keep("select_rows", list(found.values()), summary, rows=rows)


if __name__ == "__main__":
    main()
