"""What a second worker brings at the same global batch: one process, two as torch does it, two as the loop does it.

The network is the preset `scenes`, its records random, its optimizer Muon, one thread a process, batch 16 and 32:

alone     one process
torch     two processes: DistributedDataParallel with find_unused_parameters, every rank orthogonalises every matrix
ours      two processes: one message of all gradients after the backward, each rank orthogonalises its share
          (raphael/train/distributed/exchange.py, raphael/train/optim/muon.py)

The ways run in turns, each turn a fresh pair of processes; of each way the median of its turns counts. Parts of a step
(forward and backward with the gradients' exchange, clipping, optimizer) are rank 0's. Writes
results/two_workers-<device>-<yyyymm>.json, unless --quick. Ray's start is no part of it: it is once a training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from _machine import judged, keep
from training_loop import make_workspace

from raphael.base.config.params import load_config
from raphael.base.stage import read_json, write_json

WAYS = {"alone": 1, "torch": 2, "ours": 2}
BATCHES = (16, 32)
WARM = 3


def work(rank: int, way: str, batch: int, steps: int, home: str, meeting: str) -> None:
    """One rank of a turn: `steps` steps; rank 0 writes <way>.json. meeting: a file that no other turn met at."""
    import torch

    from raphael.base.randomness import SampleRng
    from raphael.systems.raphael.training import Folders, build_denoising
    from raphael.train.distributed import parallel
    from raphael.train.distributed.world import World
    from raphael.train.optim.optimizer import clip_gradients, make_optimizer

    torch.set_num_threads(1)
    folder, size = Path(home), WAYS[way]
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    world = World(rank, size)
    if way == "torch":
        parallel.EXCHANGED = ()
    config = load_config(folder / "params.yaml")
    train = replace(config.train, settings={**config.train.settings, "edge_weight": 0.0})
    config = replace(config, train=train)
    objective, records = build_denoising(config, Folders.of(folder, folder / "work"))
    objective.train()
    optimizer = make_optimizer(objective, config.train.loop, world if way == "ours" else World())
    replica = parallel.Replica(objective, world, "auto")
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    parts = {"gradients": 0.0, "clip": 0.0, "optimizer": 0.0}
    slice_size = batch // size
    for step in range(WARM + steps):
        if step == WARM:
            parts, began_s = dict.fromkeys(parts, 0.0), time.perf_counter()
        first = (step * batch + rank * slice_size) % (len(records) - slice_size)
        indices = np.arange(first, first + slice_size)
        tensors = {name: torch.from_numpy(array) for name, array in records.batch(indices).items()}
        at = [time.perf_counter()]
        replica.gradients(tensors, SampleRng(0, np.zeros(slice_size, np.int64), indices))
        at.append(time.perf_counter())
        clip_gradients(trained, 1.0)
        at.append(time.perf_counter())
        optimizer.masked_step(None)
        at.append(time.perf_counter())
        optimizer.zero_grad()
        for name, before, after in zip(parts, at, at[1:], strict=False):
            parts[name] += after - before
    whole_s = time.perf_counter() - began_s
    if rank == 0:
        told = {name: seconds / steps for name, seconds in parts.items()}
        write_json(folder / f"{way}.json", {"images_per_s": batch * steps / whole_s, "parts_s": told})
    if size > 1:
        torch.distributed.destroy_process_group()


def turn(way: str, batch: int, steps: int, home: Path) -> dict:
    import torch

    with tempfile.TemporaryDirectory(dir=home) as meeting:
        torch.multiprocessing.spawn(work, (way, batch, steps, str(home), f"{meeting}/ranks"), nprocs=WAYS[way])
    return {"way": way, "batch": batch, **read_json(home / f"{way}.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn of two steps: does it run at all")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of a turn")
    arguments = parser.parse_args()
    turns, steps = (1, 2) if arguments.quick else (arguments.turns, arguments.steps)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        make_workspace(folder)
        params = (folder / "params.yaml").read_text(encoding="utf-8")
        (folder / "params.yaml").write_text(params.replace("preset: tiny ", "preset: scenes "), encoding="utf-8")
        for number in range(turns):
            for batch in BATCHES:
                for way in list(WAYS) if number % 2 == 0 else reversed(WAYS):
                    rows.append(turn(way, batch, steps, folder))
                    print(
                        f"turn {number + 1}  batch {batch}  {way:<6} {rows[-1]['images_per_s']:6.1f} images/s",
                        flush=True,
                    )
    summary = []
    for batch in BATCHES:
        rate = {
            way: statistics.median(row["images_per_s"] for row in rows if (row["way"], row["batch"]) == (way, batch))
            for way in WAYS
        }
        summary.append(judged(f"two workers, one, batch {batch}", rate["ours"], rate["alone"], "images/s", ">= 1.6"))
        summary.append(
            judged(f"two workers, torch's, batch {batch}", rate["ours"], rate["torch"], "images/s", ">= 1.0")
        )
    for row in summary:
        print(f"{row['case']:<44} {row['ratio']:6.3f}  target {row['target']}  {'met' if row['met'] else 'MISSED'}")
    if not arguments.quick:
        keep("two_workers", rows, summary, steps=steps, preset="scenes", threads_each=1)


if __name__ == "__main__":
    main()
