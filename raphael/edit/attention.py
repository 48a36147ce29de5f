"""Prompt-to-prompt (arXiv 2208.01626): the target is drawn with the attention maps of the source.

A map says where, a token's value says what: with the source's maps and the target's values the layout stays. What the
project's layers do with an edited map, they do with any: Space-MoE cuts its regions from the edited one, so that
experts of the target's words act where the source had them.

Letters of the shape suffixes: R rows, H heads, P pixels, N tokens, n pairs. Rows 0 .. n-1 are sources, n .. 2n-1
targets; others are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raphael.edit.run import reached
from raphael.net.condition import AttentionHooks, HookCall


@dataclass
class AttentionEditor:
    """What is done to a target's maps. `hooks` are to be put on a condition of its 2n rows.

    matrix_NN, taken_N: columns of the source's map times the matrix replace the target's where taken (words.py).
    cross_N: the share of the steps, by token of the target, for which that goes on. factor_N: what a token's map is
    multiplied by after that, at every step; nothing is normalised again, as in the paper's equation for re-weighting.
    self_share: the share of the steps for which self-attention is the source's, on maps of at most self_pixels.
    """

    num_pairs: int
    matrix_NN: Tensor
    taken_N: Tensor
    cross_N: Tensor
    factor_N: Tensor
    self_share: float
    self_pixels: int

    @property
    def hooks(self) -> AttentionHooks:
        return AttentionHooks(edit=self.edit)

    def edit(self, call: HookCall, maps: Tensor) -> Tensor:
        targets = [place for place, row in enumerate(call.rows.tolist()) if self.num_pairs <= row < 2 * self.num_pairs]
        if not targets:
            return maps
        where = {row: place for place, row in enumerate(call.rows.tolist())}
        sources = [where[int(call.rows[place]) - self.num_pairs] for place in targets]
        progress = call.progress or 0.0
        if call.site.kind == "self":
            if reached(progress, self.self_share) or call.site.height * call.site.width > self.self_pixels:
                return maps
            edited = maps[sources]
        else:
            edited = self.cross(maps[sources], maps[targets], progress)
        return maps.index_copy(0, torch.tensor(targets, device=maps.device), edited.to(maps))

    def cross(self, source_nHPN: Tensor, target_nHPN: Tensor, progress: float) -> Tensor:
        """The target's map."""
        going_on = torch.tensor([not reached(progress, share) for share in self.cross_N.tolist()])
        taken = (self.taken_N & going_on).to(target_nHPN.device)
        moved = source_nHPN @ self.matrix_NN.to(source_nHPN)
        return torch.where(taken, moved, target_nHPN) * self.factor_N.to(target_nHPN)


@dataclass
class MapRecorder:
    """Adds up what the heads of cross-attention attend to: `mean()` is over calls at the largest map seen.

    inner: hooks whose edit comes first, so that what is recorded is what the network used.
    """

    inner: AttentionHooks | None = None
    total_RPN: Tensor | None = None
    size: tuple[int, int] = (0, 0)  # of the map, (h, w)
    calls: int = 0

    @property
    def hooks(self) -> AttentionHooks:
        return AttentionHooks(bias=self.inner and self.inner.bias, edit=self.edit)

    def edit(self, call: HookCall, maps: Tensor) -> Tensor:
        if self.inner is not None and self.inner.edit is not None:
            maps = self.inner.edit(call, maps)
        here = (call.site.height, call.site.width)
        if call.site.kind == "cross" and here >= self.size:
            heads = maps.float().mean(1)
            fresh = here != self.size
            self.total_RPN = heads if fresh else self.total_RPN + heads
            self.calls, self.size = 1 if fresh else self.calls + 1, here
        return maps

    def mean(self) -> Tensor:
        """(R, h, w, N) float32."""
        return (self.total_RPN / self.calls).unflatten(1, self.size)
