"""The probe: does the network know what a caption says? Asked by its loss, long before pictures show it.

A held-out latent x_0 is noised, and the error of v is taken twice, with the true caption and with one in which a single
fact is exchanged. Where the true one has the lower error, the network has read that fact. Both errors are of the same
noise, so all that differs is the caption. 1/2 is chance, and a network that ignores the fact reaches exactly that: its
errors are equal, and a tie counts half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raphael.base.probe_set import ProbeSet
from raphael.base.randomness import SampleRng
from raphael.diffusion.prediction import Prediction, training_pair
from raphael.diffusion.schedule import Noise
from raphael.net.condition import Condition

VERSION = "probe/v1"
TIMES = (0.5, 0.75, 0.9, 0.96, 0.995)  # shares of T: shapes and words are told at the first, sides at the last
BATCH = 32  # captions in one pass; fixed, since kernels may round by batch size
Errors = Callable[[np.ndarray, list[str]], Tensor]  # images (B,) by their places, a caption each -> (B,)


@dataclass(frozen=True)
class Verdict:
    """Of one fact. margins (n,) float64: the error with the wrong caption minus that with the true one."""

    margins: np.ndarray

    @property
    def outcomes(self) -> list[float]:
        """1 where the true caption has the lower error, 1/2 at a tie, 0 elsewhere (also where an error is NaN)."""
        return [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in self.margins]

    @property
    def ties(self) -> int:
        return int((self.margins == 0).sum())

    @property
    def share(self) -> float:
        return sum(self.outcomes) / len(self.margins)


@dataclass(frozen=True)
class Network:
    """A network with its noise and what it predicts."""

    unet: Callable[..., object]
    schedule: Noise
    prediction: Prediction

    def velocity_errors(self, x0: Tensor, noise: Tensor, t: Tensor, text: Condition) -> Tensor:
        """Mean square error of v per element, (B,) float32: x0 and noise (B, C, h, w), t (B,) int.

        Whatever the network predicts, an error of it is one of x_0 and so one of v, whose square is SNR + 1 times as
        large: for eps, v - v_hat = (eps - eps_hat) / sqrt(alpha_bar).
        """
        x_t, target = training_pair(self.prediction, self.schedule, x0, noise, t)
        predicted = self.unet(x_t.float(), t, text).prediction.float()
        alpha_bar = self.schedule.alpha_bar_at(t)
        snr = alpha_bar / (1 - alpha_bar)
        of_v = (self.prediction.error_of_x0(snr) / (snr + 1)).float()  # of the output, for a square error 1 of v
        return (predicted - target).square().flatten(1).mean(1) / of_v


def judge(errors: Errors, asked: ProbeSet, mine: Callable[[int], bool] = lambda _: True) -> Tensor:
    """The errors of all captions, (captions_of(asked),) float64: the true ones, then the wrong ones of each fact.

    mine(number): whether this process does that pass; others' captions are 0, so that the sum over processes is whole.
    Passes are the same however they are dealt out.
    """
    found = []
    for number, (rows, captions) in enumerate(passes(asked)):
        if mine(number):
            found.append(errors(rows, captions).double().cpu())
        else:
            found.append(torch.zeros(len(rows), dtype=torch.float64))
    return torch.cat(found)


def passes(asked: ProbeSet) -> list[tuple[np.ndarray, list[str]]]:
    """(images by their places, a caption each) of each pass, at most BATCH; in the order of `judge`."""
    cuts = [(rows, captions, first) for rows, captions in _questions(asked) for first in range(0, len(rows), BATCH)]
    return [(rows[first : first + BATCH], captions[first : first + BATCH]) for rows, captions, first in cuts]


def verdicts(found: Tensor, asked: ProbeSet) -> dict[str, Verdict]:
    """found: of `judge`. In the order of the set."""
    questions = _questions(asked)
    parts = np.split(found.numpy(), np.cumsum([len(rows) for rows, _ in questions])[:-1])
    at_place = np.full(len(asked), np.nan)
    at_place[questions[0][0]] = parts[0]
    pairs = zip(asked.facts.items(), parts[1:], strict=True)
    return {name: Verdict(part - at_place[fact.rows]) for (name, fact), part in pairs}


def captions_of(asked: ProbeSet) -> int:
    """How many captions are judged."""
    return sum(len(rows) for rows, _ in _questions(asked))


def _questions(asked: ProbeSet) -> list[tuple[np.ndarray, list[str]]]:
    """(images, captions): the true ones of all images that any fact asks of, then each fact's wrong ones."""
    rows = asked.rows
    facts = [(fact.rows, fact.captions) for fact in asked.facts.values()]
    return [(rows, [asked.captions[row] for row in rows]), *facts]


def network_errors(
    network: Network,
    latents: Tensor,
    encode: Callable[[list[str]], Condition],
    seed: int = 0,
    times: Sequence[float] = TIMES,
) -> Errors:
    """Errors of v, the mean over `times`. latents: scaled (M, C, h, w).

    The noise of image i is a function of (seed, i), the same at every timestep. Call it without gradients
    and in eval mode.
    """
    last = network.schedule.num_steps - 1

    def errors(rows: np.ndarray, captions: list[str]) -> Tensor:
        x0 = latents[torch.from_numpy(rows).to(latents.device)]
        noise = SampleRng(seed, 0, rows).normal("probe", x0.shape[1:]).to(x0.device)
        text = encode(captions)
        found = torch.zeros(len(rows), device=x0.device)
        for time in times:
            t = torch.full((len(rows),), min(round(time * network.schedule.num_steps), last), device=x0.device)
            found += network.velocity_errors(x0, noise, t, text)
        return found / len(times)

    return errors


def in_place(asked: ProbeSet, latents: Tensor) -> Tensor:
    """Latents of the images `asked.rows` at the places of all (M, C, h, w), 0 elsewhere: noise belongs to a place."""
    every = latents.new_zeros(len(asked), *latents.shape[1:])
    every[torch.from_numpy(asked.rows).to(latents.device)] = latents
    return every
