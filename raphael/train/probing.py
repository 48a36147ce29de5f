"""The probe while training: at every held-out evaluation, what the weights of that moment know of captions.

Few scenes, so that it costs a few seconds: a curve, not a number to report. It reads weights and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raphael.base.precision import autocast
from raphael.base.probe_set import ProbeSet
from raphael.net.condition import Condition
from raphael.objectives.probe import Network, in_place, judge, network_errors, verdicts
from raphael.train.distributed.world import World


class Probed:
    """`heldout` (raphael/train/heldout.py) with the probe's shares beside its losses, as "probe/<fact>".

    objective: unet, schedule and prediction. latents: of the images `asked.rows`, scaled. Every rank must call it:
    passes are dealt out to the ranks, and any number of them gives the same bits.
    """

    def __init__(
        self,
        heldout: Callable[[], dict[str, float]],
        objective: Any,
        asked: ProbeSet,
        latents: Tensor,
        encode: Callable[[list[str]], Condition],
        world: World,
        precision: str,
    ):
        self.heldout, self.objective, self.asked = heldout, objective, asked
        self.latents, self.encode = in_place(asked, latents.to(world.device)), encode
        self.world, self.precision = world, precision

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        network, world = Network(self.objective.unet, self.objective.schedule, self.objective.prediction), self.world
        errors = network_errors(network, self.latents, self.encode)
        with autocast(self.precision, world.device):
            if world.sharded:  # a forward needs every rank
                found = judge(errors, self.asked)
            else:
                mine = judge(errors, self.asked, lambda number: number % world.size == world.rank)
                found = world.sum(mine.to(world.device)).cpu()
        shares = {f"probe/{name}": verdict.share for name, verdict in verdicts(found, self.asked).items()}
        return {**self.heldout(), **shares}
