"""Two ranks of which one is stopped, hangs, or meets a loss that is not finite: `python fault_toy.py FOLDER KIND`."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from truth.toy_training import LOOP, ToyData, ToyObjective

from raphael.train.distributed.watchdog import WorkerLost
from raphael.train.distributed.world import PLAIN
from raphael.train.loop import Hooks, World, train

LIMIT_S = 6.0
AT_IMAGES = 40


class Hanging(ToyData):
    """Rank 1's data, which never comes once the loop is at AT_IMAGES."""

    calls = 0

    def batch(self, indices):
        self.calls += 1
        if self.calls > AT_IMAGES // LOOP.batch_size:
            time.sleep(600)
        return super().batch(indices)


def work(folder: Path, kind: str, rank: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S)
    )
    loop = replace(LOOP, num_images=80, max_bad_steps=3, spike_factor=50.0)
    world = World(rank, 2, "cpu", replace(PLAIN, collective_timeout_s=LIMIT_S))
    objective = ToyObjective()
    objective.poison = 17 if kind == "poisoned" else None
    ended_s = time.monotonic()

    def progress(images: int) -> None:
        nonlocal ended_s
        ended_s = time.monotonic()

    def freeze(*_) -> None:
        if int(objective.calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)

    if kind in ("stopped", "killed") and rank == 1:
        objective.register_forward_hook(freeze)
    data = Hanging() if kind == "hung" and rank == 1 else ToyData()
    try:
        train(
            objective, data, loop, 7, folder=folder / "checkpoints", world=world,
            hooks=Hooks(progress=progress, say=lambda _: None),
        )  # fmt: skip
    except WorkerLost as error:
        if rank == 0:
            (folder / "line").write_text(str(error))
            (folder / "seconds").write_text(str(time.monotonic() - ended_s))


def main(folder: str, kind: str) -> int:
    """Two forked ranks; returns rank 0's status, and ends rank 1 where that does not end by itself."""
    torch.set_num_threads(1)
    ranks = []
    for rank in (0, 1):
        if not (child := os.fork()):
            try:
                work(Path(folder), kind, rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks.append(child)
    _, status = os.waitpid(ranks[0], 0)
    if kind in ("stopped", "hung"):
        os.kill(ranks[1], signal.SIGKILL)
    os.waitpid(ranks[1], 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
