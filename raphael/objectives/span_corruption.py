"""Span corruption (Raffel et al., arXiv 1910.10683, 3.1.4 and figure 2): of a text some spans are replaced, each by a
token of its own, and the model writes what stood there.

    a red [circle on] a [blue] square        reads  a red <0> a <1> square </s>
                                             writes <0> circle on <1> blue </s>
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.randomness import SampleRng

TOKEN_IDS = "token_ids"  # whole numbers (B, N): the text's, the closing token, padding
IGNORED = -100  # of labels: no token to write


class SpanCorruption(nn.Module):
    """objective({"token_ids"}, rng) -> {"loss", "accuracy"}, scalars: means over the samples of means over the tokens.

    t5: transformers' T5ForConditionalGeneration, or what is called like it and returns `.logits`. sentinels: the tokens
    that stand for spans, in their order. share: of a text's tokens that are replaced; mean_span: tokens in a span.
    """

    def __init__(
        self,
        t5: nn.Module,
        sentinels: list[int],
        closing: int = 1,
        padding: int = 0,
        share: float = 0.15,
        mean_span: float = 3.0,
    ):
        super().__init__()
        self.t5, self.sentinels, self.closing, self.padding = t5, list(sentinels), closing, padding
        self.share, self.mean_span = share, mean_span

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        inputs, labels = (part.to(batch[TOKEN_IDS].device) for part in self.pairs(batch[TOKEN_IDS].cpu(), rng))
        logits = self.t5(input_ids=inputs, attention_mask=(inputs != self.padding).long(), labels=labels).logits
        asked = labels != IGNORED
        error = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        right = (logits.argmax(-1) == labels) & asked
        count = asked.sum(1).clamp(min=1)
        return {"loss": (error.sum(1) / count).mean(), "accuracy": (right.sum(1) / count).mean().detach()}

    def pairs(self, token_ids: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """(what the model reads (B, N), what it writes (B, M)), int64, padded with `padding` and IGNORED."""
        length = token_ids.shape[1]
        draws = [rng.uniform(stream, (length,)).numpy() for stream in ("replaced spans", "kept spans")]
        read, written = [], []
        for row, *numbers in zip(token_ids.numpy(), *draws, strict=True):
            text = row[(row != self.padding) & (row != self.closing)]
            lengths = span_lengths(len(text), self.share, self.mean_span, len(self.sentinels), *numbers)
            for texts, part in zip((read, written), corrupted(text, lengths, self.sentinels), strict=True):
                texts.append(torch.tensor([*part, self.closing], dtype=torch.int64))
        pad = nn.utils.rnn.pad_sequence
        return pad(read, True, self.padding), pad(written, True, IGNORED)


def span_lengths(
    count: int, share: float, mean_span: float, most: int, replaced: np.ndarray, kept: np.ndarray
) -> list[tuple[int, int]]:
    """(kept, replaced) tokens in turn of a text of `count`; none for one of fewer than two tokens.

    round(count share) tokens, one at least, in round(that / mean_span) spans, one at least, `most` at most, with a kept
    token between two of them; what follows the last span is kept. Where they begin and end is drawn, all ways alike:
    T5's own draw always replaces the last token, which in a caption of ten would be most of what it learns.
    replaced, kept: uniform numbers, count + 1 of them or more.
    """
    if count < 2:
        return []
    gone = min(max(round(count * share), 1), count - 1)
    spans = min(max(round(gone / mean_span), 1), count - gone + 1, most)
    first, *between = segments(count - gone + 2, spans + 1, kept)[:-1]  # the two at the ends may be none: one less
    return list(zip((first - 1, *between), segments(gone, spans, replaced), strict=True))


def segments(count: int, parts: int, numbers: np.ndarray) -> list[int]:
    """`count` cut into so many parts of one or more, at those of the count - 1 places whose numbers are the lowest."""
    cuts = np.sort(np.argsort(numbers[: count - 1], kind="stable")[: parts - 1]) + 1
    return np.diff([0, *cuts, count]).tolist()


def corrupted(text: np.ndarray, lengths: list[tuple[int, int]], sentinels: list[int]) -> tuple[list[int], list[int]]:
    """(what is left of the text, with a sentinel for each span; the sentinels, each with its span)."""
    if not lengths:
        return list(text), []
    left, spans, at = [], [], 0
    for sentinel, (kept, replaced) in zip(sentinels, lengths):
        left += [*text[at : at + kept], sentinel]
        spans += [sentinel, *text[at + kept : at + kept + replaced]]
        at += kept + replaced
    return [*left, *text[at:]], spans
