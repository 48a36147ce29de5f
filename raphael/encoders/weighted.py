"""Weights of words in a prompt, as AUTOMATIC1111's users type them, and prompts that are longer than the context.

`(word)` is 1.1, `((word))` 1.21, `[word]` 1 / 1.1, `(word:1.3)` 1.3; they multiply inside each other. `\\(` is a
bracket. A token's vector is multiplied by its weight: AUTOMATIC1111's emphasis "No norm". Its "Original" also restores
the mean over all tokens and channels, which after a layer norm is near 0 (-0.001 at deviation 1 in scenes): a ratio of
roundings.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from raphael.encoders.text import TextEncoder, TextEncoding

SPECIAL = re.compile(r"[()\[\]\\]")
PIECE = re.compile(r"\\[()\[\]\\]|:\s*([+-]?\d*\.?\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
ROUND, SQUARE = 1.1, 1 / 1.1
WORD = re.compile(r"\S+")
COMMA_SHARE = 0.25  # of a context, at its end
SHOWN = 200  # letters of what was cut


class CutPromptWarning(UserWarning):
    """A prompt is longer than the model reads."""


_told: ContextVar[list[str] | None] = ContextVar("told", default=None)


@contextlib.contextmanager
def cut_prompts() -> Iterator[list[str]]:
    """Inside, the texts of CutPromptWarning come into the list, each once, and no warning is given.

    Of this thread alone: `warnings.catch_warnings` would take those of every thread of a server.
    """
    texts: list[str] = []
    before = _told.set(texts)
    try:
        yield texts
    finally:
        _told.reset(before)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The texts of a prompt with their weights, in order, neighbours of one weight as one; [] of an empty prompt.

    A bracket that is never closed acts to the end; one that closes nothing is a letter.
    """
    texts: list[list] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        for item in texts[start:]:
            item[1] *= by

    for match in PIECE.finditer(prompt):
        piece, number = match.group(), match.group(1)
        if piece in open_at:
            open_at[piece].append(len(texts))
        elif number is not None and open_at["("]:
            multiply(open_at["("].pop(), float(number))
        elif piece == ")" and open_at["("]:
            multiply(open_at["("].pop(), ROUND)
        elif piece == "]" and open_at["["]:
            multiply(open_at["["].pop(), SQUARE)
        else:
            texts.append([piece[1:] if len(piece) > 1 and piece[0] == "\\" else piece, 1.0])
    for kind, by in (("(", ROUND), ("[", SQUARE)):
        for start in open_at[kind]:
            multiply(start, by)
    joined: list[list] = []
    for text, weight in texts:
        if joined and math.isclose(joined[-1][1], weight, rel_tol=1e-9):
            joined[-1][0] += text
        else:
            joined.append([text, weight])
    return [(text, weight) for text, weight in joined]


def encode_prompts(
    encoder: TextEncoder, prompts: list[str], device: torch.device, *, weighted: bool = True, chunks: bool = False
) -> TextEncoding:
    """As `encoder.encode(encoder.tokenize(prompts))`, the words weighted; a prompt without brackets is that to the bit.

    weighted: false, brackets are letters. chunks: what is longer than the context is read context by context, each
    opened and closed as a text of its own, as AUTOMATIC1111 does; their tokens stand one behind another, real ones
    first: context (B, k N, dim) for the longest prompt's k, pooled of the first. Without, it is cut, and a warning
    (CutPromptWarning) shows the words that are not read.
    """
    parsed = [parse_weights(text) if weighted and SPECIAL.search(text) else [(text, 1.0)] for text in prompts]
    found = [_sentences(encoder, texts, chunks) for texts in parsed]
    encoding = encoder.encode(torch.stack([ids for row in found for ids, _ in row]).to(device))
    weights = torch.stack([each for row in found for _, each in row])
    if not bool((weights == 1).all()):
        encoding = encoding._replace(context=encoding.context * weights.to(device)[..., None])
    counts = [len(row) for row in found]
    return encoding if max(counts) == 1 else _joined(encoding, counts)


def _sentences(
    encoder: TextEncoder, texts: list[tuple[str, float]], chunks: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids (N,), their weights (N,)) of each context that the texts of a prompt fill."""
    whole = "".join(text for text, _ in texts)
    even = all(weight == 1 for _, weight in texts)
    texts = [(whole, 1.0)] if even else texts
    tokens = [(token, weight) for text, weight in texts for token in encoder.pieces(text)]
    cut = [token for token, _ in tokens[encoder.room :]]
    if cut and chunks:
        return [_sentence(encoder, part) for part in _parts(encoder, texts)]
    if cut:
        _warn(encoder, whole, len(tokens), cut)
    if even:
        (ids,) = encoder.tokenize([whole])
        return [(ids, torch.ones(ids.shape))]
    return [_sentence(encoder, tokens[: encoder.room])]


def _sentence(encoder: TextEncoder, tokens: list[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = encoder.sentence([token for token, _ in tokens])
    weights = torch.ones(ids.shape)
    weights[encoder.opening : encoder.opening + len(tokens)] = torch.tensor([weight for _, weight in tokens])
    return ids, weights


def _parts(encoder: TextEncoder, texts: list[tuple[str, float]]) -> list[list[tuple[int, float]]]:
    """The tokens of a long prompt by context: words stay whole, and a comma in a context's last quarter ends it, as
    AUTOMATIC1111 looks for one in the last 20 of 75. A word longer than a context is split."""
    room, parts = encoder.room, [[]]
    comma = 0  # tokens of the newest part up to its last comma
    for text, weight in texts:
        for word in WORD.findall(text):
            tokens = [(token, weight) for token in encoder.pieces(word)]
            if len(parts[-1]) + len(tokens) > room and parts[-1]:
                keep = comma if comma >= room * (1 - COMMA_SHARE) else len(parts[-1])
                parts[-1], left = parts[-1][:keep], parts[-1][keep:]
                parts.append(left)
                comma = 0
            parts[-1] += tokens
            while len(parts[-1]) > room:
                parts.append(parts[-1][room:])
                parts[-2] = parts[-2][:room]
            comma = len(parts[-1]) if word.endswith(",") else comma
    return parts


def _joined(encoding: TextEncoding, counts: list[int]) -> TextEncoding:
    """Rows of one context each -> a row for each prompt, of as many contexts as the longest has.

    Real tokens stand first. A shorter prompt's are repeated behind, masked: attention that ignores the mask is the same
    over tokens that all stand there twice.
    """
    length, rows = max(counts) * encoding.context.shape[1], []
    for context, mask, pooled in zip(*(item.split(counts) for item in encoding), strict=True):
        real = mask.flatten()
        order = torch.argsort((~real).long(), stable=True)
        place = torch.arange(length, device=order.device)
        again = order[place % len(order)]
        rows.append((context.flatten(0, 1)[again], real[again] & (place < len(order)), pooled[0]))
    return TextEncoding(*(torch.stack(items) for items in zip(*rows, strict=True)))


def _warn(encoder: TextEncoder, prompt: str, count: int, cut: list[int]) -> None:
    text = encoder.text_of(cut)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    text = (
        f"prompt: got {count} tokens, the model reads {encoder.room} (of more with long_prompts chunks); not read of "
        f"{prompt[:40]!r}: {text!r}"
    )
    told = _told.get()
    if told is None:
        warnings.warn(text, CutPromptWarning, stacklevel=2)
    elif text not in told:
        told.append(text)
