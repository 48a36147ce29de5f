"""What the gateway costs: processor time per image of download and resize, against img2dataset by itself.

Both fetch the same photographs from the same loopback server (a process of its own, not counted) with the same
img2dataset settings; ours goes through the gateway and decodes in a child with limits, and the time of both is counted.
Starting the processes costs seconds and happens once in 5,000 rows of a real run, so each way runs over few and over
many rows, and the difference counts.

Then a bomb: a PNG of 8000 x 8000 pixels in 0.26 MB. How long until it is refused, and how much memory that took.

    python benchmarks/download.py [--photographs FOLDER] [--rows 512] [--peer-bomb] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from _machine import judged, keep, within

PROJECT = Path(__file__).resolve().parent.parent
COCO = PROJECT.parent / "shared" / "data" / "coco"
HOST = "photographs.invalid"
FEW_ROWS = 32
BOMB_SIDE_PX = 8000


def photographs(given: str, folder: Path, number: int) -> tuple[str, list[str]]:
    """Copies in `folder` of at most `number` real photographs, or drawn ones. Returns (which they are, names)."""
    folder.mkdir()
    found = sorted(Path(given).rglob("*.jpg")) if given else sorted(COCO.glob("*2017/*.jpg"))
    for path in found[:number]:
        (folder / path.name).write_bytes(path.read_bytes())
    if not found:
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        for index in range(min(number, 64)):
            coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
            coarse.save(folder / f"{index:04d}.jpg", quality=92)
    return "photographs" if found else "drawn", sorted(path.name for path in folder.iterdir())


def _serve(folder: str, port, stop) -> None:
    from data_pipeline.download.serve_images import serve

    with serve(Path(folder)) as server:
        port.put(server.port)
        stop.wait()


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """The port of an image server in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    port, stop = spawn.SimpleQueue(), spawn.Event()
    process = spawn.Process(target=_serve, args=(str(folder), port, stop), daemon=True)
    process.start()
    try:
        yield port.get()
    finally:
        stop.set()
        process.join()


