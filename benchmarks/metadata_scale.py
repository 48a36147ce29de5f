"""Whether `select` with its search for duplicates, and `captions`, cost the same a row however many there are, and how
much memory they take.

Lists are made up (benchmarks/select_rows.py), captions too; these have no numbers that grow, which more rules look at.
Each size of each stage runs in a process of its own, over few rows first, so that imports are not counted: processor
seconds of the second run, the process's largest memory.

    python benchmarks/metadata_scale.py [--rows 100000 1000000 10000000] [--quick]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from _apart import apart
from _machine import judged, keep, within
from rates import FEW, SHARD_ROWS, run_stage, settings
from select_rows import write_list

ROWS, BATCH, LIMIT_MB = (100_000, 1_000_000, 10_000_000), 50_000, 2000.0  # of a worker
TEXTS = ("a red circle left of a blue square", "<b>two</b> stars", "a cat https://a.example/1", "IMG_1234.jpg")


def make_list(root: Path, rows: int) -> None:
    (root / "data/source").mkdir(parents=True)
    write_list(root / "data/source/metadata.parquet", rows)


def make_images(root: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "data/filtered").mkdir(parents=True)
    types = [(name, pa.string()) for name in ("key", "shard", "caption")] + [
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
    with pq.ParquetWriter(root / "data/filtered/pictures.parquet", pa.schema(types)) as writer:
        for start in range(0, rows, BATCH):
            numbers = range(start, min(rows, start + BATCH))
            texts = [f"{TEXTS[n % 4]}, {n % 1000:03d}" if n % 4 < 3 else TEXTS[3] for n in numbers]
            columns = {"key": [f"{n:09d}" for n in numbers], "shard": [f"{n // SHARD_ROWS:05d}.tar" for n in numbers]}
            columns |= {"caption": texts, "width": [640] * len(numbers), "height": [480] * len(numbers)}
            writer.write_table(pa.table(columns, schema=pa.schema(types)))


MAKERS = {"select": make_list, "captions": make_images}


def make(stage: str, root: str, rows: int) -> dict[str, Any]:
    """In a process of its own: what it takes is not the stage's."""
    MAKERS[stage](Path(root), rows)
    return {}


def measure(stage: str, few: str, many: str) -> dict[str, Any]:
    """few, many: workspaces."""
    from data_pipeline.common.tables import keep_freed_memory

    keep_freed_memory()
    config = settings(select={"score_rules": True, "unique_urls": True})
    run_stage(stage, Path(few), config)
    seconds, kept = run_stage(stage, Path(many), config)
    return {"cpu_s": round(seconds, 3), "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--quick", action="store_true", help="20,000 rows, nothing kept")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    counts, rows, summary = [20_000] if arguments.quick else arguments.rows, [], []
    print("| stage | rows | CPU us a row | memory MB |\n| --- | ---: | ---: | ---: |")
    for stage in MAKERS:
        for count in counts:
            with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
                apart(make, stage, few, FEW)
                apart(make, stage, many, count)
                found = apart(measure, stage, few, many)
            us, peak_mb = 1e6 * found["cpu_s"] / count, 1000 * found["peak_gb"]
            rows.append({"stage": stage, "rows": count, **found, "cpu_us_a_row": us, "load": os.getloadavg()[0]})
            print(f"| {stage} | {count:,} | {us:.2f} | {peak_mb:.0f} |", flush=True)
        first, last = (
            next(row for row in rows if (row["stage"], row["rows"]) == (stage, n)) for n in (counts[0], counts[-1])
        )
        case = f"{stage}, a row of {counts[-1]:,}; peer: of {counts[0]:,}"
        summary.append(judged(case, last["cpu_us_a_row"], first["cpu_us_a_row"], "CPU us", "<= 1.1"))
        summary.append(within(f"{stage}, memory at {counts[-1]:,} rows", 1000 * last["peak_gb"], LIMIT_MB, "MB"))
    if not arguments.quick:
        keep("metadata_scale", rows, summary)


if __name__ == "__main__":
    main()
