"""Whether the stage `encode` costs the same a picture however many there are, and how much memory it takes.

Pictures of 8 x 8 px into records of pixels and labels: as little work a picture as there can be, so that what grows
with the number of rows shows. Each size is a run of the stage in a process of its own, over shards of 10,000; seconds
are the processor's, without imports; memory is the largest of the process, with them.

    python benchmarks/encode_scale.py [--rows 10000 100000 1000000] [--quick]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from _machine import judged, keep, within

from flows.workspace.settings import flat, merged

ROWS, SHARD_ROWS = (10_000, 100_000, 1_000_000), 10_000
PROJECT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "green", "blue")


def picture(side_px: int) -> tuple[bytes, str]:
    """An image of one colour as PNG, or from 64 px on a smooth one as JPEG, whose decoding is work."""
    import numpy as np
    from PIL import Image

    stream = io.BytesIO()
    if side_px < 64:
        Image.new("RGB", (side_px, side_px), (200, 30, 30)).save(stream, "PNG")
        return stream.getvalue(), "png"
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side_px // 16, side_px // 16, 3), np.uint8))
    coarse.resize((side_px, side_px), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue(), "jpg"


def make_tar(path: Path, bodies: dict[str, bytes], suffix: str) -> None:
    """A shard's images by key."""
    with tarfile.open(path, "w") as tar:
        for key, body in bodies.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


def make(root: Path, count: int, side_px: int = 8) -> None:
    """data/shards, data/captions and the settings, as the stages before would leave them. side_px: of the images; the
    records' are 8 px."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "data/shards").mkdir(parents=True)
    (root / "data/captions").mkdir()
    body, suffix = picture(side_px)
    schema = pa.schema([(name, pa.string()) for name in ("key", "shard", "caption")])
    with pq.ParquetWriter(root / "data/captions/captions.parquet", schema) as writer:
        for shard in range(-(-count // SHARD_ROWS)):
            numbers = range(shard * SHARD_ROWS, min(count, (shard + 1) * SHARD_ROWS))
            keys = [f"{number:09d}" for number in numbers]
            make_tar(root / f"data/shards/{shard:05d}.tar", dict.fromkeys(keys, body), suffix)
            captions = [f"a {COLOURS[number % 3]} square, number {number} of a long list" for number in numbers]
            names = [f"{shard:05d}.tar"] * len(keys)
            writer.write_table(pa.table({"key": keys, "shard": names, "caption": captions}, schema=schema))
    own = {"picture.sizes_px": [[8, 8]], "encode.batch_size": 32, "encode.label_pattern": "red|green|blue"}
    overlay = flat(PROJECT / "params.ddpm.yaml")  # of pixels and labels
    (root / "params.yaml").write_text(merged(PROJECT / "params.yaml", overlay, own), encoding="utf-8")


def encode(root: Path) -> dict[str, float]:
    """Run the stage; what it took. In a process of its own."""
    import raphael.encoders.autoencoder  # noqa: F401  seconds of imports are no work on pictures
    import raphael.encoders.text  # noqa: F401
    from data_pipeline.encode import stage
    from raphael.base.config.params import load_config
    from raphael.base.stage import Stage

    os.chdir(root)
    config = load_config(root / "params.yaml")
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    stage.run(config, Stage("encode", root))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return {"cpu_s": cpu_s, "wall_s": wall_s, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--quick", action="store_true", help="1,000 rows, nothing kept")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(encode(arguments.run)))
        return
    rows = []
    print("| rows | CPU us a picture | s | memory MB |\n| ---: | ---: | ---: | ---: |")
    for count in (1000,) if arguments.quick else arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), count)
            command = [sys.executable, __file__, "--run", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"rows": count, **json.loads(done.stdout.splitlines()[-1])}
        rows.append({**row, "cpu_us_a_picture": 1e6 * row["cpu_s"] / count})
        print(f"| {count:,} | {rows[-1]['cpu_us_a_picture']:.1f} | {row['wall_s']:.1f} | {row['rss_mb']:.0f} |")
    if not arguments.quick:
        first, last = rows[0]["cpu_us_a_picture"], rows[-1]["cpu_us_a_picture"]
        case = f"encode, a picture of {rows[-1]['rows']:,}; peer: of {rows[0]['rows']:,}"
        limit = within(f"encode, memory at {rows[-1]['rows']:,} rows", rows[-1]["rss_mb"], 1500.0, "MB")
        keep("encode_scale", rows, [judged(case, last, first, "CPU us", "<= 1.05"), limit])


if __name__ == "__main__":
    main()
