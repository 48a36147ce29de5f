"""How fast `select` goes through a release's metadata, and how much memory it takes, against polars (where there
is one), pyarrow and pandas doing the same, without and with the search for duplicates.

The list is made up: LAION's columns, one url in 20 a repetition, random scores. All apply the same rules (url, caption
length, scores, size, shape), drop later rows of a url and write url, caption and numbers to a new parquet. Each runs in
a process of its own, by turns; its memory is the process's peak. The peers count no reasons (but one of polars, beside)
and hold what they keep in memory, as scripts do; ours counts, and spills.

polars is none of the project's dependencies: `--polars-python` names a Python of another environment that has it.

    python benchmarks/select_rows.py [--rows 10000000] [--repeats 3] [--polars-python PATH] [--name NAME] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _machine import judged, keep, within

PROJECT = Path(__file__).resolve().parent.parent
CHUNK_ROWS = 65536
URL = r"(?i)^https?://[^\s/?#\\@]+([/?#]|$)"


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


def ours(folder: Path, unique: bool) -> int:
    from data_pipeline.select import stage as select
    from raphael.base.config.params import load_config
    from raphael.base.stage import Stage, read_json

    os.chdir(folder)
    config = load_config(PROJECT / "params.yaml")
    settings = dataclasses.replace(config.select, score_rules=True, unique_urls=unique)
    select.run(dataclasses.replace(config, select=settings), Stage("select", folder))
    return read_json(folder / "reports/select.json")["kept"]


def rules_of_project() -> tuple:
    from raphael.base.config.params import load_config

    config = load_config(PROJECT / "params.yaml")
    return config.filter, config.select


def polars(python: str, folder: Path, unique: bool, way: str) -> dict[str, Any]:
    """One run of the peer by a Python that has polars (benchmarks/_polars_rows.py)."""
    rules, lengths = rules_of_project()
    asked = {
        "list": str(folder / "data/source/metadata.parquet"),
        "out": str(folder / "polars.parquet"),
        "unique": unique,
        "way": way,
        "rules": {**dataclasses.asdict(rules), **dataclasses.asdict(lengths), "url": URL},
    }
    script = Path(__file__).with_name("_polars_rows.py")
    done = subprocess.run([python, str(script), json.dumps(asked)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def pyarrow_script(folder: Path, unique: bool) -> int:
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    rules, lengths = rules_of_project()
    width, height, chars = pc.field("WIDTH"), pc.field("HEIGHT"), pc.utf8_length(pc.field("TEXT"))
    short, long = pc.min_element_wise(width, height), pc.max_element_wise(width, height)
    rows = ds.dataset(folder / "data/source/metadata.parquet").to_table(
        filter=(pc.field("AESTHETIC_SCORE") >= rules.min_aesthetic)
        & (pc.field("pwatermark") < rules.max_watermark)
        & (pc.field("punsafe") < rules.max_unsafe)
        & (pc.field("similarity") >= rules.min_similarity)
        & (short >= rules.min_side_px)
        & (long.cast("float64") <= short.cast("float64") * rules.max_aspect_ratio)
        & pc.match_substring_regex(pc.field("URL"), URL)
        & (chars >= lengths.min_caption_chars)
        & (chars <= lengths.max_caption_chars)
    )
    if unique:
        first = rows.append_column("row", [range(len(rows))]).group_by("URL").aggregate([("row", "min")])
        rows = rows.take(first["row_min"].take(pc.sort_indices(first["row_min"])))
    pq.write_table(rows, folder / "pyarrow.parquet", compression="zstd")
    return len(rows)


def pandas_script(folder: Path, unique: bool) -> int:
    import pandas as pd

    rules, lengths = rules_of_project()
    rows = pd.read_parquet(folder / "data/source/metadata.parquet")
    sides = rows[["WIDTH", "HEIGHT"]]
    chars, short, long = rows.TEXT.str.len(), sides.min(axis=1), sides.max(axis=1)
    rows = rows[
        rows.URL.str.match(URL)
        & (chars >= lengths.min_caption_chars)
        & (chars <= lengths.max_caption_chars)
        & (rows.AESTHETIC_SCORE >= rules.min_aesthetic)
        & (rows.pwatermark < rules.max_watermark)
        & (rows.punsafe < rules.max_unsafe)
        & (rows.similarity >= rules.min_similarity)
        & (short >= rules.min_side_px)
        & (long <= rules.max_aspect_ratio * short)
    ]
    rows = rows.drop_duplicates("URL") if unique else rows
    rows.to_parquet(folder / "pandas.parquet", compression="zstd")
    return len(rows)


POLARS = {"polars": "collect", "polars streaming": "sink", "polars streaming, counting reasons": "counts"}
PEERS = {"pyarrow": pyarrow_script, "pandas": pandas_script}


def measured(function: Callable[[Path, bool], int], folder: Path, unique: bool, answers) -> None:
    from data_pipeline.common.tables import keep_freed_memory

    keep_freed_memory()  # for all three that run on Arrow; has to come before it is loaded
    import pandas  # noqa: F401  pyarrow imports it at the first array: half a second that is nobody's

    before = resource.getrusage(resource.RUSAGE_SELF)
    started_s = time.perf_counter()
    kept = function(folder, unique)
    seconds = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answers.put((kept, seconds, cpu_s, after.ru_maxrss / 1024))


def run(function: Callable[[Path, bool], int], folder: Path, unique: bool) -> dict[str, Any]:
    """One run in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    process = spawn.Process(target=measured, args=(function, folder, unique, answers))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} ended with status {process.exitcode}")
    return dict(zip(("kept", "seconds", "cpu_s", "peak_mb"), answers.get(), strict=True))


