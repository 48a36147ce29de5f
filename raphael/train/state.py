"""Everything a training is at the boundary between two steps: what a checkpoint must hold so that resuming from it is
the same, bit for bit, as never having stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from raphael.base.checkpoint.folder import Stored
from raphael.base.checkpoint.parts import CheckpointError, Groups
from raphael.base.config.params import FREE, LoopConfig
from raphael.base.strict import flatten, to_dict
from raphael.train.distributed.sharding import own, place, to_save
from raphael.train.distributed.world import World
from raphael.train.optim.ema import Ema
from raphael.train.optim.optimizer import decay_begins, make_optimizer

RECENT = 64  # losses whose median a spike is measured by
OPTIMIZER_STATE = (  # of AdamW, of Muon, of Adafactor
    "step", "exp_avg", "exp_avg_sq", "momentum", "row_var", "col_var", "variance",
)  # fmt: skip


class State:
    """Weights (frozen ones and buffers, too), optimizer, EMA, images seen, the sums of the current log interval,
    and the points logged so far."""

    def __init__(self, objective: nn.Module, loop: LoopConfig, facts: dict[str, Any], world: World = World()):  # noqa: B008 (frozen)
        self.loop = loop
        # a network's shape is known by its tensors; what else its losses depend on, an objective may tell
        self.facts = {"loop": to_dict(loop), "objective": getattr(objective, "settings", {}), **facts}
        self.parameters = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        # with these a checkpoint is the whole objective, however little of it is trained
        self.fixed = {
            name: value for name, value in objective.state_dict(keep_vars=True).items() if name not in self.parameters
        }
        self.optimizer = make_optimizer(objective, loop, world)
        start = -(-loop.ema_start_images // loop.batch_size)
        self.emas = {
            name: Ema(self.parameters, decay, start, loop.ema_every_steps, loop.ema_on_cpu)
            for name, decay in loop.ema_decays.items()
        }
        self.images = 0
        self.sums: dict[str, Tensor] = {}
        self.summed_steps = 0
        self.history: list[dict[str, float]] = []
        self.heldout: list[dict[str, float]] = []  # held-out losses, at a pace of their own
        self.bad_in_row = 0  # steps (raphael/train/faults.py)
        device = next(iter(self.parameters.values())).device
        self.recent = torch.full((RECENT,), torch.nan, device=device)  # losses of the last good steps, where asked for
        self.extended: list[dict[str, int]] = []  # when num_images was raised

    @property
    def step(self) -> int:
        """Steps taken = number of the next one."""
        return self.images // self.loop.batch_size

    @property
    def ema(self) -> Ema:
        return self.emas["ema"]

    def update_emas(self) -> None:
        for ema in self.emas.values():
            ema.update(self.step)

    def using(self, weights: str) -> contextlib.AbstractContextManager[None]:
        """Inside, the objective has these weights: "raw", its own, or those of an EMA."""
        return contextlib.nullcontext() if weights == "raw" else self.emas[weights].applied()

    @property
    def kinds(self) -> list[str]:
        """The weights there are: "raw", and every EMA that is on."""
        return ["raw", *(name for name, ema in self.emas.items() if ema.decay)]

    def add(self, outputs: dict[str, Tensor], bad: Tensor) -> None:
        """Take the step's losses and statistics into the sums of this log interval. Stays on the device.

        bad: bool (); of a bad step only that is counted, as "skipped".
        """
        for name, value in {**outputs, "skipped": bad}.items():
            value = torch.as_tensor(value).detach().float()
            if name != "skipped":
                value = torch.where(bad, 0.0, value)
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.summed_steps += 1

    def pack(self, rank_0: bool = True) -> tuple[Groups, dict[str, Any]]:
        """(groups, meta) for a checkpoint: whole tensors, or this rank's shares of those that are sharded, with
        whole ones at rank 0 alone. Nothing is copied or sent: it holds until the next step.
        """
        optimizer = {
            f"{name}.{moment}": tensor
            for name, parameter in self.parameters.items()
            for moment, tensor in self.optimizer.moments(parameter).items()
        }
        groups = {
            "model": {**self.parameters, **self.fixed},
            "optimizer": optimizer,
            **{name: ema.stored() for name, ema in self.emas.items()},
            "sums": dict(self.sums),
            "recent": {"losses": self.recent},
        }
        groups = {kind: to_save(tensors, rank_0) for kind, tensors in groups.items()}
        meta = {
            "images_seen": self.images,
            "summed_steps": self.summed_steps,
            "history": list(self.history),
            **({"heldout": list(self.heldout)} if self.heldout else {}),
            "bad_in_row": self.bad_in_row,
            "extended": self.extended,
            "facts": self.facts,
            "config_sha256": sha256_of(decisive(self.facts)),
        }
        return groups, meta

    def unpack(self, stored: Stored, where: object) -> list[str]:
        """Become what was packed, by whatever number of workers; of what is sharded this rank reads its share.
        Returns lines that a person should read.

        Raises CheckpointError where it belongs to another training. The pace of logs, checkpoints and images may be
        another, max_bad_steps too, and num_images larger.
        """
        meta = stored.meta
        notes = self._compare(meta["facts"], meta["images_seen"], where)
        self.extended = [*meta.get("extended", []), *self.extended]
        mine = {"model": {**self.parameters, **self.fixed}}
        for kind, tensors in (mine | {name: ema.shadow for name, ema in self.emas.items()}).items():
            _copy(tensors, stored, kind, f"{where}: {kind}")
        moments = {
            parameter: {
                moment: _moment(stored, f"{name}.{moment}", parameter)
                for moment in OPTIMIZER_STATE
                if f"{name}.{moment}" in stored.groups["optimizer"]
            }
            for name, parameter in self.parameters.items()
        }
        self.optimizer.restore({parameter: found for parameter, found in moments.items() if found})
        device = next(iter(self.parameters.values())).device
        self.sums = {name: stored.read("sums", name).to(device) for name in stored.groups["sums"]}
        self.images, self.summed_steps, self.history = meta["images_seen"], meta["summed_steps"], meta["history"]
        for ema in self.emas.values():
            ema.count = self.step
        self.heldout, self.bad_in_row = meta.get("heldout", []), meta.get("bad_in_row", 0)
        self.recent = stored.read("recent", "losses").to(device)
        return notes

    def _compare(self, stored: dict[str, Any], images: int, where: object) -> list[str]:
        made, now = flatten(decisive(stored)), flatten(decisive(self.facts))
        for key in made.keys() & now.keys():  # what only one knows was added to the settings since
            if made[key] != now[key]:
                raise CheckpointError(
                    f"{where}: made with {key} {made[key]}, this training has {now[key]}; delete that folder to start "
                    "over, or restore the settings to resume"
                )
        before, wanted = stored["loop"]["num_images"], self.loop.num_images
        if self.loop.schedule == "trapezoid":
            return self._compare_trapezoid(stored["loop"], images, where)
        if wanted < before:
            raise CheckpointError(
                f"{where}: made with loop.num_images {before}, this training has {wanted}, expected at least {before}; "
                "delete that folder to start over, or restore the settings to resume"
            )
        if wanted == before:
            return []
        self.extended = [{"at_images": images, "from": before, "to": wanted}]
        note = f"loop.num_images was raised from {before:,} to {wanted:,} after {images:,} images"
        if self.loop.schedule != "constant":
            note += "; the rate follows the longer schedule from here, which one run of that length did from its start"
        return [note]

    def _compare_trapezoid(self, stored: dict[str, Any], images: int, where: object) -> list[str]:
        """Until a trapezoid falls its rate is constant: the fall may be moved, earlier too, as long as it has not begun
        and is not to have begun already. The result is the same as that of one run."""
        before, wanted = stored["num_images"], self.loop.num_images
        if (before, stored["decay_images"]) == (wanted, self.loop.decay_images):
            return []
        fell, falls = before - stored["decay_images"], decay_begins(self.loop)
        if images > min(fell, falls):
            raise CheckpointError(
                f"{where}: made after {images:,} images of a rate that falls from {fell:,} on, this training's falls "
                f"from {falls:,} on, expected {images:,} or later and a checkpoint from before the fall: set "
                "loop.num_images and loop.decay_images to that"
            )
        self.extended = [{"at_images": images, "from": before, "to": wanted}]
        return [f"the rate now falls from {falls:,} to {wanted:,} images, before from {fell:,} to {before:,}"]


def decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without what may change."""
    return {**facts, "loop": {name: value for name, value in facts["loop"].items() if name not in FREE}}


