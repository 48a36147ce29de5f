"""The toy training as Ray workers run it: `python ray_toy.py FOLDER` is a driver that a test may end at any moment."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from truth.toy_training import LOOP, ToyData, ToyObjective


class SlowData(ToyData):
    """Slow enough that somebody can look, or interfere, while the workers are at it."""

    def __init__(self, pause_s: float):
        super().__init__()
        self.pause_s = pause_s

    def batch(self, indices: Any) -> dict[str, Any]:
        time.sleep(self.pause_s)
        return super().batch(indices)


def work(job: dict[str, Any], world: Any) -> None:
    from raphael.train.loop import train

    objective = ToyObjective()
    objective.poison = job.get("poison")
    if job.get("die_once") and world.rank == 1:
        marker = Path(job["folder"]) / "died"
        objective.register_forward_hook(lambda *_: _die_once(marker, int(objective.calls)))
    train(objective, SlowData(job["pause_s"]), LOOP, 7, folder=Path(job["folder"]) / "checkpoints", world=world)


def _die_once(marker: Path, calls: int) -> None:
    import os

    if calls == 40 and not marker.exists():
        marker.touch()
        os._exit(1)


def main(folder: str, pause_s: float = 1.0) -> None:
    from raphael.train.distributed.ray_trainer import Cluster, fit

    fit(work, {"folder": folder, "pause_s": pause_s}, Cluster(2, False, "toy", Path(folder) / "ray"))


if __name__ == "__main__":
    main(sys.argv[1])
