"""The probe beside the held-out loss: the same bits for any number of workers, and nothing of the training moves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raphael.base.config.preset import load_preset
from raphael.base.probe_set import Exchange, ProbeSet
from raphael.diffusion.prediction import Velocity
from raphael.diffusion.schedule import Schedule
from raphael.net.condition import Condition
from raphael.objectives.probe import BATCH
from raphael.train.distributed.world import World
from raphael.train.probing import Probed

N = 2 * BATCH + 3


def asked() -> ProbeSet:
    true = [f"{row % 3}" for row in range(2 * N)]
    rows = np.arange(N, 2 * N)  # not from the first image on
    facts = {"colour": Exchange(rows, [f"{(row + 1) % 3}" for row in rows]), "word": Exchange(rows[:5], ["0"] * 5)}
    return ProbeSet(np.zeros((2 * N, 4, 4, 3), np.uint8), true, ["single"] * 2 * N, [{}] * 2 * N, facts)


def encode(captions: list[str]) -> Condition:
    context = torch.tensor([float(caption) for caption in captions]).view(-1, 1, 1)
    return Condition(context, torch.ones(len(captions), 1, dtype=torch.bool))


def probed(world: World, calls: list[int] | None = None) -> Probed:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 2, 3, padding=1)

    def unet(x_t, t, text):
        if calls is not None:
            calls.append(len(x_t))
        levels = text.tokens.view(-1, 1, 1, 1).expand(-1, 1, *x_t.shape[2:])
        return SimpleNamespace(prediction=layer(torch.cat([x_t, levels], 1)))

    objective = SimpleNamespace(unet=unet, schedule=Schedule(load_preset("tiny").diffusion), prediction=Velocity())
    latents = torch.randn(N, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return Probed(lambda: {"denoise": 0.5}, objective, asked(), latents, encode, world, "fp32")


def test_the_losses_stay_and_shares_stand_beside_them_and_no_random_number_is_drawn():
    hook, state = probed(World()), torch.random.get_rng_state()
    found = hook()
    assert found["denoise"] == 0.5 and set(found) == {"denoise", "probe/colour", "probe/word"}
    assert all(0 <= found[name] <= 1 for name in found)
    assert hook() == found and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("sharded", [False, True])
def test_any_number_of_workers_gives_the_same_bits(sharded, monkeypatch):
    sums, counts, whole = [], [], probed(World())()

    class Part(World):
        def sum(self, tensor):
            sums.append(tensor.clone())
            return tensor

    plan = replace(World().parallel, strategy="fsdp2" if sharded else "ddp")
    found = []
    for rank in range(3):
        calls: list[int] = []
        found.append(probed(Part(rank, 3, parallel=plan), calls)())
        counts.append(len(calls))
    if sharded:
        assert found == [whole] * 3 and len(set(counts)) == 1  # a forward with shared weights needs all ranks
        return
    assert max(counts) - min(counts) <= 10 and sum(counts) == 7 * 5  # 3 + 3 + 1 passes at five timesteps
    alone = []
    monkeypatch.setattr(World, "sum", lambda self, tensor: alone.append(tensor.clone()) or tensor)
    probed(World())()
    assert torch.equal(sums[0] + sums[1] + sums[2], alone[0])
