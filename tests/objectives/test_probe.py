"""The probe on toys whose knowledge is known: one that reads a fact exactly, one that reads nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raphael.base.config.preset import load_preset
from raphael.base.probe_set import Exchange, ProbeSet
from raphael.base.randomness import SampleRng
from raphael.diffusion.prediction import Velocity, prediction_of
from raphael.diffusion.schedule import Schedule
from raphael.net.condition import Condition
from raphael.objectives.probe import (
    BATCH,
    TIMES,
    Network,
    Verdict,
    captions_of,
    judge,
    network_errors,
    passes,
    verdicts,
)

N = BATCH + 5  # more than a pass


def probe(errors, question: ProbeSet) -> dict[str, Verdict]:
    return verdicts(judge(errors, question), question)


def asked() -> ProbeSet:
    """Images 0 to N - 1 whose captions name a level and a letter; either is exchanged."""
    levels, rows = np.arange(N) % 3, np.arange(N)
    true = [f"{level} a" for level in levels]
    facts = {
        "colour": Exchange(rows, [f"{(level + 1) % 3} a" for level in levels]),
        "word": Exchange(rows[3:9], [f"{level} b" for level in levels[3:9]]),
    }
    images = np.zeros((N, 4, 4, 3), np.uint8)
    return ProbeSet(images, true, ["single"] * N, [{}] * N, facts)


def latents() -> torch.Tensor:
    return (torch.arange(N) % 3).float().view(N, 1, 1, 1).expand(N, 2, 4, 4).contiguous()


def encode(captions: list[str]) -> Condition:
    """The level alone: letters are not in it."""
    levels = torch.tensor([float(caption.split()[0]) for caption in captions])
    return Condition(levels.view(-1, 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))


def schedule(**changes) -> Schedule:
    return Schedule(replace(load_preset("tiny").diffusion, **changes))


def reads_the_level(kind: str, plan: Schedule):
    """Knows x_0 from the caption: v or eps are exact with the true one, and with it alone."""

    def unet(x_t, t, text):
        x0 = text.tokens.view(-1, 1, 1, 1).expand_as(x_t)
        a = plan.alpha_bar[t].float().view(-1, 1, 1, 1)
        eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        return SimpleNamespace(prediction=eps if kind == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0)

    return Network(unet, plan, prediction_of(replace(load_preset("tiny").diffusion, prediction=kind)))


@pytest.mark.parametrize("kind", ["v", "eps"])
def test_a_denoiser_that_knows_one_fact_wins_it_always_and_ties_at_what_it_cannot_see(kind):
    found = probe(network_errors(reads_the_level(kind, schedule()), latents(), encode), asked())
    assert found["colour"].share == 1.0 and found["colour"].ties == 0
    assert found["word"].share == 0.5 and found["word"].ties == 6


def test_the_error_is_that_of_v_whatever_is_predicted():
    """With a wrong x_0, off by d: v - v_hat = -d (sqrt(1 - a) + a / sqrt(1 - a)) = -d / sqrt(1 - a)."""
    plan, rows = schedule(), np.arange(6)
    wrong = [f"{(row % 3) + 1} a" for row in rows]  # off by one
    expected = np.mean([1 / (1 - plan.alpha_bar[round(time * 1000)].item()) for time in TIMES])
    for kind in ("v", "eps"):
        got = network_errors(reads_the_level(kind, plan), latents(), encode)(rows, wrong)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-3)


def test_a_denoiser_that_ignores_captions_ties_everywhere():
    def unet(x_t, t, text):
        return SimpleNamespace(prediction=0.3 * x_t)

    found = probe(network_errors(Network(unet, schedule(), Velocity()), latents(), encode), asked())
    assert [(verdict.share, verdict.ties) for verdict in found.values()] == [(0.5, N), (0.5, 6)]


def test_shares_equal_a_loop_over_scenes_one_at_a_time():
    """A network that answers at random, but the same to the same caption and noise."""

    def unet(x_t, t, text):
        return SimpleNamespace(prediction=torch.sin(7 * text.tokens.view(-1, 1, 1, 1) + 5 * x_t + t.view(-1, 1, 1, 1)))

    plan, question, x0 = schedule(zero_terminal_snr=True), asked(), latents()
    verdict = probe(network_errors(Network(unet, plan, Velocity()), x0, encode, seed=3), question)["colour"]
    for row, wrong, margin in zip(range(N), question.facts["colour"].captions, verdict.margins, strict=True):
        noise, errors = SampleRng(3, 0, [row]).normal("probe", (2, 4, 4)), {}
        for text in (question.captions[row], wrong):
            total = 0.0
            for time in TIMES:
                t = torch.tensor([round(1000 * time)])
                x_t = plan.add_noise(x0[row : row + 1], noise, t)
                out = unet(x_t, t, encode([text])).prediction
                a = plan.alpha_bar[t].float().view(-1, 1, 1, 1)
                v = a.sqrt() * noise - (1 - a).sqrt() * x0[row : row + 1]
                total += float((out - v).square().mean()) / len(TIMES)
            errors[text] = total
        assert margin == pytest.approx(errors[wrong] - errors[question.captions[row]], abs=1e-5)
        assert (margin > 0) == (errors[wrong] > errors[question.captions[row]])


def test_a_true_caption_is_judged_once_for_all_its_facts_and_every_caption_is_counted():
    judged = []

    def errors(rows, captions):
        judged.extend(captions)
        return torch.zeros(len(rows))

    probe(errors, asked())
    assert len(judged) == N + N + 6 == captions_of(asked())
    assert [caption for _, captions in passes(asked()) for caption in captions] == judged
    assert [len(rows) for rows, _ in passes(asked())] == [BATCH, 5, BATCH, 5, 6]


def test_an_error_that_is_no_number_is_no_win():
    assert Verdict(np.array([np.nan, -1.0, 0.0, 2.0])).outcomes == [0.0, 0.0, 0.5, 1.0]
