from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raphael.base.records import MOMENTS, Records
from raphael.base.strict import to_dict
from raphael.systems.job import Training, TrainingJob

FAIL_AT: dict[str, int] = {}  # part -> the call of its objective that fails, as a machine does


class Fit(nn.Module):
    """A linear map of a noised record to the record, less what the part before has found."""

    def __init__(self, name: str, width: int, before: torch.Tensor | None):
        super().__init__()
        self.name, self.calls = name, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(name))
            self.net = nn.Linear(width, width)
        if before is not None:
            self.register_buffer("before", before)

    def forward(self, batch: dict[str, torch.Tensor], rng: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == FAIL_AT.get(self.name):
            raise RuntimeError("the machine is gone")
        x = batch[MOMENTS].float().flatten(1)[:, : self.net.in_features]
        noise = rng.normal("noise", x.shape[1:])
        target = x - self.before if hasattr(self, "before") else x
        loss = (self.net(x + noise) - target).square().mean()
        return {"loss": loss, "size": target.square().mean().detach()}


def training(job: TrainingJob) -> Training:
    settings, records = job.config.model.load(), Records(job.folders.records)
    before = job.trained("mean")[0]["model"]["net.bias"] if "mean" in job.part.needs else None
    return Training(Fit(job.part.name, settings.width, before), records)


def identity(config: Any, folders: Any) -> list[Any]:
    return ["pair", to_dict(config.model.load()), config.train.seed, config.train.loop.decisive()]


def described(config: Any, folders: Any) -> dict[str, Any]:
    return {"system": "pair", "settings": to_dict(config.model.load())}
