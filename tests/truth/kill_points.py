"""Trainings ended by SIGKILL at random moments and resumed, beside one that was left alone: how many bits differ?

python kill_points.py FOLDER KIND COUNT SEED prints the answer as a line of JSON. KIND: bare (one process), ddp and
fsdp2 (two), ray (two workers). A training is the toy with blocks of truth/parallel_toy.py, activation checkpointing on;
what is compared is every byte of the last checkpoint: weights, average, moments, history.

bare, ddp, fsdp2: COUNT trainings, each killed once, in or around a random step of them all (around every twelfth a
checkpoint is being written). ray: one training in which a worker is killed COUNT times.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from truth.parallel_toy import BlockObjective
from truth.toy_training import LOOP, ToyData

from raphael.base.checkpoint.home import CheckpointHome
from raphael.train.distributed.world import PLAIN

STEPS = LOOP.num_images // LOOP.batch_size
KINDS = {"bare": (1, "ddp"), "ddp": (2, "ddp"), "fsdp2": (2, "fsdp2"), "ray": (2, "ddp")}  # workers, strategy
RAY_LIMIT_S = 12.0  # after which a worker that does not answer is missed
RAY_PAUSE_S = 0.3  # of a step, so that a training outlives its kills


class Counting(ToyData):
    """Counts its batches in memory that the parent sees."""

    def __init__(self, seen: mmap.mmap):
        super().__init__()
        self.seen = seen

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.seen[0] += 1
        return super().batch(indices)


class Slow(ToyData):
    """Says by a file that a step has begun, and takes its time."""

    def __init__(self, begun: Path, pause_s: float):
        super().__init__()
        self.begun, self.pause_s = begun, pause_s

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.begun.touch()
        time.sleep(self.pause_s)
        return super().batch(indices)


def work(folder: Path, kind: str, world: Any, data: ToyData) -> None:
    from raphael.train.loop import Hooks, train

    torch.set_num_threads(1)
    parallel = replace(PLAIN, strategy=KINDS[kind][1], checkpoint_activations="blocks")
    parallel = replace(parallel, collective_timeout_s=RAY_LIMIT_S if kind == "ray" else 600.0)
    world, hooks = replace(world, parallel=parallel), Hooks(say=_mute)
    train(BlockObjective(), data, LOOP, 7, folder=folder / "checkpoints", world=world, hooks=hooks)


def _mute(line: str) -> None:
    pass


def begin(folder: Path, kind: str, attempt: str, seen: mmap.mmap) -> list[int]:
    """Fork the ranks; torch is imported once, here. Rank 0 counts its steps in `seen`. Returns their process ids."""
    from raphael.train.loop import World

    size, ranks = KINDS[kind][0], []
    for rank in range(size):
        if not (child := os.fork()):
            try:
                if size > 1:
                    store = f"file://{folder}/rendezvous.{attempt}"
                    torch.distributed.init_process_group(
                        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=300)
                    )
                work(folder, kind, World(rank, size), ToyData() if rank else Counting(seen))
                if attempt == "imports":
                    (folder / "modules").write_text("\n".join(sys.modules))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks.append(child)
    return ranks


def finish(folder: Path, kind: str, attempt: str) -> float:
    """Train to the end. Returns the seconds it took."""
    started_s = time.monotonic()
    for rank in begin(folder, kind, attempt, mmap.mmap(-1, 1)):
        if os.waitpid(rank, 0)[1]:
            raise RuntimeError(f"{folder}: a rank of {kind} failed when nobody had killed it")
    return time.monotonic() - started_s


@dataclass
class Found:
    """images: of the checkpoint that the resumed training began from. writing: one was being written at the kill."""

    bits: int
    images: int
    writing: bool


def import_all(home: Path, kind: str) -> None:
    """Import here what a training imports on its way, so that no fork has to: most of its time would be that."""
    (home / "imports").mkdir()
    finish(home / "imports", kind, "imports")
    for name in (home / "imports/modules").read_text().splitlines():
        if name.split(".")[0] in ("torch", "safetensors", "raphael", "numpy"):
            with contextlib.suppress(ImportError):  # names that are made, not imported
                importlib.import_module(name)


def killed_once(folder: Path, kind: str, rng: random.Random, whole_s: float, truth: Path) -> Found | None:
    """One kill point; None where the training was over before it."""
    folder.mkdir(parents=True)
    seen, at = mmap.mmap(-1, 1), rng.randrange(STEPS)
    ranks, deadline_s = begin(folder, kind, "first", seen), time.monotonic() + 300
    while seen[0] < at and time.monotonic() < deadline_s:
        time.sleep(0.0005)
    time.sleep(rng.uniform(0.0, 3 * whole_s / STEPS))
    rng.shuffle(ranks)
    hit = False
    for rank in ranks:  # the others follow a little later: they notice, or they do not
        os.kill(rank, signal.SIGKILL)
        status = os.waitpid(rank, 0)[1]
        hit = hit or os.WIFSIGNALED(status)
        time.sleep(rng.uniform(0.0, 0.05))
    if not hit:
        return None
    home = CheckpointHome(folder / "checkpoints")
    images = max((int(path.name) for path in home.all()), default=0)
    writing = any(home.folder.glob(".[0-9]*"))
    finish(folder, kind, "second")
    return Found(differing_bits(folder / "checkpoints", truth), images, writing)


def by_processes(home: Path, kind: str, count: int, rng: random.Random) -> dict[str, Any]:
    home.mkdir(parents=True)
    (home / "whole").mkdir()
    import_all(home, kind)
    whole_s = finish(home / "whole", kind, "only")
    found: list[Found] = []
    for attempt in range(3 * count):
        if len(found) < count:
            one = killed_once(home / str(attempt), kind, rng, whole_s, home / "whole/checkpoints")
            found += [one] if one is not None else []
    return {
        "kills": len(found),
        "trainings": len(found),
        "same": sum(one.bits == 0 for one in found),
        "differing_bits": sum(one.bits for one in found),
        "resumed_from_images": sorted({one.images for one in found}),
        "while_writing_a_checkpoint": sum(one.writing for one in found),
    }


def ray_work(job: tuple[str, float], world: Any) -> None:
    folder = Path(job[0])
    work(folder, "ray", world, Slow(folder / "begun" / str(os.getpid()), job[1]))


class Killer:
    """A watch() that kills a random worker of every group, some seconds into its first step, `count` times in all."""

    def __init__(self, folder: Path, count: int, rng: random.Random):
        self.begun, self.count, self.rng = folder / "begun", count, rng
        self.begun.mkdir(parents=True)
        self.known: set[str] = set()
        self.home, self.images = CheckpointHome(folder / "checkpoints"), set()
        self.kills, self.due_s = 0, None

    def __call__(self) -> None:
        group = {path.name for path in self.begun.iterdir()} - self.known
        if self.kills == self.count or len(group) < KINDS["ray"][0]:
            return
        if self.due_s is None:
            self.due_s = time.monotonic() + self.rng.uniform(
                0.0, 15 * RAY_PAUSE_S
            )  # seldom past a checkpoint: else it ends first
        elif time.monotonic() >= self.due_s:
            os.kill(int(self.rng.choice(sorted(group))), signal.SIGKILL)
            self.images.add(max((int(path.name) for path in self.home.all()), default=0))
            self.known, self.due_s, self.kills = self.known | group, None, self.kills + 1


def by_ray(home: Path, count: int, rng: random.Random) -> dict[str, Any]:
    from raphael.train.distributed.ray_trainer import Cluster, fit

    (home / "whole").mkdir(parents=True)
    finish(home / "whole", "ddp", "only")  # two processes without Ray: the truth
    folder, killer = home / "killed", Killer(home / "killed", count, rng)
    cluster = Cluster(2, False, "kills", folder / "ray", max_failures=count + 5, timeout_s=RAY_LIMIT_S)
    fit(ray_work, (str(folder), RAY_PAUSE_S), cluster, killer)
    bits = differing_bits(folder / "checkpoints", home / "whole/checkpoints")
    found = {"kills": killer.kills, "trainings": 1, "same": int(bits == 0), "differing_bits": bits}
    return {**found, "resumed_from_images": sorted(killer.images)}


def differing_bits(one: Path, other: Path) -> int:
    """Of all files of the newest checkpoints; a file that is longer, or alone, differs in all that it has more."""
    first, second = (max(path for path in folder.glob("[0-9]*")) for folder in (one, other))
    if first.name != second.name:
        raise RuntimeError(f"got checkpoints at {first.name} and {second.name} images, expected the same")
    count = 0
    for name in {path.name for folder in (first, second) for path in folder.iterdir()}:
        a, b = (_bytes(folder / name) for folder in (first, second))
        size = min(len(a), len(b))
        count += int(np.unpackbits(a[:size] ^ b[:size]).sum()) + 8 * abs(len(a) - len(b))
    return count


def _bytes(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes() if path.exists() else b"", np.uint8)


def main(folder: str, kind: str, count: int, seed: int) -> None:
    import torch.distributed.fsdp  # noqa: F401 (once for all ranks)

    torch.set_num_threads(1)
    started_s, rng = time.monotonic(), random.Random(f"{kind} {seed}")
    home = Path(folder) / kind
    found = by_ray(home, count, rng) if kind == "ray" else by_processes(home, kind, count, rng)
    print(json.dumps({"kind": kind, **found, "seed": seed, "seconds": round(time.monotonic() - started_s, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
