"""Where a prompt's words stand among its tokens, and which tokens of two prompts belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raphael.encoders.text import END, PAD, START
from raphael.generate.pipeline import Pipeline

SPLITS = (r"[^\W_]+|[^\w\s]|_", r"\S+")  # words apart from punctuation; where a tokenizer joins the two, by blanks
COLOURS = frozenset(
    "red orange yellow green cyan blue purple pink white black grey gray brown violet magenta turquoise teal beige "
    "gold golden silver crimson scarlet maroon navy indigo lime olive lavender cream".split()
)


@dataclass(frozen=True)
class Words:
    """words[i] is the tokens spans[i] = (first, one past the last). ids: of all real tokens, start and end included."""

    prompt: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    length: int  # N, of the context

    def find(self, phrase: str) -> list[list[int]]:
        """The tokens of each place where the phrase stands, word by word, whatever its case. Raises ValueError."""
        wanted = [word.casefold() for word in _cut(phrase, self)]
        own = [word.casefold() for word in self.words]
        places = [at for at in range(len(own) - len(wanted) + 1) if own[at : at + len(wanted)] == wanted]
        if not wanted or not places:
            known = ", ".join(self.words)
            raise ValueError(f"word: got {phrase!r}, which is not in {self.prompt!r}; expected some of: {known}")
        ends = [(self.spans[at][0], self.spans[at + len(wanted) - 1][1]) for at in places]
        return [list(range(first, last)) for first, last in ends]

    def tokens(self, phrase: str) -> list[int]:
        """Of all places."""
        return sorted({token for place in self.find(phrase) for token in place})


def text_encoder_of(pipeline: Pipeline) -> Any:
    """Raises ValueError for a system that reads no words."""
    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is None:
        raise ValueError(f"the system {pipeline.system} reads no words, expected one with a text encoder, as raphael")
    return encoder


def attended_encoder_of(pipeline: Pipeline) -> Any:
    """Of a model whose attention is edited. Raises ValueError for a system that reads no words, and for a cascade,
    whose second network would draw over it by maps of its own."""
    encoder = text_encoder_of(pipeline)
    if len(pipeline.networks) > 1:
        raise ValueError(f"the system {pipeline.system} is a cascade, expected a model of one network, as raphael")
    return encoder


def words_of(text_encoder: Any, prompt: str) -> Words:
    """Raises ValueError for a prompt longer than the context, and one whose words cannot be told from its tokens."""
    (ids,) = text_encoder.tokenize([prompt]).tolist()
    pieces = text_encoder.tokens_of(prompt)
    real = sum(piece != PAD for piece in pieces)
    inner = [place for place in range(real) if pieces[place] not in (START, END)]
    longest = 0
    for split in SPLITS:
        words = re.findall(split, prompt)
        tokens = [_ids_of(text_encoder, word) for word in words]
        flat = [token for of_word in tokens for token in of_word]
        longest = max(longest, len(flat) + real - len(inner))
        if flat == [ids[place] for place in inner]:
            spans, start = [], inner[0] if inner else 0
            for of_word in tokens:
                spans.append((start, start + len(of_word)))
                start += len(of_word)
            return Words(prompt, tuple(words), tuple(spans), tuple(ids[:real]), len(ids))
    if longest > len(ids):
        raise ValueError(f"prompt: got {longest} tokens, expected at most {len(ids)}: no edit of a cut prompt")
    raise ValueError(f"prompt: the tokens {pieces[:real]} are not those of its words, expected words apart by blanks")


def recolours(source: str, target: str) -> bool:
    """Whether all words that are exchanged, one for one, are names of colours, and at least one is exchanged."""
    old, new = (re.findall(SPLITS[0], prompt.casefold()) for prompt in (source, target))
    exchanged = [pair for pair in zip(old, new) if pair[0] != pair[1]]
    return len(old) == len(new) and bool(exchanged) and all(COLOURS.issuperset(pair) for pair in exchanged)


def replaced(source: Words, target: Words) -> Tensor:
    """M (N, N): a map of the source (P, N) times M is the target's, word i for word i.

    A word of m tokens gets the attention of the word that it replaces in m equal parts, so that nothing is lost. Rows
    sum to 1. Raises ValueError where the prompts have unequal numbers of words.
    """
    got, other = len(source.words), len(target.words)
    if got != other:
        raise ValueError(f"replace: got {got} and {other} words, expected equal numbers; use refine")
    matrix = torch.zeros(source.length, target.length, dtype=torch.float64)
    for (first, last), (to_first, to_last) in zip(source.spans, target.spans, strict=True):
        matrix[first:last, to_first:to_last] = 1 / (to_last - to_first)
    for theirs, ours in zip(_around(source), _around(target), strict=True):
        matrix[theirs, ours] = 1.0
    return matrix


def refined(source: Words, target: Words) -> tuple[Tensor, Tensor]:
    """(M (N, N), taken (N,) bool): which tokens of the target the alignment found in the source, and where."""
    matrix = torch.zeros(source.length, target.length, dtype=torch.float64)
    taken = torch.zeros(target.length, dtype=torch.bool)
    for ours, theirs in enumerate(align(source.ids, target.ids)):
        if theirs >= 0:
            matrix[theirs, ours], taken[ours] = 1.0, True
    return matrix, taken


def align(source: Sequence[Any], target: Sequence[Any]) -> list[int]:
    """Needleman and Wunsch's global alignment (1970), match 1, mismatch -1, gap 0, as prompt-to-prompt has it.

    -> for each item of the target its place in the source, -1 where it has none. Among equals gaps come late.
    """
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i in range(1, len(source) + 1):
        for j in range(1, len(target) + 1):
            met = best[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            best[i][j] = max(met, best[i - 1][j], best[i][j - 1])
    places, i, j = [-1] * len(target), len(source), len(target)
    while i and j:
        if source[i - 1] == target[j - 1] and best[i][j] == best[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            places[j] = i
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return places


def _around(words: Words) -> list[int]:
    """Tokens of no word: those that open and close the text, then padding, which is masked."""
    inner = {token for first, last in words.spans for token in range(first, last)}
    real = [token for token in range(len(words.ids)) if token not in inner]
    return real


def _cut(phrase: str, words: Words) -> list[str]:
    split = SPLITS[0] if all(re.fullmatch(SPLITS[0], word) for word in words.words) else SPLITS[1]
    return re.findall(split, phrase)


def _ids_of(text_encoder: Any, word: str) -> list[int]:
    (ids,) = text_encoder.tokenize([word]).tolist()
    return [token for token, piece in zip(ids, text_encoder.tokens_of(word)) if piece not in (START, END, PAD)]
