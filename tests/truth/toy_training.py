"""A small objective and data set with all that a training loop has to get right, and runs of it in child processes."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raphael.base.config.params import LoopConfig

LOOP = LoopConfig(
    num_images=480, batch_size=8, optimizer="adamw", learning_rate=3e-3, warmup_images=40, schedule="cosine",
    weight_decay=0.01, betas=(0.9, 0.99), clip_norm=0.5, max_bad_steps=1, spike_factor=0.0, ema_decay=0.9,
    ema_more_decays=(), ema_start_images=0, ema_every_steps=1, ema_on_cpu=False, heldout_every_images=0,
    precision="fp32", log_every_images=40, checkpoint_every_images=96, sample_every_images=160,
    keep_checkpoints=2,
)  # fmt: skip


class ToyData:
    def __init__(self, count: int = 50):
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((count, 6)).astype(np.float32)
        self.kind = (np.arange(count) % 3).astype(np.int64)
        self.keys = [f"key{i:03d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": self.x[indices], "kind": self.kind[indices], "index": np.asarray(indices)}


class ToyObjective(nn.Module):
    """Denoises vectors. Three experts chosen by the sample's kind, plain modules: one nobody chose has no gradient at
    all. A fourth is never chosen; a frozen layer is never trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.poison: int | None = None  # a sample whose loss is not finite

    def forward(self, batch, rng):
        self.calls += 1
        noise = rng.normal("noise", (6,))
        x = self.norm(self.frozen(batch["x"]) + noise)
        hidden = torch.zeros_like(x)
        for kind in batch["kind"].unique().tolist():
            chosen = batch["kind"] == kind
            hidden[chosen] = self.experts[kind](x[chosen]).to(hidden.dtype)
        error = (self.head(hidden.tanh()) - noise).pow(2).mean(1)
        if self.poison is not None:
            error = error * torch.where(batch["index"] == self.poison, torch.inf, 1.0)
        loads = torch.stack([(batch["kind"] == kind).float().mean() for kind in range(3)])
        kinds = torch.nn.functional.one_hot(batch["kind"], 3).float()
        by_kind = {"of_kind": (error[:, None] * kinds).mean(0), "of_kind.share": kinds.mean(0)}
        return {"loss": error.mean(), "error": error.mean(), "load": loads, **by_kind}

    def heldout(self, batch, rng, place):
        """A loss of each sample at the noise level `place`."""
        noise = rng.normal("noise", (6,))
        x = self.norm(self.frozen(batch["x"]) + place[:, None].float() * noise)
        return (self.head(self.experts[0](x).tanh()) - noise).pow(2).mean(1)


def fingerprint(folder: Path) -> dict[str, str]:
    """sha256 of each file of the newest checkpoint."""
    newest = sorted(path for path in Path(folder).glob("[0-9]*"))[-1]
    return {newest.name + "/" + path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.iterdir()}


def run(folder: str, die_at: int = 0, signal: int = 9, world_size: int = 1, rank: int = 0) -> None:
    """Train to the end; or send this process (rank 0) the signal when it has seen `die_at` images."""
    from raphael.train.loop import Hooks, World, train

    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous.{os.environ['TOY_ATTEMPT']}",
            rank=rank,
            world_size=world_size,
        )

    def progress(images: int) -> None:
        if die_at and images == die_at:
            os.kill(os.getpid(), signal)

    train(
        ToyObjective(), ToyData(), replace(LOOP), 7,
        folder=Path(folder) / "checkpoints", world=World.current(), hooks=Hooks(progress=progress),
    )  # fmt: skip
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], *map(int, sys.argv[2:]))
