"""How fast encoded records come, shuffled, against webdataset with the very same records.

A record: moments (8, 32, 32) float16, 77 token ids int32, an edge map (32, 32) uint8; 17.7 kB. Ours goes through all
records in a random order, in batches, every shard compared with its hash inside the timed run. webdataset reads tars
of the same arrays as .npy in order, and mixes them in a buffer, as it is meant to: its order is less random than ours.
Both hand over batches of numpy arrays in one process; both read files that were just written, so from memory. The
seconds compared are the processor's: both use one thread, and on a busy machine they say more than the clock's.

    python benchmarks/records.py [--records 20000] [--repeats 3] [--quick]
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _machine import judged, keep

from raphael.base.randomness import permutation
from raphael.base.records import EDGES, MOMENTS, TOKEN_IDS, Records, RecordWriter

FIELDS = {MOMENTS: ("float16", (8, 32, 32)), TOKEN_IDS: ("int32", (77,)), EDGES: ("uint8", (32, 32))}
RECORD_BYTES = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in FIELDS.values())
BATCH, TAR_RECORDS, BUFFER = 256, 1000, 1000


def write(folder: Path, records: int) -> None:
    """The same made-up records twice: folder/records and folder/tars."""
    rng = np.random.default_rng(0)
    (folder / "tars").mkdir()
    with RecordWriter(folder / "records", FIELDS, {}) as writer:
        for start in range(0, records, TAR_RECORDS):
            count = min(TAR_RECORDS, records - start)
            keys = [f"{start + row:09d}" for row in range(count)]
            arrays = {
                name: rng.integers(0, 200, (count, *shape)).astype(dtype) for name, (dtype, shape) in FIELDS.items()
            }
            writer.append(keys, arrays)
            with tarfile.open(folder / "tars" / f"{start // TAR_RECORDS:05d}.tar", "w") as tar:
                for row, key in enumerate(keys):
                    for name, array in arrays.items():
                        buffer = io.BytesIO()
                        np.save(buffer, array[row])
                        member = tarfile.TarInfo(f"{key}.{name}.npy")
                        member.size = buffer.tell()
                        tar.addfile(member, io.BytesIO(buffer.getvalue()))


def ours(folder: Path, verify: bool = True) -> Iterator[list[np.ndarray]]:
    records = Records(folder / "records", verify=verify)
    order = permutation(0, 0, len(records))
    for start in range(0, len(records), BATCH):
        batch = records.batch(order[start : start + BATCH])
        yield [batch[name] for name in FIELDS]


def web(folder: Path) -> Iterator[list[np.ndarray]]:
    import webdataset  # before the clock starts, see main

    tars = [str(path) for path in sorted((folder / "tars").glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False).shuffle(BUFFER).decode()
    return iter(data.to_tuple(*(f"{name}.npy" for name in FIELDS)).batched(BATCH))


@dataclass
class Clock:
    """Seconds between start() and stop(), by the processor's clock and by the wall's."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    def start(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.cpu_s += time.process_time() - self.began[0]
        self.wall_s += time.perf_counter() - self.began[1]


def measured(reader: Callable[[Path], Iterator[list[np.ndarray]]], folder: Path) -> tuple[int, int, Clock]:
    """(records, a sum over all that was read, the time): equal sums show that all read the same. Opening counts."""
    count, total, clock = 0, 0, Clock()
    clock.start()
    for batch in reader(folder):
        clock.stop()
        count += len(batch[0])
        total += sum(int(array.astype(np.int64).sum()) for array in batch)
        clock.start()
    clock.stop()
    return count, total, clock


def compare(who: dict[str, Callable], folder: Path, repeats: int) -> tuple[list[dict], set[tuple[int, int]]]:
    """A printed row for each reader, its fastest run; and the (records, sum) that any of the runs read."""
    rows: list[dict] = []
    sums: set[tuple[int, int]] = set()
    print("| who | CPU s | s | records/CPU s | MB/CPU s | times webdataset |\n| --- | --- | --- | --- | --- | --- |")
    for label, reader in who.items():
        runs = [measured(reader, folder) for _ in range(repeats)]
        sums |= {(count, total) for count, total, _ in runs}
        count, _, clock = min(runs, key=lambda run: run[2].cpu_s)
        rate = count / clock.cpu_s
        times = rate / (rows[0]["records_per_s"] if rows else rate)
        row = {"who": label, "cpu_s": clock.cpu_s, "wall_s": clock.wall_s, "records_per_s": rate}
        rows.append({**row, "bytes_per_s": rate * RECORD_BYTES, "times_webdataset": times})
        print(
            f"| {label} | {clock.cpu_s:.3f} | {clock.wall_s:.3f} | {rate:,.0f} | {rate * RECORD_BYTES / 1e6:,.0f} "
            f"| {times:.1f} |"
        )
    return rows, sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--quick", action="store_true", help="2,000 records once, nothing kept")
    arguments = parser.parse_args()
    number, repeats = (2000, 1) if arguments.quick else (arguments.records, arguments.repeats)
    who = {
        "webdataset, in process": web,
        "ours, every shard hashed": ours,
        "ours, without hashes": lambda folder: ours(folder, verify=False),
    }
    import webdataset  # noqa: F401  a second of imports is no reading

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, number)
        print(f"{number:,} records of {RECORD_BYTES:,} bytes, batches of {BATCH}, the fastest of {repeats}\n")
        rows, sums = compare(who, folder, repeats)
    if len(sums) != 1:
        raise SystemExit(f"the readers did not read the same: {sums}")
    if not arguments.quick:
        rates = {row["who"]: row["records_per_s"] for row in rows}
        peer = rates.pop(rows[0]["who"])
        cases = [(who, ">= 25" if who == "ours, every shard hashed" else "") for who in rates if who.startswith("ours")]
        summary = [judged(f"{who}; peer: {rows[0]['who']}", rates[who], peer, "records/CPU s", t) for who, t in cases]
        keep("records", rows, summary, records=number, record_bytes=RECORD_BYTES, batch=BATCH)


if __name__ == "__main__":
    main()
