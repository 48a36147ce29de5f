"""The rates that `raphael plan` counts with, each of one core of this machine, in processor time.

Lists are made up (benchmarks/select_rows.py), photographs and captions those beside the project where they are. A stage
runs twice in a process of its own, the first time over few rows, so that imports are not counted. What needs a GPU is
left as not measured. `--write` also puts the numbers into data_pipeline/tools/scale/rates.json.

    python benchmarks/rates.py [--only NAME ...] [--write] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _apart import apart
from _machine import keep, machine, result_file

from raphael.base.files import written_whole
from raphael.base.stage import Stage, read_json

PROJECT = Path(__file__).resolve().parent.parent
TABLE = PROJECT / "data_pipeline/tools/scale/rates.json"
SHARD_ROWS, FEW, SIDE_PX = 10_000, 2_000, 256
Measured = dict[str, float]  # name of a rate -> its value


def cpu_s(act: Callable[[], Any]) -> float:
    began_s = time.process_time()
    act()
    return time.process_time() - began_s


def settings(**sections: dict[str, Any]) -> Any:
    """The project's, of each section some changed."""
    from raphael.base.config.params import load_config

    config = load_config(PROJECT / "params.yaml")
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def run_stage(name: str, root: Path, config: Any) -> tuple[float, int]:
    """(its processor seconds, the rows that it keeps) in the workspace `root`."""
    import importlib

    os.chdir(root)
    stage = importlib.import_module(f"data_pipeline.{name}.stage")
    seconds = cpu_s(lambda: stage.run(config, Stage(name, root)))
    return seconds, read_json(root / f"reports/{name}.json")["kept"]


def warm_then(
    name: str, rows: int, make: Callable[[Path, int], None], config: Callable[[Path], Any]
) -> tuple[float, int]:
    """As run_stage, over `rows`, after a run over few."""
    for count in (min(FEW, rows), rows):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make(root, count)
            found = run_stage(name, root, config(root))
            os.chdir(PROJECT)
    return found


def source_rows(quick: bool) -> Measured:
    from select_rows import write_list

    rows = 20_000 if quick else 500_000
    seconds, _ = warm_then(
        "source",
        rows,
        lambda root, count: write_list(root / "list.parquet", count),
        lambda root: settings(source={"kind": "parquet", "path": str(root / "list.parquet"), "max_rows": 0}),
    )
    return {"source.rows": rows / seconds}


def select_rows(quick: bool) -> Measured:
    from select_rows import write_list

    rows = 20_000 if quick else 500_000

    def make(root: Path, count: int) -> None:
        (root / "data/source").mkdir(parents=True)
        write_list(root / "data/source/metadata.parquet", count)

    config = settings(select={"score_rules": True, "unique_urls": True})
    return {"select.rows": rows / warm_then("select", rows, make, lambda root: config)[0]}


def download(quick: bool) -> Measured:
    """Of photographs from a server on loopback. Starting img2dataset is not counted: few rows are taken off."""
    import ctypes

    import download as bench
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.download.shards import pack

    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, as benchmarks/download.py
    rows, used = 24 if quick else 384, []
    with tempfile.TemporaryDirectory() as folder:
        _, names = bench.photographs("", Path(folder) / "pictures", rows)
        with bench.server(Path(folder) / "pictures") as port:
            for count in (bench.FEW_ROWS, bench.FEW_ROWS + rows):
                work = Path(folder) / f"work{count}"
                *seconds, images = bench.download(work, names, count, port, True)
                if images != count:
                    raise SystemExit(f"got {images} images of {count} rows, expected all")
                used.append(seconds)
        links = work / "links.parquet"
        columns = {"id": range(count), "url": [f"http://a.example/{n}.jpg" for n in range(count)]}
        pq.write_table(pa.table({**columns, "caption": ["a photograph"] * count}), links)
        (work / "shards").mkdir()
        packing_s = [cpu_s(lambda: pack(work / "out", links, work / "shards", 0)) for _ in range(2)][-1]
    gateway_s, workers_s = (after - before for before, after in zip(*used))
    if min(gateway_s, workers_s) <= 0 and not quick:
        raise SystemExit(f"got {gateway_s:.2f} and {workers_s:.2f} s for {rows} rows more: take more rows")
    return {
        "download.gateway": rows / gateway_s,
        "download.worker": rows / workers_s,
        "download.pack": count / packing_s,
    }


