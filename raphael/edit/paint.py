"""Paint-with-words (eDiff-I, arXiv 2211.01324, section 5): phrases are drawn where they are painted.

Cross-attention's scores get w A; A is 1 at the pixels of a phrase's region and its tokens, 0 elsewhere;
w = w' log(1 + sigma) max(Q K^T): strong while the layout is open, gone when it is not.

Two things are ours. A phrase's tokens get -w outside their region (`away`), so that they are looked at less there. And
where a model lays out an image by its noise, that noise is rearranged before (`arrange`): of some permutations of it
the one is taken whose first steps, unpainted, look at the phrases nearest to where they are painted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.edit.attention import MapRecorder
from raphael.edit.known import check_mask
from raphael.edit.run import Edited, How, Session, split
from raphael.edit.words import Words, attended_encoder_of, words_of
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import AttentionHooks, Condition, HookCall

SIGMA_MAX = 80.0  # eDiff-I's largest; schedules that end in pure noise have an infinite one
ARRANGE = 3  # steps
ARRANGEMENTS = 12
# of the phrases' regions, here and on the page of `raphael serve`: Okabe and Ito's, apart for those who see colours
# differently; first those that are seldom a prompt's own
COLOURS = (
    *((0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)),
    *((0, 114, 178), (213, 94, 0), (240, 228, 66), (0, 0, 0)),
)


class PaintedBias:
    """painted (N, H, W) in [0, 1]: the region of every token's phrase; real (N,) bool: tokens that count. away: what A
    is outside its region for a token that has one, with the sign turned; 0 is the paper's."""

    def __init__(self, painted: Tensor, real: Tensor, weight: float, away: float = 0.0):
        self.painted, self.real, self.weight, self.away = painted, real, weight, away
        self._at: dict[tuple[int, int], Tensor] = {}

    @property
    def hooks(self) -> AttentionHooks:
        return AttentionHooks(bias=self)

    def at(self, height: int, width: int) -> Tensor:
        """A (P, N): the share of each pixel of the map that is painted, less `away` of the share that is not."""
        if (height, width) not in self._at:
            small_NP = F.adaptive_avg_pool2d(self.painted, (height, width)).flatten(1)
            owned_N = self.painted.flatten(1).any(1)
            self._at[height, width] = (small_NP - self.away * (1 - small_NP) * owned_N[:, None]).mT
        return self._at[height, width]

    def __call__(self, call: HookCall, scores: Tensor) -> Tensor:
        """scores (R, H, P, N) are Q K^T / sqrt(d), so their maximum has w' the meaning that it has in the paper."""
        sigma = SIGMA_MAX if call.sigma is None else min(call.sigma, SIGMA_MAX)
        real = self.real.to(scores.device)
        largest = scores.masked_fill(~real, -math.inf).amax((1, 2, 3), keepdim=True).clamp(min=0)
        painted = self.at(call.site.height, call.site.width).to(scores)
        return self.weight * math.log1p(sigma) * largest * painted


