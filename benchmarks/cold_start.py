"""One image by command, from nothing: `raphael generate` with the shipped model beside a bare `import torch`.

Both are processes of their own, in turns, on one thread; each number is the least of its runs, in seconds of the
processor (user and system) and of the wall. Then a batch of 64 images in one process: the share of the wall that is the
network's own.

    python benchmarks/cold_start.py [--runs 7] [--quick]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _machine import judged, keep

PROMPT = "a red circle on a blue background"
BATCH = 64


def spent(command: list[str]) -> tuple[float, float]:
    """(seconds of the processor, of the wall) of a process that has to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def batch_shares(count: int) -> dict[str, float]:
    """Seconds of a call of `count` images, and of the network within it."""
    import torch

    from raphael import RaphaelPipeline

    torch.set_num_threads(1)
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    pipeline.batch_size = count
    inside = 0.0

    def before(*_: object) -> None:
        nonlocal inside
        inside -= time.perf_counter()

    def after(*_: object) -> None:
        nonlocal inside
        inside += time.perf_counter()

    pipeline("warm up", num_inference_steps=1)
    pipeline.unet.register_forward_pre_hook(before)
    pipeline.unet.register_forward_hook(after)
    start = time.perf_counter()
    pipeline(PROMPT, num_images_per_prompt=count)
    return {"images": count, "wall_s": time.perf_counter() - start, "network_s": inside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="once, nothing kept")
    arguments = parser.parse_args()
    runs = 1 if arguments.quick else arguments.runs
    rows, least = [], {}
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "raphael.cli", "generate", PROMPT, "--checkpoint", "scenes", "--device", "cpu"]
        image = [*ours, "--out", str(Path(folder) / "out")]
        commands = {"torch": [sys.executable, "-c", "import torch"], "image": image}
        for run in range(runs):
            for name, command in commands.items():
                cpu, wall = spent(command)
                rows.append({"run": run, "what": name, "cpu_s": cpu, "wall_s": wall})
                print(f"{name}: {cpu:.2f} s of the processor, {wall:.2f} s of the wall", flush=True)
    for name in commands:
        for kind in ("cpu_s", "wall_s"):
            least[name, kind] = min(row[kind] for row in rows if row["what"] == name)
    shares = batch_shares(2 if arguments.quick else BATCH)
    print(f"{shares['images']} images: {shares['wall_s']:.2f} s, the network {shares['network_s']:.2f} s")
    summary = [
        judged(f"one image, {name}, beside import torch", least["image", kind], least["torch", kind], "s", "<= 2.0")
        for name, kind in (("processor", "cpu_s"), ("wall", "wall_s"))
    ]
    network = f"the network of a batch of {shares['images']}"
    summary.append(judged(network, shares["network_s"], shares["wall_s"], "s", ">= 0.9"))
    if not arguments.quick:
        keep("cold_start", [*rows, shares], summary, runs=runs)


if __name__ == "__main__":
    main()
