"""Trainings that one world begins and others go on with: `python relay_toy.py FOLDER ATTEMPT...`, or killed at random.

An attempt is STRATEGY:SIZE:IMAGES, such as fsdp2:2:48, killed with -9 once rank 0 has seen so many images (0: never).
Or it is random:STRATEGY:SIZE:SEED: killed, each time at a random moment of rank 0, and begun again, until it has ended.
Prints how often something was killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from truth.parallel_toy import BlockObjective
from truth.toy_training import LOOP, ToyData

from raphael.train.distributed.world import PLAIN

RELAY = replace(  # a batch that 1, 2 and 3 workers can share
    LOOP, num_images=240, batch_size=12, log_every_images=24, checkpoint_every_images=24, sample_every_images=0
)


def work(folder: Path, strategy: str, size: int, rank: int, die_at: int, delay_s: float) -> None:
    from raphael.train.loop import Hooks, World, train

    if size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}.{os.getppid()}.{attempts}", rank=rank, world_size=size
        )

    def progress(images: int) -> None:
        if images == die_at:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    world = World(rank, size, "cpu", replace(PLAIN, strategy=strategy))
    objective = BlockObjective(seed=rank)
    train(objective, ToyData(), RELAY, 7, folder=folder, world=world, hooks=Hooks(progress=progress, say=str))
    if size > 1:
        torch.distributed.destroy_process_group()


attempts = 0


def attempt(folder: Path, strategy: str, size: int, die_at: int = 0, delay_s: float = 0.0) -> bool:
    """Fork the ranks. Whether all went to the end; where one was killed or failed, the others are killed, too."""
    global attempts
    attempts += 1
    ranks = []
    for rank in range(size):
        if not (child := os.fork()):
            try:
                work(folder, strategy, size, rank, die_at, delay_s)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks.append(child)
    worst = 0
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        if status and not worst:
            worst = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    if worst > 0:
        raise SystemExit(f"a rank failed by itself with status {worst}")
    return worst == 0


def at_random(folder: Path, strategy: str, size: int, seed: int) -> int:
    """Killed at most 12 times, while it writes a checkpoint or just after. Returns how often."""
    rng = random.Random(seed)
    for kills in range(12):
        whole = sorted(folder.glob("[0-9]*"))
        seen = int(whole[-1].name) if whole else 0
        die_at = min(seen + RELAY.batch_size * rng.randint(2, 4), RELAY.num_images)
        if attempt(folder, strategy, size, die_at, 0.05 * rng.random()):
            return kills
    attempt(folder, strategy, size)
    return 12


def main(folder: str, arguments: list[str]) -> None:
    import torch._dynamo  # noqa: F401 (what the first optimizer imports, once for all)
    import torch.distributed.fsdp  # noqa: F401

    import raphael.train.loop  # noqa: F401

    torch.set_num_threads(1)
    killed = 0
    for argument in arguments:
        kind, *rest = argument.split(":")
        if kind == "random":
            killed += at_random(Path(folder), rest[0], int(rest[1]), int(rest[2]))
        else:
            killed += not attempt(Path(folder), kind, int(rest[0]), int(rest[1]))
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