def rounded(turn: dict[str, Any]) -> dict[str, Any]:
    peak_mb = round(turn["peak_mb"])
    return {**turn, "seconds": round(turn["seconds"], 2), "cpu_s": round(turn["cpu_s"], 2), "peak_mb": peak_mb}


def compare(
    folder: Path, rows: int, unique: bool, peers: list[str], python: str | None, repeats: int
) -> list[dict[str, Any]]:
    """By turns, the best of each by the clock. python: one that has polars, if any."""
    ways = {name: functools.partial(run, PEERS[name], folder, unique) for name in peers}
    if python:
        ways |= {who: functools.partial(polars, python, folder, unique, way) for who, way in POLARS.items()}
    ways["ours"] = functools.partial(run, ours, folder, unique)
    turns = {who: [] for who in ways}
    for _ in range(repeats):
        for who, way in ways.items():
            turns[who].append(rounded(way()))
    results = []
    for who, all_turns in turns.items():
        best = min(all_turns, key=lambda turn: turn["seconds"])
        rate = round(rows / best["seconds"])
        peak_mb = max(turn["peak_mb"] for turn in all_turns)
        results.append({"who": who, "dedup": unique, "rows": rows, **best, "peak_mb": peak_mb, "rows_per_s": rate})
        kept, cpu_s = best["kept"], best["cpu_s"]
        print(f"| {who} | {unique} | {kept:,} | {best['seconds']} | {rate:,} | {cpu_s} | {peak_mb} |", flush=True)
    if len({result["kept"] for result in results}) > 1:
        raise SystemExit("they kept different numbers of rows: the comparison would mean nothing")
    return results


def summarised(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates against each peer; 0.9 of polars is the target, where there is one and nothing is repeated. By processor
    time too, which says more where others use the same core."""
    lines = []
    for unique in (False, True):
        how = f"{'with' if unique else 'without'} dedup"
        mine = next(row for row in results if row["who"] == "ours" and row["dedup"] == unique)
        for row in results:
            if row["dedup"] == unique and row["who"] != "ours":
                target = ">= 0.9" if row["who"].startswith("polars") and not unique else ""
                case = f"select {how}; peer: {row['who']}"
                lines.append(judged(case, mine["rows_per_s"], row["rows_per_s"], "rows/s", target))
                per_cpu_s = [result["rows"] / result["cpu_s"] for result in (mine, row)]
                lines.append(judged(f"{case}; by processor time", *per_cpu_s, "rows/CPU s"))
        lines.append(within(f"select {how}, peak memory", mine["peak_mb"], 1024, "MB"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--polars-python", metavar="PATH", help="a Python that has polars (default: this one, if it has)"
    )
    parser.add_argument("--name", default="select_rows", help="of the result's file (default: %(default)s)")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="beside polars")
    parser.add_argument("--quick", action="store_true", help="50,000 rows, once; nothing is kept")
    arguments = parser.parse_args()
    rows, repeats = (50_000, 1) if arguments.quick else (arguments.rows, arguments.repeats)
    peers = [name for name in arguments.peers if importlib.util.find_spec(name)]
    python = arguments.polars_python or (sys.executable if importlib.util.find_spec("polars") else None)
    if not python:
        print("polars is not installed and --polars-python names none: pyarrow and pandas are the peers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data/source").mkdir(parents=True)
        write_list(folder / "data/source/metadata.parquet", rows)
        print("| who | dedup | kept | s | rows/s | CPU s | peak MB |\n| --- | --- | --- | --- | --- | --- | --- |")
        results = [row for unique in (False, True) for row in compare(folder, rows, unique, peers, python, repeats)]
    if not arguments.quick:
        keep(arguments.name, results, summarised(results), peers=sorted({row["who"] for row in results} - {"ours"}))


if __name__ == "__main__":
    main()
