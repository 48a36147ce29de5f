"""Everything a training is at the boundary between two steps: what a checkpoint must hold so that going on from it is
the same, bit for bit, as never having stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from raphael.checkpoint import Stored
from raphael.checkpoint_parts import CheckpointError, Groups
from raphael.config import LoopConfig
from raphael.strict import to_dict
from raphael.train.ema import Ema
from raphael.train.optim import make_optimizer
from raphael.train.sharding import own, place, to_save

RECENT = 64  # losses whose median a spike is measured by
# Settings that may change between a checkpoint and its resumption (num_images: upwards)
FREE = (
    "num_images", "log_every_images", "checkpoint_every_images", "sample_every_images", "heldout_every_images",
    "max_bad_steps", "spike_factor", "ema_on_cpu", "keep_checkpoints",
)  # fmt: skip
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # of AdamW, of Muon


class State:
    """Weights, optimizer, average, images seen, the sums of the current log interval, and the points logged so far."""

    def __init__(self, objective: nn.Module, loop: LoopConfig, facts: dict[str, Any]):
        self.loop = loop
        # a network's shape is known by its tensors; what else its losses depend on, an objective may tell
        self.facts = {"loop": to_dict(loop), "objective": getattr(objective, "settings", {}), **facts}
        self.parameters = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        owned = {name for name, _ in objective.named_parameters()}
        self.buffers = {
            name: value for name, value in objective.state_dict(keep_vars=True).items() if name not in owned
        }
        self.optimizer = make_optimizer(objective, loop)
        start = -(-loop.ema_start_images // loop.batch_size)
        self.averages = {
            name: Ema(self.parameters, decay, start, loop.ema_every_steps, loop.ema_on_cpu)
            for name, decay in loop.averages.items()
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
        return self.averages["ema"]

    def update_averages(self) -> None:
        for average in self.averages.values():
            average.update(self.step)

    def using(self, weights: str) -> contextlib.AbstractContextManager[None]:
        """Inside, the objective has these weights: "raw", its own, or those of an average."""
        return contextlib.nullcontext() if weights == "raw" else self.averages[weights].applied()

    @property
    def kinds(self) -> list[str]:
        """The weights there are: "raw", and every average that is on."""
        return ["raw", *(name for name, average in self.averages.items() if average.decay)]

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

    def pack(self, chief: bool = True) -> tuple[Groups, dict[str, Any]]:
        """(groups, meta) for a checkpoint: whole tensors, or this rank's shares of those that are shared out, with
        whole ones at the chief alone. Nothing is copied or sent: it holds until the next step.
        """
        optimizer = {
            f"{name}.{moment}": tensor
            for name, parameter in self.parameters.items()
            for moment, tensor in self.optimizer.moments(parameter).items()
        }
        groups = {
            "model": {**self.parameters, **self.buffers},
            "optimizer": optimizer,
            **{name: average.stored() for name, average in self.averages.items()},
            "sums": dict(self.sums),
            "recent": {"losses": self.recent},
        }
        groups = {kind: to_save(tensors, chief) for kind, tensors in groups.items()}
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
        """Become what was packed, by whatever number of workers; of what is shared out this rank reads its share.
        Returns lines that a person should read.

        Raises CheckpointError where it belongs to another training. The pace of logs, checkpoints and pictures may be
        another, the rules for bad steps too, and num_images larger.
        """
        meta = stored.meta
        notes = self._compare(meta["facts"], meta["images_seen"], where)
        self.extended = [*meta.get("extended", []), *self.extended]
        mine = {"model": {**self.parameters, **self.buffers}}
        for kind, tensors in (mine | {name: average.average for name, average in self.averages.items()}).items():
            _copy(tensors, stored, kind, f"{where}: {kind}")
        moments = {
            parameter: {
                moment: _moment(stored, f"{name}.{moment}", parameter)
                for moment in MOMENTS
                if f"{name}.{moment}" in stored.groups["optimizer"]
            }
            for name, parameter in self.parameters.items()
        }
        self.optimizer.restore({parameter: found for parameter, found in moments.items() if found})
        device = next(iter(self.parameters.values())).device
        self.sums = {name: stored.read("sums", name).to(device) for name in stored.groups["sums"]}
        self.images, self.summed_steps, self.history = meta["images_seen"], meta["summed_steps"], meta["history"]
        for average in self.averages.values():
            average.count = self.step
        self.heldout, self.bad_in_row = meta.get("heldout", []), meta.get("bad_in_row", 0)
        self.recent = stored.read("recent", "losses").to(device)
        return notes

    def _compare(self, stored: dict[str, Any], images: int, where: object) -> list[str]:
        made, now = flat(decisive(stored)), flat(decisive(self.facts))
        for key in made.keys() & now.keys():  # what only one knows was added to the settings since
            if made[key] != now[key]:
                raise CheckpointError(
                    f"{where}: made with {key} {made[key]}, this training has {now[key]}; delete that folder to start "
                    "over, or restore the settings to go on"
                )
        before, wanted = stored["loop"]["num_images"], self.loop.num_images
        if wanted < before:
            raise CheckpointError(
                f"{where}: made with loop.num_images {before}, this training has {wanted}, expected at least {before}; "
                "delete that folder to start over, or restore the settings to go on"
            )
        if wanted == before:
            return []
        self.extended = [{"at_images": images, "from": before, "to": wanted}]
        note = f"loop.num_images was raised from {before:,} to {wanted:,} after {images:,} images"
        if self.loop.schedule != "constant":
            note += "; the rate follows the longer schedule from here, which one run of that length did from its start"
        return [note]


def decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without what may change."""
    return {**facts, "loop": {name: value for name, value in facts["loop"].items() if name not in FREE}}


def flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loop": {"betas": 1}} -> {"loop.betas": 1}"""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


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