def processor_s() -> tuple[float, float]:
    """(of this process, of its children that have ended)."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return tuple(each.ru_utime + each.ru_stime for each in used)


def download(work: Path, names: list[str], rows: int, port: int, through_gateway: bool) -> tuple[float, float, int]:
    """(processor seconds of this process, the gateway's; of the downloader's; images) of one run."""
    import psutil
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.download import run_img2dataset
    from data_pipeline.gateway.proxy import Gateway, Policy
    from raphael.base.config.params import load_config

    config = load_config(PROJECT / "params.yaml").download
    config = dataclasses.replace(
        config, shard_rows=rows, image_size_px=256, encode_format="jpg", encode_quality=95, deadline_s=60, timeout_s=60
    )
    out, table = work / "out", work / "rows.parquet"
    paths = [f"{names[row % len(names)]}?{row}" for row in range(rows)]
    with Gateway(Policy(local_host=HOST, local_port=port, timeout_s=60, deadline_s=60)) as gateway:
        if through_gateway:
            urls = [gateway.sign(row, f"http://{HOST}/{path}") for row, path in enumerate(paths)]
        else:
            urls = [f"http://127.0.0.1:{port}/{path}" for path in paths]
        work.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": range(rows), "url": urls}), table)
        command = run_img2dataset.command(config, str(table), str(out))
        before, mine = processor_s(), {process.pid for process in psutil.Process().children()}
        subprocess.run(
            command if through_gateway else command[:-1], check=True,  # without limits its own resizer decodes
            env={**run_img2dataset.environment(), "PYTHONPATH": str(PROJECT)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for orphan in psutil.Process().children():  # decoders, ended with the worker that they belonged to
            if orphan.pid not in mine:
                os.waitpid(orphan.pid, 0)
        own_s, children_s = (after - then for after, then in zip(processor_s(), before))
    return own_s, children_s, json.loads((out / "00000_stats.json").read_text())["successes"]


def per_picture_ms(names: list[str], rows: int, port: int, through_gateway: bool) -> float:
    seconds = []
    for count in (FEW_ROWS, FEW_ROWS + rows):
        with tempfile.TemporaryDirectory() as folder:
            own_s, children_s, pictures = download(Path(folder) / "work", names, count, port, through_gateway)
        if pictures != count:
            raise SystemExit(f"got {pictures} images of {count} rows, expected all: the comparison would mean nothing")
        seconds.append(own_s + children_s)
    return 1000 * (seconds[1] - seconds[0]) / rows


def bomb(side_px: int) -> bytes:
    """A whole, valid PNG of side x side RGBA zeros."""
    packer, packed = zlib.compressobj(9), []
    for _ in range(side_px):
        packed.append(packer.compress(bytes(1 + 4 * side_px)))
    packed.append(packer.flush())

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side_px, side_px, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"".join(packed)) + chunk(b"IEND", b"")


def _refuse(port: int, picture: bytes, by_peer: bool, answer) -> None:
    """Ours: the gateway's fetch. Peer: img2dataset's resizer on the body, as it would have fetched it."""
    if by_peer:
        from img2dataset.resizer import Resizer

        resizer = Resizer(256, "keep_ratio", True, max_image_area=16.8e6)
        act = lambda: resizer(io.BytesIO(picture))[-1]  # noqa: E731
    else:
        from data_pipeline.gateway.proxy import Policy, fetch

        policy = Policy(local_host=HOST, local_port=port)
        fetch(f"http://{HOST}/absent.png", policy)  # what is loaded once is not the bomb's
        act = lambda: fetch(f"http://{HOST}/bomb.png", policy).reason  # noqa: E731
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.perf_counter()
    reason = act()
    seconds = time.perf_counter() - started_s
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answer.put({"reason": str(reason), "ms": round(1000 * seconds, 2), "grown_mb": round(grown_mb, 1)})


def refused(port: int, picture: bytes, by_peer: bool) -> dict:
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.SimpleQueue()
    process = spawn.Process(target=_refuse, args=(port, picture, by_peer, answer))
    process.start()
    process.join()
    return answer.get() if process.exitcode == 0 else {"reason": "killed", "ms": None, "grown_mb": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", default="", help="a folder of .jpg, instead of COCO's beside the project")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-bomb", action="store_true", help="the bomb through img2dataset too: it takes 5 GB")
    parser.add_argument("--quick", action="store_true", help="24 rows, once; nothing is kept")
    arguments = parser.parse_args()
    rows, repeats = (24, 1) if arguments.quick else (arguments.rows, arguments.repeats)
    picture = bomb(BOMB_SIDE_PX)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: who is orphaned below us is ours, and its time counted
    with tempfile.TemporaryDirectory() as folder:
        which, names = photographs(arguments.photographs, Path(folder) / "pictures", rows)
        (Path(folder) / "pictures/bomb.png").write_bytes(picture)
        with server(Path(folder) / "pictures") as port:
            turns = [[per_picture_ms(names, rows, port, way) for way in (True, False)] for _ in range(repeats)]
            ours, peer = (min(turn[way] for turn in turns) for way in (0, 1))
            ours_bomb = refused(port, picture, by_peer=False)
            peer_bomb = refused(port, picture, by_peer=True) if arguments.peer_bomb else {"ms": None, "grown_mb": None}
    print(f"{rows} {which}: {ours:.2f} ms of processor an image through the gateway, {peer:.2f} ms bare")
    print(f"bomb: {ours_bomb['reason']} after {ours_bomb['ms']} ms, {ours_bomb['grown_mb']} MB more; peer {peer_bomb}")
    summary = [
        judged("processor time per image; peer: img2dataset bare", ours, peer, "ms", "<= 1.1"),
        within("bomb, time to refuse", ours_bomb["ms"], 50, "ms"),
        within("bomb, memory to refuse", ours_bomb["grown_mb"], 64, "MB"),
    ]
    if not arguments.quick:
        bombs = {"ours": ours_bomb, "img2dataset": peer_bomb}
        keep("download", [{"ours_ms": a, "bare_ms": b} for a, b in turns], summary, pictures=which, bombs=bombs)


if __name__ == "__main__":
    main()
