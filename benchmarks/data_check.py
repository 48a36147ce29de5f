"""How long `raphael data check` takes for 10,000 images, beside decoding each of them whole with Pillow, which finds
what is broken and nothing else. One core; photographs of COCO with their captions, each copy with another end, so that
none is a duplicate. Writes results/data_check-<device>-<yyyymm>.json, unless --quick.

    python benchmarks/data_check.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from _machine import judged, keep

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
TARGET_S = 60.0  # of 10,000 images


def collection(folder: Path, count: int) -> None:
    """`count` images in folders of a thousand: photographs and their captions, where they lie beside the project, else
    noise."""
    coco = SHARED / "coco"
    if coco.is_dir():
        told = json.loads((coco / "captions_val2017.json").read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in told["images"]}
        captions = {names[note["image_id"]]: note["caption"] for note in told["annotations"]}
        photographs = [path for path in sorted((coco / "val2017").glob("*.jpg")) if path.name in captions]
        bodies = [(path.read_bytes(), captions[path.name]) for path in photographs]
    else:
        bodies = [(_noise(number), f"noise number {number}") for number in range(50)]
    for number in range(count):
        body, caption = bodies[number % len(bodies)]
        place = folder / f"{number // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(body + number.to_bytes(8, "little"))
        (place / f"{number:06d}.txt").write_text(caption)


def _noise(number: int) -> bytes:
    import io

    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def checked_s(folder: Path) -> tuple[float, dict]:
    from data_pipeline.tools.checking.check import check, settings

    began_s = time.process_time()
    found, _ = check(settings(None, str(folder), "auto"))
    return time.process_time() - began_s, found


def decoded_s(folder: Path) -> float:
    from PIL import Image

    began_s = time.process_time()
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            image.convert("RGB")
    return time.process_time() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 images")
    arguments = parser.parse_args()
    count = 200 if arguments.quick else 10_000
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folder = Path(tempfile.mkdtemp(prefix="data_check_"))
    try:
        collection(folder, count)
        ours, found = checked_s(folder)
        peer = decoded_s(folder)
    finally:
        shutil.rmtree(folder)
    print(f"{count:,} images: data check {ours:.1f} s, Pillow's decoding alone {peer:.1f} s; used {found['used']:,}")
    if not arguments.quick:
        summary = [judged("10,000 images; beside the target", ours, TARGET_S, "s, one core", "<= 1.0")]
        summary.append(judged("10,000 images; peer: Pillow decodes them", ours, peer, "s, one core"))
        keep("data_check", [{"images": count, "ours_s": ours, "peer_s": peer, "used": found["used"]}], summary)


if __name__ == "__main__":
    main()