def filter_rows(quick: bool) -> Measured:
    """Without the search for what looks alike."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.download.shards import table_schema

    rows, config = 20_000 if quick else 300_000, settings(filter={"near_duplicate_bits": 0})

    def make(root: Path, count: int) -> None:
        (root / "data/shards").mkdir(parents=True)
        (root / "data/selected").mkdir()
        rng = np.random.default_rng(0)
        links = {"id": np.arange(count), "similarity": rng.uniform(0.2, 0.5, count), "unsafe": rng.beta(1, 8, count)}
        links |= {"watermark": rng.beta(1, 2, count), "aesthetic": rng.normal(5.0, 0.5, count)}
        pq.write_table(pa.table(links), root / "data/selected/links.parquet")
        for shard, start in enumerate(range(0, count, SHARD_ROWS)):
            ids = range(start, min(count, start + SHARD_ROWS))
            digests = [hashlib.sha256(b"%d" % number).hexdigest() for number in ids]
            sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), [640] * len(ids))
            texts = {"url": [f"http://a.example/{n}.jpg" for n in ids], "caption": [f"a photograph, {n}" for n in ids]}
            columns = {"key": [f"{n:09d}" for n in ids], "id": ids, **texts, "status": ["success"] * len(ids), **sizes}
            columns |= {"reason": [None] * len(ids), "sha256": digests, "source_sha256": digests}
            name = root / f"data/shards/{shard:05d}"
            pq.write_table(pa.table(columns, schema=table_schema()), name.with_suffix(".parquet"))
            name.with_suffix(".tar").touch()

    return {"filter.rows": rows / warm_then("filter", rows, make, lambda root: config)[0]}


def filter_memory(quick: bool) -> Measured:
    """What `filter` keeps of every image to know equal bytes: 128 bits of its sha256, in a set."""
    import psutil

    images, seen = 20_000 if quick else 1_000_000, set()
    before = psutil.Process().memory_info().rss
    for number in range(images):
        seen.add(bytes.fromhex(hashlib.sha256(b"%d" % number).hexdigest()[:32]))
    return {"filter.memory": (psutil.Process().memory_info().rss - before) / len(seen)}


def stored_images(number: int) -> list[bytes]:
    """Photographs with a short side of SIDE_PX, as `download` stores them."""
    from download import photographs
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        _, names = photographs("", Path(folder) / "pictures", number)
        bodies = []
        for name in names[:number]:
            image = Image.open(Path(folder) / "pictures" / name).convert("RGB")
            scale = SIDE_PX / min(image.size)
            resized = image.resize([max(SIDE_PX, round(side * scale)) for side in image.size])
            resized.save(stream := io.BytesIO(), "JPEG", quality=95)
            bodies.append(stream.getvalue())
    return bodies


def images(quick: bool) -> Measured:
    """What is done with every stored image before a network sees it."""
    from encode_scale import make_tar

    from data_pipeline.common.images import Shard, fit
    from data_pipeline.filter.near_duplicates import HashTask, hash_shard
    from raphael.encoders.edges.detectors import edge_map

    bodies = stored_images(8 if quick else 256)
    keys = tuple(f"{number:09d}" for number in range(len(bodies)))
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "00000.tar"
        make_tar(tar, dict(zip(keys, bodies)), "jpg")
        tasks = [HashTask(Path(folder) / f"{turn}.npy", tar, keys, len(keys)) for turn in range(2)]
        hashing_s = [cpu_s(lambda task=task: hash_shard(task)) for task in tasks][-1]

        def read() -> None:
            import numpy as np

            shard = Shard(tar)
            fitted = np.stack([fit(shard.image(key), SIDE_PX, SIDE_PX) for key in keys])
            edge_map(fitted, SIDE_PX // 8)
            shard.close()

        reading_s = [cpu_s(read) for _ in range(2)][-1]
    return {"filter.hash": len(keys) / hashing_s, "encode.picture": len(keys) / reading_s}


def near(quick: bool) -> Measured:
    from near_duplicates import search

    rows = 20_000 if quick else 10_000_000
    return {"filter.near": rows / search(rows)["cpu_s"]}


def captions(quick: bool) -> Measured:
    """Parts as a worker cleans them, and the table that the stage joins of them."""
    import captions as bench
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.captions import stage
    from data_pipeline.captions.part import CHUNK_ROWS, Cleaner, Part

    rows = 5_000 if quick else 60_000
    found = next(iter(bench.corpora(argparse.Namespace(captions="")).values()))
    numbers = range(rows)
    texts = {"key": [f"{n:09d}" for n in numbers], "shard": [f"{n // SHARD_ROWS:05d}.tar" for n in numbers]}
    texts["caption"] = [found[n % len(found)] for n in numbers]
    sizes = {name: pa.array([640] * rows, pa.int32()) for name in ("width", "height")}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pq.write_table(pa.table({**texts, **sizes}), root / "pictures.parquet", row_group_size=5_500)
        worker = Cleaner(root / "pictures.parquet", settings().captions, CHUNK_ROWS)
        worker(Part(root / "few.arrow", 0, min(FEW, rows)))  # ftfy's import
        parts = [
            Part(root / f"{start}.arrow", start, min(CHUNK_ROWS, rows - start)) for start in range(0, rows, CHUNK_ROWS)
        ]
        cleaning_s = cpu_s(lambda: [worker(part) for part in parts])
        joining_s = [cpu_s(lambda: stage._write(root / "captions.parquet", parts)) for _ in range(2)][-1]
    return {"captions.rows": rows / cleaning_s, "captions.join": rows / joining_s}


def join(quick: bool) -> Measured:
    """Chunks of records of 256 px, as `encode` joins them."""
    import numpy as np

    from raphael.base.records import RecordWriter

    count, per_chunk = (512, 256) if quick else (8_192, 512)
    side = SIDE_PX // 8
    shapes = {"moments": ("float16", (8, side, side)), "token_ids": ("int32", (77,)), "edges": ("uint8", (side, side))}
    size = sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in shapes.values())
    with tempfile.TemporaryDirectory() as folder:
        rng, chunk = np.random.default_rng(0), Path(folder) / "chunk.npz"
        parts = {name: rng.integers(0, 200, (per_chunk, *shape)).astype(kind) for name, (kind, shape) in shapes.items()}
        np.savez(chunk, **parts)

        def joined() -> None:
            with RecordWriter(Path(folder) / "records", {"256x256": shapes}, {}, unique=True) as writer:
                for start in range(0, count, per_chunk):
                    with np.load(chunk) as arrays:
                        keys = [f"{key:09d}" for key in range(start, start + per_chunk)]
                        writer.append(keys, {name: arrays[name] for name in shapes}, "256x256")

        return {"encode.join": count * size / cpu_s(joined)}


def networks(quick: bool) -> Measured:
    """One core, float32, weights at random: kl-f8 as in the preset sd, and a CLIP ViT-L/14."""
    if quick:
        return {}
    import open_clip
    import torch
    from diffusers import AutoencoderKL

    from raphael.base.config.preset import load_preset

    vae, found = load_preset("sd").vae, {}
    levels = len(vae.channels)
    torch.set_num_threads(1)
    with torch.inference_mode():
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(vae.channels), layers_per_block=vae.layers_per_block, latent_channels=4,
            norm_num_groups=vae.norm_groups, mid_block_add_attention=vae.attention,
        ).eval()  # fmt: skip
        pixels = torch.rand(1, 3, SIDE_PX, SIDE_PX) * 2 - 1
        seconds = min(cpu_s(lambda: model.encode(pixels)) for _ in range(3))
        found["encode.cpu"] = SIDE_PX**2 / 1e6 / seconds
        clip = open_clip.create_model("ViT-L-14", pretrained=None).eval()
        image = torch.rand(4, 3, 224, 224)
        seconds = min(cpu_s(lambda: clip.encode_image(image)) for _ in range(3))
        found["score.cpu"] = len(image) / seconds
    return found


def md5(quick: bool) -> Measured:
    """A file of the page cache, a mebibyte at a time, which is how DVC reads it."""
    size = (16 if quick else 512) << 20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(os.urandom(1 << 20) * (size >> 20))

        def read() -> None:
            digest = hashlib.md5(usedforsecurity=False)
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)

        read()
        return {"dvc.md5": size / cpu_s(read)}


GROUPS = {
    "source": source_rows, "select": select_rows, "download": download, "filter": filter_rows, "memory": filter_memory,
    "images": images,
    "near": near, "captions": captions, "join": join, "networks": networks, "md5": md5,
}  # fmt: skip


def group(name: str, quick: bool) -> dict[str, Any]:
    """In a process of its own."""
    return GROUPS[name](quick)


def write(rows: list[dict[str, Any]], measured: str) -> None:
    """The measured numbers into the table; names, units and words stay as they are."""
    table, here = read_json(TABLE), machine()
    unknown = {row["rate"] for row in rows} - set(table["rates"])
    assert not unknown, unknown
    for row in rows:
        table["rates"][row["rate"]]["value"] = row["value"]
    table["machine"] = {"processor": here["processor"], "cores": here["cores"], "measured": measured}
    with written_whole(TABLE) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="into the plan's table, too")
    parser.add_argument("--quick", action="store_true", help="few rows, nothing kept")
    arguments = parser.parse_args()
    units, rows, loads = read_json(TABLE)["rates"], [], {}
    print("| rate | value | unit |\n| --- | ---: | --- |")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that measure
    for name in arguments.only:
        found = apart(group, name, arguments.quick)
        loads[name] = round(os.getloadavg()[0], 1)
        for rate in [key for key in found if key in units]:
            value = float(f"{found[rate]:.4g}")
            rows.append({"rate": rate, "value": value, "unit": units[rate]["unit"], "load": loads[name]})
            print(f"| {rate} | {value:,.4g} | {units[rate]['unit']} |", flush=True)
    if arguments.quick:
        return
    file = result_file("rates")
    if file.is_file():  # what was not measured now stays as it was
        new = {row["rate"] for row in rows}
        rows = sorted([row for row in read_json(file)["results"] if row["rate"] not in new] + rows, key=_by_name)
    file = keep("rates", rows, [], note="of one core, in processor time; load: of the machine, meanwhile")
    if arguments.write:
        write(rows, read_json(file)["measured"])


def _by_name(row: dict[str, Any]) -> str:
    return row["rate"]


if __name__ == "__main__":
    main()
