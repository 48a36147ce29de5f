"""The denoiser's training as one of several workers, for tests: python bucket_training.py WORKSPACE OUT RANK WORLD."""

from __future__ import annotations

import sys
from pathlib import Path


def run(root: Path, out: Path, rank: int, world_size: int) -> None:
    """Train the workspace's model to the end with checkpoints in `out`; rank 0 prints nothing, files are the result."""
    import torch

    from raphael.base.config.params import load_config
    from raphael.systems.raphael.training import Folders, build_denoising
    from raphael.train.loop import Hooks, World, train

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if world_size > 1:
        store = f"file://{out.resolve()}.rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    config = load_config(root / "params.yaml")
    objective, records = build_denoising(config, Folders.of(root, root / "work"))
    hooks = Hooks(say=lambda _: None)
    train(objective, records, config.train.loop, config.train.seed, folder=out, world=World.current(), hooks=hooks)
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
