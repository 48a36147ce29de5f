"""A unigram language model of pieces of words (Kudo 2018, arXiv 1804.10959, 3.2), fitted by expectation maximisation.

The probability of a word is the sum over all ways to cut it into pieces of the product of their probabilities. The
package tokenizers cuts by such a model, but its own trainer begins with substrings of several *different* words: of a
closed vocabulary of sixty words it leaves letters, and it is not the same twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

LONGEST, SEEDS = 16, 50  # letters of a piece; pieces to begin with / pieces wanted
STEPS, KEPT = 2, 0.75  # of maximisation between two prunings; share of the pieces that a pruning leaves


def learn_pieces(words: Mapping[str, int], size: int) -> list[tuple[str, float]]:
    """words: with how often they come. -> at most `size` (piece, log probability), the likeliest first, equal ones by
    their letters. Every letter is a piece. Raises ValueError where there are more letters than that."""
    letters = {letter for word in words for letter in word}
    if len(letters) > size:
        raise ValueError(f"got {size} pieces for {len(letters)} different letters, expected at least as many")
    pieces = seeds(words, letters, SEEDS * size)
    while True:
        for _ in range(STEPS):
            pieces = maximised(expected(words, pieces), letters)
        if len(pieces) <= size:
            break
        left = max(size - len(letters), round(KEPT * len(pieces)) - len(letters))
        longer = sorted((piece for piece in pieces if piece not in letters), key=lambda one: (-pieces[one], one))
        pieces = {piece: pieces[piece] for piece in (*sorted(letters), *longer[:left])}
    found = [(piece, math.log(probability)) for piece, probability in pieces.items()]
    return sorted(found, key=lambda one: (-one[1], one[0]))


def seeds(words: Mapping[str, int], letters: set[str], most: int) -> dict[str, float]:
    """The letters, and the longer substrings that come at least twice, by letters covered; probabilities by that."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + LONGEST) + 1):
                counts[word[start:end]] += count
    longer = [piece for piece, count in counts.items() if len(piece) > 1 and count > 1]
    longer.sort(key=lambda piece: (-counts[piece] * len(piece), piece))
    chosen = {piece: float(counts[piece] * len(piece)) for piece in (*sorted(letters), *longer[:most])}
    total = sum(chosen.values())
    return {piece: value / total for piece, value in chosen.items()}


def expected(words: Mapping[str, int], pieces: Mapping[str, float]) -> dict[str, float]:
    """How often each piece is expected in the words, by the sums over all cuts (forward and backward)."""
    found = dict.fromkeys(pieces, 0.0)
    longest = max(map(len, pieces))
    for word, count in words.items():
        spans = [
            (start, end, word[start:end])
            for start in range(len(word))
            for end in range(start + 1, min(len(word), start + longest) + 1)
            if word[start:end] in pieces
        ]
        before, after = [1.0] + [0.0] * len(word), [0.0] * len(word) + [1.0]
        for start, end, piece in spans:
            before[end] += before[start] * pieces[piece]
        for start, end, piece in reversed(spans):
            after[start] += after[end] * pieces[piece]
        for start, end, piece in spans:
            found[piece] += count * before[start] * pieces[piece] * after[end] / before[-1]
    return found


def maximised(counts: Mapping[str, float], letters: set[str]) -> dict[str, float]:
    """Probabilities by those counts; pieces that nothing needs go, letters stay."""
    kept = {piece: max(count, 1e-3) for piece, count in counts.items() if count > 0.5 or piece in letters}
    total = sum(kept.values())
    return {piece: count / total for piece, count in kept.items()}
