"""Real pictures: the noise that DDIM draws them from, so that what edits drawn images edits them, too.

DDIM's step is an equation for the noisier state, x = D(x', s') + s / s' (x' - D(x', s')). Its usual inversion puts
D(x, s') for D(x', s') (arXiv 2010.02502, section 4.3); here the equation is solved by a few rounds of
x' <- D(x', s') + s' / s (x - D(x', s')).

Guidance breaks the way back: the noise was found without it. The cure (negative-prompt inversion, arXiv 2305.16807) is
the source prompt in the place of the empty one: the source is then guided nowhere, and a target away from the source.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raphael.diffusion.denoiser import Denoiser
from raphael.edit.run import Edited, How, Session, split, with_sampling
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import Condition

ROUNDS = 4


def inverted(denoiser: Denoiser, x0: Tensor, sigmas: Tensor, cond: Condition, rounds: int = ROUNDS) -> Tensor:
    """The start (B, C, h, w), of variance 1, from which ddim with eta 0 over these sigmas comes to x0.

    sigmas (steps + 1,) fall to 0 and may begin with infinity. One evaluation a step and round. Where the last estimate
    cannot be x0 at all (a network smooths), it comes as close as it can.
    """
    values, x = sigmas.tolist(), x0
    for sigma, following in zip(reversed(values[:-1]), reversed(values[1:]), strict=True):
        x = _undone(denoiser, x, sigma, following, cond, rounds)
    return x if math.isinf(values[0]) else x / (1 + values[0] ** 2) ** 0.5


def _undone(denoiser: Denoiser, x: Tensor, sigma: float, following: float, cond: Condition, rounds: int) -> Tensor:
    """The state at sigma that a step of DDIM takes to x at the following sigma."""
    levels = torch.full((len(x),), sigma, device=x.device, dtype=torch.float64)
    if math.isinf(sigma):
        eps = x / (1 + following**2) ** 0.5
        for _ in range(rounds):
            eps = (x - denoiser(eps, levels, cond)) / following
        return eps
    before = x
    for _ in range(rounds):
        x0 = denoiser(before, levels, cond)
        # at 0 the step returns D itself, and the equation does not say how far from it x' lies
        before = before + (x - x0) if following == 0 else x0 + sigma / following * (x - x0)
    return before


def start_of(session: Session, image: np.ndarray, prompt: str) -> Tensor:
    """The noise (n, C, h, w) that draws the image, uint8 (H, W, 3), by its prompt, the same for each row."""
    plain = Session(session.pipeline, replace(session.how, sampling=replace(session.settings, guidance_scale=1.0)))
    cond = session.condition(prompt).rows([0])
    with plain.asking():
        start = inverted(plain.denoiser(), session.latents_of(image), session.sigmas, cond)
    return start.expand(session.count, -1, -1, -1)


def for_pictures(pipeline: Pipeline, how: How) -> How:
    """DDIM without fresh noise: the sampler that is undone here."""
    return with_sampling(pipeline, how, sampler="ddim", eta=0.0, variance="posterior")


def reconstruct(pipeline: Pipeline, image: np.ndarray, prompt: str, how: How = How()) -> Edited:  # noqa: B008
    """A picture inverted and drawn again, guided. result: with the cure; without: with the empty prompt as ever.

    image: uint8 (H, W, 3); prompt: what it shows.
    """
    session = Session(pipeline, for_pictures(pipeline, how))
    start, cond = start_of(session, image, prompt), session.condition(prompt)
    cured = session.draw(cond, start=start, negative_prompt=prompt)
    plain = session.draw(cond, start=start, aside=True)
    (known,) = split(session.decode(session.latents_of(image).expand_as(start)), 1)
    facts = session.facts("reconstruct", prompt=prompt)
    labels = ("the picture", "inverted, guided from its own prompt", "inverted, guided from the empty one")
    images = np.repeat(image[None], session.count, 0)
    return Edited(images, session.decode(cured), session.decode(plain), labels, facts, {"its own decoding": known})
