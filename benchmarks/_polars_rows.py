"""The peer of select_rows.py in polars, run by whichever Python has it: the project itself does without.

    python _polars_rows.py '{"list": .., "out": .., "unique": .., "way": .., "rules": {..}}'

way: "collect" the rows and write them; "sink" streams them into the file; "counts" streams them too, and counts what
each rule drops first, which is what `select` does. Prints what was kept, seconds, processor seconds and peak memory as
JSON. Imports nothing of the project.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time


def main() -> None:
    import polars as pl

    asked = json.loads(sys.argv[1])
    rules = asked["rules"]
    before = resource.getrusage(resource.RUSAGE_SELF)
    started_s = time.perf_counter()
    chars = pl.col("TEXT").str.strip_chars().str.len_chars()
    short, long = pl.min_horizontal("WIDTH", "HEIGHT"), pl.max_horizontal("WIDTH", "HEIGHT")
    drops = [
        pl.col("AESTHETIC_SCORE") < rules["min_aesthetic"],
        pl.col("pwatermark") >= rules["max_watermark"],
        pl.col("punsafe") >= rules["max_unsafe"],
        pl.col("similarity") < rules["min_similarity"],
        short < rules["min_side_px"],
        long > rules["max_aspect_ratio"] * short,
        ~pl.col("URL").str.contains(rules["url"]),
        chars < rules["min_caption_chars"],
        chars > rules["max_caption_chars"],
    ]
    rows, kept = pl.scan_parquet(asked["list"]), None
    if asked["way"] == "counts":
        first = functools.reduce(lambda chain, pair: chain.when(pair[1]).then(pair[0]), enumerate(drops), pl)
        rows = rows.with_columns(reason=first.otherwise(len(drops)).cast(pl.Int8))
        counts = rows.group_by("reason").len()
        rows = rows.filter(pl.col("reason") == len(drops)).drop("reason")
    else:
        rows = rows.filter(*(~drop for drop in drops))
    rows = rows.unique("URL", keep="first", maintain_order=True) if asked["unique"] else rows
    if asked["way"] == "collect":
        found = rows.collect()
        found.write_parquet(asked["out"], compression="zstd", compression_level=1)
        kept = len(found)
    else:
        written = rows.sink_parquet(asked["out"], compression="zstd", compression_level=1, lazy=True)
        pl.collect_all([written, counts] if asked["way"] == "counts" else [written], engine="streaming")
    seconds = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    if kept is None:
        kept = pl.scan_parquet(asked["out"]).select(pl.len()).collect().item()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {"kept": kept, "seconds": seconds, "cpu_s": cpu_s, "peak_mb": after.ru_maxrss / 1024}
    print(json.dumps({**facts, "version": pl.__version__, "threads": pl.thread_pool_size()}))


if __name__ == "__main__":
    main()
