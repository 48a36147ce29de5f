"""Span corruption against its definition: nothing is lost, spans lie where they are drawn, the loss is a mean."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raphael.base.randomness import SampleRng
from raphael.objectives.span_corruption import IGNORED, SpanCorruption, corrupted, segments, span_lengths

SENTINELS = [90, 91, 92, 93]


def restored(left: list[int], written: list[int]) -> list[int]:
    """The text, from what is read and what is written: each sentinel stands for what follows it there."""
    spans, here = {}, None
    for token in written:
        if token in SENTINELS:
            here = spans.setdefault(token, [])
        else:
            here.append(token)
    return list(itertools.chain.from_iterable(spans[token] if token in SENTINELS else [token] for token in left))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize(("share", "mean_span"), [(0.15, 3.0), (0.3, 2.0), (0.8, 1.0)])
def test_nothing_of_a_text_is_lost_and_so_much_of_it_is_replaced(count, share, mean_span) -> None:
    text = np.arange(1, count + 1)
    for seed in range(20):
        numbers = np.random.default_rng(seed).random((2, 64))
        lengths = span_lengths(count, share, mean_span, len(SENTINELS), *numbers)
        left, written = corrupted(text, lengths, SENTINELS)
        assert restored(left, written) == list(text)
        gone = [token for token in written if token not in SENTINELS]
        assert len(gone) == (min(max(round(count * share), 1), count - 1) if count > 1 else 0)
        assert [token for token in left if token in SENTINELS] == SENTINELS[: len(lengths)]
        if lengths:
            assert len(lengths) == min(max(round(len(gone) / mean_span), 1), count - len(gone) + 1, len(SENTINELS))


def test_the_example_of_the_module() -> None:
    """a red [circle on] a [blue] square"""
    left, written = corrupted(np.array([1, 2, 3, 4, 1, 5, 6]), [(2, 2), (1, 1)], [90, 91])
    assert left == [1, 2, 90, 1, 91, 6] and written == [90, 3, 4, 91, 5]


def test_every_way_to_cut_comes_up_equally_often() -> None:
    rng, seen = np.random.default_rng(0), {}
    for _ in range(6000):
        cut = tuple(segments(5, 3, rng.random(8)))
        seen[cut] = seen.get(cut, 0) + 1
    assert set(seen) == {cut for cut in itertools.product((1, 2, 3), repeat=3) if sum(cut) == 5}
    assert all(abs(hits - 1000) < 150 for hits in seen.values())
    assert segments(4, 1, rng.random(8)) == [4] and segments(3, 3, rng.random(8)) == [1, 1, 1]


def test_every_token_is_replaced_about_as_often_as_another() -> None:
    rng, hits = np.random.default_rng(0), np.zeros(8)
    for _ in range(4000):
        _, written = corrupted(np.arange(8), span_lengths(8, 0.25, 2.0, 4, *rng.random((2, 9))), SENTINELS)
        hits[[token for token in written if token not in SENTINELS]] += 1
    # one span of two tokens at seven places: the outermost lie in one of them, the others in two
    assert np.abs(hits / 4000 - np.array([1, 2, 2, 2, 2, 2, 2, 1]) / 7).max() < 0.03


class Writer(nn.Module):
    """Answers each place of what is to be written with the logits it holds; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, attention_mask, labels):
        self.asked = input_ids, attention_mask, labels
        return SimpleNamespace(logits=self.row.expand(*labels.shape, 100))


def test_the_loss_is_the_mean_over_texts_of_the_mean_over_their_tokens() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 1, 0], [5, 6, 1, 0, 0, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0, 0]])
    writer, rng = Writer(), SampleRng(0, 0, range(3))
    objective = SpanCorruption(writer, SENTINELS, share=0.3, mean_span=2.0)
    found = objective({"token_ids": ids.int()}, rng)
    read, mask, labels = writer.asked
    logs = torch.log_softmax(writer.row, 0)
    by_hand = [-logs[row[row != IGNORED]].mean() for row in labels]
    assert found["loss"].item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-6)
    assert torch.equal(mask, (read != 0).long())
    for row, text, length in zip(read.tolist(), labels.tolist(), (6, 2, 1), strict=True):
        left, written = ([token for token in tokens if token not in (0, 1, IGNORED)] for tokens in (row, text))
        assert restored(left, written) == ids[0, :length].tolist()
        assert [token for token in row if token][-1] == 1 and [token for token in text if token != IGNORED][-1] == 1


def test_the_spans_belong_to_the_sample_and_its_epoch() -> None:
    ids = torch.arange(2, 22).repeat(4, 1).int()
    objective = SpanCorruption(Writer(), SENTINELS)
    whole, _ = objective.pairs(ids, SampleRng(3, 0, [4, 5, 6, 7]))
    alone, _ = objective.pairs(ids[:1], SampleRng(3, 0, [6]))
    other, _ = objective.pairs(ids, SampleRng(3, 1, [4, 5, 6, 7]))
    assert torch.equal(whole[2], alone[0]) and not torch.equal(whole, other)
    assert len({tuple(row) for row in whole.tolist()}) > 1