def sha256_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _moment(stored: Stored, name: str, parameter: Tensor) -> Tensor:
    """On the parameter's device (fused AdamW keeps its count there, too), in the parameter's order in memory.

    A file knows one order only. Fused AdamW pairs a parameter with its moments by their places in memory: moments of a
    channels-last convolution in the order of the file would be those of other weights, without a word.
    """
    if stored.groups["optimizer"][name]["shape"] != list(parameter.shape):
        return stored.read("optimizer", name).to(parameter.device)
    share = stored.read("optimizer", name, place(parameter), tuple(own(parameter).shape))
    moment = torch.empty_like(parameter, dtype=share.dtype, requires_grad=False)
    own(moment).copy_(share)
    return moment


@torch.no_grad()
def _copy(mine: dict[str, Tensor], stored: Stored, kind: str, where: str) -> None:
    theirs = stored.groups.get(kind, {})
    if mine.keys() != theirs.keys():
        name = sorted(mine.keys() ^ theirs.keys())[0]
        raise CheckpointError(
            f"{where}: {name} is only in {'the checkpoint' if name in theirs else 'this model'}; other preset?"
        )
    for name, tensor in mine.items():
        if (shape := theirs[name]["shape"]) != list(tensor.shape):
            raise CheckpointError(f"{where}: {name}: got shape {shape}, expected {list(tensor.shape)}; other preset?")
        tensor = tensor.detach()
        own(tensor).copy_(stored.read(kind, name, place(tensor), tuple(own(tensor).shape)))
