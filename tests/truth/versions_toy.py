"""Two ranks, forked, of which one has another torch: `python versions_toy.py FOLDER` writes what each was told."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from raphael.base.stage import StageError
from raphael.train.distributed.versions import check_versions
from raphael.train.distributed.world import World


def rank_of_two(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    check_versions(World(rank, 2))  # the same so far
    if rank == 1:
        torch.__version__ = "2.14.1"
    try:
        check_versions(World(rank, 2))
    except StageError as error:
        (folder / str(rank)).write_text(str(error))
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    """The number of ranks that failed."""
    children = []
    for rank in (0, 1):
        if not (child := os.fork()):
            try:
                rank_of_two(folder, rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return sum(bool(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