def paint(
    pipeline: Pipeline,
    prompt: str,
    regions: Mapping[str, np.ndarray],
    weight: float = 0.5,
    how: How = How(),  # noqa: B008
    away: float = 1.0,
    arrange: int = ARRANGE,
) -> Edited:
    """regions: phrase of the prompt -> (H, W) bool, True where it is to be drawn. weight: w'; 0 is no painting.

    away: see PaintedBias. arrange: steps by which the seed's noise is rearranged (`arranged`), 0: it is not; away 0 and
    arrange 0 are eDiff-I's painting. source: the regions; without: the prompt's image of the same seed. Raises
    ValueError for a phrase that is not there, stands in several places or overlaps another, a region that is empty,
    everything, or of another size, and numbers below 0.
    """
    for name, value in (("weight", weight), ("away", away), ("arrange", arrange)):
        if not value >= 0 or math.isinf(value):
            raise ValueError(f"{name}: got {value:g}, expected a number from 0")
    session = Session(pipeline, how)
    words = words_of(attended_encoder_of(pipeline), prompt)
    ground = np.full((*session.size_px, 3), 255, np.uint8)
    for region in regions.values():
        check_mask(region, ground)
    painted = painted_tokens(words, regions, session.size_px)
    real = torch.arange(words.length) < len(words.ids)
    cond, start = session.condition(prompt), session.noise().start()
    chosen = [0] * session.count
    if weight and arrange:
        first, chosen = arranged(session, cond, painted, arrange)
        start = torch.cat([first, start])
    else:
        start = torch.cat([start, start])
    hooked = cond.with_hooks(PaintedBias(painted, real, weight, away).hooks)
    result, without = split(session.decode(session.draw(hooked.concat(cond), start=start)), 2)
    for place, region in enumerate(regions.values()):
        ground[region] = COLOURS[place % len(COLOURS)]
    told = {"weight": weight, "away": away, "arrange": arrange, "arrangements": chosen}
    facts = session.facts("paint", prompt=prompt, phrases=list(regions), **told)
    labels = (", ".join(regions), f"painted, weight {weight:g}", "not painted")
    return Edited(np.repeat(ground[None], session.count, 0), result, without, labels, facts)


def arranged(session: Session, cond: Condition, painted: Tensor, steps: int) -> tuple[Tensor, list[int]]:
    """(the noise of each row (n, C, h, w), which of its `arrangements` that is).

    Each is drawn for that many steps, unguided and unpainted; taken is the one in which the largest share of what looks
    at a painted token lies in its region, the mean over tokens. painted (N, H, W). Costs 12 rows a step and image.
    """
    plain = Session(session.pipeline, replace(session.how, sampling=replace(session.settings, guidance_scale=1.0)))
    owned, shares, found = painted.flatten(1).any(1), [], arrangements(session.noise().start())
    for eps in found:
        recorder = MapRecorder()
        last = lambda step, *seen: step + 1 >= steps  # noqa: E731
        plain.draw(cond.with_hooks(recorder.hooks), start=eps, callback=last, aside=True)
        maps_nhwN = recorder.mean()[..., owned]
        region_hwN = F.adaptive_avg_pool2d(painted[owned], maps_nhwN.shape[1:3]).permute(1, 2, 0).to(maps_nhwN)
        inside = (maps_nhwN * region_hwN).sum((1, 2)) / maps_nhwN.sum((1, 2)).clamp(min=1e-12)
        shares.append(inside.mean(1))
    chosen = torch.stack(shares).argmax(0)
    return torch.stack(found)[chosen, torch.arange(len(chosen))], chosen.tolist()


def arrangements(eps: Tensor) -> list[Tensor]:
    """Noise (n, C, h, w) itself, mirrored and shifted: permutations of independent numbers are as likely as these."""
    height, width = eps.shape[2:]
    mirrored = [eps, eps.flip(3), eps.flip(2), eps.flip(2, 3)]
    far = [one.roll((height // 2, width // 2), (2, 3)) for one in mirrored]
    near = [eps.roll(by, (2, 3)) for by in ((0, width // 4), (0, -(width // 4)), (height // 4, 0), (-(height // 4), 0))]
    return [*mirrored, *far, *near]


def painted_tokens(words: Words, regions: Mapping[str, np.ndarray], size_px: tuple[int, int]) -> Tensor:
    """(N, H, W) float32: each token's region, 0 for tokens of no phrase. Raises ValueError."""
    if not regions:
        raise ValueError("regions: got none, expected a mask for at least one phrase of the prompt")
    painted, owner = torch.zeros(words.length, *size_px), {}
    for phrase, region in regions.items():
        places = words.find(phrase)
        if len(places) > 1:
            raise ValueError(f"phrase: got {phrase!r}, which stands in {len(places)} places; add words to it")
        for token in places[0]:
            if token in owner:
                raise ValueError(f"phrases: got {owner[token]!r} and {phrase!r}, which overlap; expected them apart")
            owner[token] = phrase
            painted[token] = torch.from_numpy(region.astype(np.float32))
    return painted
