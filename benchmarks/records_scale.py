"""What it takes to read from data sets of a hundred thousand to ten million records, in an order that is shuffled anew.

The records are those of benchmarks/records.py (17.7 kB). Of the large sets keys, hashes and manifest are whole and the
shards are holes: every read goes through the same calls, and 177 GB take no room. What is timed is read once before, so
that its pages are in memory: the numbers are the processor's share; a disk comes on top, in pieces of 16 kB. Each size
runs in a process of its own: the seconds until the records are open, until the first batch of 256 is there, the steady
rate, the largest memory and the most files open.

    python benchmarks/records_scale.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash
from _machine import keep, within
from records import FIELDS, RECORD_BYTES

from raphael.base.files import file_sha256
from raphael.base.manifest import write_manifest
from raphael.base.record_files.hashes import HASH, hashes_file
from raphael.base.records import FORM, HASHED_WHOLE, KEYS, SHARD_RECORDS, Records, shard_file

SIZES, BATCH, BATCHES = (100_000, 1_000_000, 10_000_000), 256, 200
LIMITS = {"first_batch_s": (0.1, "s"), "rss_mb": (300.0, "MB"), "files": (512.0, "files")}
LEAST_RATE = 20_000.0  # records a second of one core


def make(folder: Path, records: int) -> None:
    """A folder of records of zeros, as RecordWriter would leave it."""
    folder.mkdir()
    with open(folder / KEYS, "w", encoding="utf-8") as file:
        for start in range(0, records, 100_000):
            file.write("".join(f"{key:09d}\n" for key in range(start, min(start + 100_000, records))))
    entries: dict[str, dict] = {}
    hashes: dict[str, str] = {}
    known: dict[int, tuple[dict, str]] = {}  # bytes of a shard's file -> what is said of it
    for shard in range(-(-records // SHARD_RECORDS)):
        count = min(SHARD_RECORDS, records - shard * SHARD_RECORDS)
        for name, (dtype, shape) in FIELDS.items():
            file, size = shard_file("all", shard, name), count * np.dtype(dtype).itemsize * int(np.prod(shape))
            with open(folder / file, "wb") as hole:
                hole.truncate(size)
            if size not in known:
                known[size] = (
                    {"bytes": size, "sha256": file_sha256(folder / file)},
                    xxhash.xxh3_128_hexdigest(bytes(size)),
                )
            entries[file], hashes[file] = known[size]
    files = [KEYS]
    if -(-records // SHARD_RECORDS) > HASHED_WHOLE:
        of_one = np.array([xxhash.xxh3_64_intdigest(bytes(RECORD_BYTES))], HASH)
        np.repeat(of_one, records).tofile(folder / hashes_file("all"))
        files.append(hashes_file("all"))
    fields = {name: [dtype, list(shape)] for name, (dtype, shape) in FIELDS.items()}
    buckets = [{"name": "all", "count": records, "fields": fields}]
    facts = {"buckets": buckets, "shard_records": SHARD_RECORDS, "xxh3_128": hashes, "facts": {}}
    write_manifest(folder, FORM, files, facts, entries)


def read(folder: Path, batches: int) -> dict[str, float]:
    """Open, read the first batch, read on; what it took. In a process of its own."""
    from raphael.train.batches import Batches

    began = time.perf_counter()
    records = Records(folder)
    opened = time.perf_counter()
    order = Batches(0, len(records), BATCH)
    records.batch(order.everyone(0)[1])
    first = time.perf_counter()
    for step in range(1, batches + 1):
        records.batch(order.everyone(step)[1])
    files, cpu_s, wall_s = 0, time.process_time(), time.perf_counter()
    for step in range(1, batches + 1):
        records.batch(order.everyone(step)[1])
        files = max(files, len(os.listdir("/proc/self/fd")))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return {
        "records": len(records),
        "open_s": opened - began,
        "first_batch_s": first - began,
        "records_per_cpu_s": batches * BATCH / cpu_s,
        "records_per_s": batches * BATCH / wall_s,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "files": float(files),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 records, nothing kept")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batches = 5 if arguments.quick else BATCHES
    if arguments.read:
        print(json.dumps(read(arguments.read, batches)))
        return
    rows = []
    print("| records | open s | first batch s | records/CPU s | memory MB | files |\n" + "| ---: " * 6 + "|")
    for size in (20_000,) if arguments.quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name) / "records", size)
            command = [sys.executable, __file__, "--read", f"{name}/records", *(["--quick"] if arguments.quick else [])]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        numbers = [f"{row['open_s']:.3f}", f"{row['first_batch_s']:.3f}", f"{row['records_per_cpu_s']:,.0f}"]
        print("|", " | ".join([f"{row['records']:,}", *numbers, f"{row['rss_mb']:.0f}", f"{row['files']:.0f}"]), "|")
    if not arguments.quick:
        last = rows[-1]
        summary = [within(f"{SIZES[-1]:,} records, {name}", last[name], *limit) for name, limit in LIMITS.items()]
        cost = within(f"{SIZES[-1]:,} records, CPU s a record", 1 / last["records_per_cpu_s"], 1 / LEAST_RATE, "s")
        keep("records_scale", rows, [*summary, cost], record_bytes=RECORD_BYTES, batch=BATCH, batches=BATCHES)


if __name__ == "__main__":
    main()
