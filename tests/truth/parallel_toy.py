"""A toy network with blocks, and the same trainings of it alone and as two processes, each in a folder of its own."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth.tiny_raphael import ROOT, small_unet
from truth.toy_training import LOOP, ToyData

from raphael.base.config.params import LoopConfig, ParallelConfig, load_config
from raphael.base.config.preset import load_preset
from raphael.base.records import EDGES, MOMENTS, TOKEN_IDS
from raphael.diffusion.sampling import Parts, Sampling, generate_latents
from raphael.net.condition import Condition
from raphael.net.moe.unet import RaphaelUNet
from raphael.objectives.denoising import DenoisingObjective, LatentScale
from raphael.train.distributed import parallel as parallel_module
from raphael.train.distributed.parallel import EXCHANGED
from raphael.train.distributed.world import PLAIN

SHORT = replace(LOOP, num_images=80, log_every_images=40, checkpoint_every_images=40, sample_every_images=40)
MUON = replace(SHORT, optimizer="muon")
# name -> (settings of the loop, how it is spread). Of what is compared, one worker's truth is that of (loop, PLAIN).
RUNS = {
    "ddp": (SHORT, PLAIN),
    "ddp-passes": (SHORT, replace(PLAIN, micro_batch=3)),
    "ddp-torch": (SHORT, PLAIN),  # torch's DistributedDataParallel, as on GPUs
    "ddp-torch-passes": (SHORT, replace(PLAIN, micro_batch=3)),
    "ddp-muon": (MUON, PLAIN),
    "fsdp2": (SHORT, replace(PLAIN, strategy="fsdp2")),
    "fsdp2-passes": (SHORT, replace(PLAIN, strategy="fsdp2", micro_batch=1)),
    "fsdp2-recomputed": (SHORT, replace(PLAIN, strategy="fsdp2", checkpoint_activations="blocks")),
    "fsdp2-muon": (MUON, replace(PLAIN, strategy="fsdp2")),
    "fsdp2-bf16": (replace(SHORT, precision="bf16"), replace(PLAIN, strategy="fsdp2")),
}


class Block(nn.Module):
    """A gate that is asked outside the block, too, and an odd number of rows, which two workers cannot share evenly."""

    recompute = False

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 3)
        self.mix = nn.Linear(dim, dim)
        self.ran = 0

    def forward(self, x):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        self.ran += 1
        weight = self.gate(x).softmax(-1).amax(-1, keepdim=True)
        return x + weight * self.mix(self.norm(x)).tanh(), weight.mean()


class Network(nn.Module):
    """Every second sample takes the second of two plain modules: one that no sample of a rank takes is idle there."""

    def __init__(self, dim: int = 33):
        super().__init__()
        self.first = nn.Linear(6, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.last = nn.Linear(dim, 6)

    def transformer_blocks(self):
        return list(self.blocks)

    def forward(self, x, kind):
        h = self.first(x)
        for block in self.blocks:
            h, _ = block(h)
        out = torch.zeros_like(h)
        for which in kind.unique().tolist():
            out[kind == which] = self.experts[which](h[kind == which]).to(out.dtype)
        return self.last(out)

    def balance(self):
        grid = torch.linspace(-1, 1, 33)
        return torch.stack([block.gate(grid).softmax(-1).square().sum() for block in self.blocks]).mean()


class BlockObjective(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = Network()

    def forward(self, batch, rng):
        noise = rng.normal("noise", (6,))
        error = (self.network(batch["x"] + noise, batch["index"] % 2).float() - noise).square().mean()
        return {"loss": error + 0.01 * self.network.balance(), "error": error}


class LatentData:
    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.fields = {
            MOMENTS: rng.standard_normal((24, 8, 8, 8)).astype(np.float32),
            TOKEN_IDS: rng.integers(0, 9, (24, 16)),
            EDGES: rng.integers(0, 256, (24, 8, 8)).astype(np.uint8),
        }

    def __len__(self) -> int:
        return 24

    def batch(self, indices):
        return {name: array[indices] for name, array in self.fields.items()}


def denoising() -> DenoisingObjective:
    """RAPHAEL's own objective at the smallest size, whose texts are rows of a random table."""
    torch.manual_seed(0)
    unet = RaphaelUNet(small_unet()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    table = torch.randn(9, 32)
    config = load_config(ROOT / "params.yaml").training()

    def encode(token_ids):
        return Condition(table[token_ids], token_ids > 1)

    diffusion = load_preset("tiny").diffusion
    return DenoisingObjective(unet, encode, torch.zeros(16), diffusion, config, LatentScale(1.0))


def run_denoising(folder: Path, parallel: ParallelConfig, world_size: int = 1, rank: int = 0):
    """Three steps of it. Returns what the loop returned, and predictions by images seen."""
    from raphael.train.loop import Hooks, World, train

    loop = replace(
        LOOP, num_images=12, batch_size=4, log_every_images=4, checkpoint_every_images=12, sample_every_images=4
    )
    objective, drawn = denoising(), {}

    def encode(texts):
        context = torch.linspace(-1, 1, 2 * 16 * 32).view(2, 16, 32)
        return Condition(context[[len(text) for text in texts]], torch.ones(len(texts), 16, dtype=torch.bool))

    parts = Parts(objective.unet, objective.schedule, objective.prediction, encode, torch.nn.Identity(), (4, 8, 8))

    def draw(images, weights):
        drawn[images] = generate_latents(parts, ["", "a"], [(0, 0), (0, 1)], Sampling(steps=3)).clone()

    result = train(
        objective, LatentData(), loop, 7, folder=folder, world=World(rank, world_size, "cpu", parallel),
        hooks=Hooks(on_sample=draw, say=lambda _: None),
    )  # fmt: skip
    return result, drawn


def run(name: str, folder: Path, loop: LoopConfig | None = None, world_size: int = 1, rank: int = 0, die_at: int = 0):
    """Train one of RUNS to the end. Returns (objective, what the loop returned, {images: an image})."""
    from raphael.train.loop import Hooks, World, train

    settings, parallel = RUNS[name]
    if name.startswith("ddp-torch"):
        parallel_module.EXCHANGED = ()
    objective = BlockObjective(seed=rank)  # only rank 0's weights may count
    pictures = {}

    def draw(images, weights):
        with torch.no_grad():
            pictures[images] = objective.network(torch.ones(2, 6), torch.arange(2)).float().clone()

    def progress(images):
        if images == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    result = train(
        objective, ToyData(), loop or settings, 7, folder=folder, world=World(rank, world_size, "cpu", parallel),
        hooks=Hooks(on_sample=draw, progress=progress, say=lambda _: None),
    )  # fmt: skip
    parallel_module.EXCHANGED = EXCHANGED
    return objective, result, pictures


def work(folder: str, rank: int, names: str, die_at: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous.{os.getppid()}", rank=rank, world_size=2
    )
    for name in names.split(","):
        if name == "raphael":
            parallel = replace(PLAIN, strategy="fsdp2", checkpoint_activations="blocks", micro_batch=1)
            _, pictures = run_denoising(Path(folder) / name, parallel, world_size=2, rank=rank)
        else:
            _, _, pictures = run(name, Path(folder) / name, world_size=2, rank=rank, die_at=die_at)
        if rank == 0:
            torch.save(pictures, Path(folder) / f"{name}.pt")
    torch.distributed.destroy_process_group()


def main(folder: str, names: str, die_at: int = 0) -> int:
    """Two ranks, forked: torch is imported once. The status is that of the first to fail; the other is killed then."""
    import torch.distributed.fsdp  # noqa: F401 (once for both)

    torch.set_num_threads(1)
    ranks = []
    for rank in (0, 1):
        if not (child := os.fork()):
            try:
                work(folder, rank, names, die_at if rank == 0 else 0)
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
    return abs(worst)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
