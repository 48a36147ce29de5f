"""What the search for hashes that differ in at most 4 of 64 bits takes, and how it grows.

Hashes are made up: a tenth differs from an earlier one in 0 to 8 bits. As a perceptual hash's, half of the bits of each
are set. Each size runs in a process of its own: the seconds of the search, of one core, and the largest memory. The
peer is the search as it was: one band of five as key (bands_of_key held at 1), where it can be waited for.

    python benchmarks/near_duplicates.py [--rows 100000 1000000 10000000] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _apart import apart
from _machine import judged, keep, within

from data_pipeline.filter import bands

ROWS, RADIUS, BATCH = (100_000, 1_000_000, 10_000_000), 4, 100_000
PEER_ROWS = 1_000_000  # at most
LIMIT_S = 1800.0  # for ten million


def made_up(count: int, seed: int) -> np.ndarray:
    """uint64 (count,)."""
    rng = np.random.default_rng(seed)
    order = rng.random((count, 64), np.float32)
    bits = order > np.median(order, axis=1, keepdims=True)
    hashes = np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
    again = rng.choice(count, count // 10, replace=False)
    flips = np.zeros(len(again), np.uint64)
    for _ in range(8):
        bit, set_ = (rng.integers(0, high, len(again)).astype(np.uint64) for high in (64, 2))
        flips ^= set_ << bit
    hashes[again] = hashes[rng.integers(0, count, len(again))] ^ flips
    return hashes


def search(count: int, wide: int = 0) -> dict[str, Any]:
    """wide: bands in a key; 0: as many as are chosen."""
    if wide:
        bands.bands_of_key = lambda *_: wide
    with tempfile.TemporaryDirectory() as folder:
        found, seconds = bands.HashBands(Path(folder) / "bands", RADIUS, count), 0.0
        for start in range(0, count, BATCH):
            hashes = made_up(min(BATCH, count - start), start)
            began = time.process_time()
            found.add(hashes)
            seconds += time.process_time() - began
        began = time.process_time()
        dropped = found.drop()
        seconds += time.process_time() - began
    return {"rows": count, "cpu_s": seconds, "dropped": len(dropped), "bands": bands.bands_of_key(RADIUS, count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--quick", action="store_true", help="20,000 rows, nothing kept")
    arguments = parser.parse_args()
    rows, summary = [], []
    print("| rows | bands in a key | CPU s | with one band | dropped | memory MB |\n" + "| ---: " * 6 + "|")
    for count in (20_000,) if arguments.quick else arguments.rows:
        row, was = apart(search, count), None
        if count <= PEER_ROWS:
            was = apart(search, count, 1)
            assert was["dropped"] == row["dropped"], (was, row)
        rows.append({**row, "one_band_cpu_s": was and was["cpu_s"]})
        shown = f"{was['cpu_s']:.2f}" if was else ""
        cells = [f"{count:,}", row["bands"], f"{row['cpu_s']:.2f}", shown, f"{row['dropped']:,}"]
        print("|", " | ".join(map(str, [*cells, f"{1000 * row['peak_gb']:.0f}"])), "|", flush=True)
        if was and not arguments.quick:
            summary.append(judged(f"near duplicates of {count:,}; peer: one band", row["cpu_s"], was["cpu_s"], "CPU s"))
    if not arguments.quick:
        last = rows[-1]
        summary.append(within(f"near duplicates of {last['rows']:,}", last["cpu_s"], LIMIT_S, "CPU s"))
        keep("near_duplicates", rows, summary, radius=RADIUS)


if __name__ == "__main__":
    main()
