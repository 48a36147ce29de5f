"""The short cuts over columns of texts give what going through every text gives."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from data_pipeline.select.texts import URL_PATTERN, are_urls, char_counts, may_have_space

LETTERS = ("a", "Z", "0", ".", "-", ":", "/", "?", "#", "@", "\\", " ", "\t", "\n", "é", "\u3000", "\x00", "\x7f", "😀")


def random_texts(seed: int, count: int, beginnings: tuple[str, ...]) -> list[str | None]:
    rng = random.Random(seed)

    def text() -> str | None:
        pool = LETTERS if rng.random() < 0.5 else LETTERS[:7]
        body = "".join(rng.choice(pool) for _ in range(rng.randrange(25)))
        return None if rng.random() < 0.05 else rng.choice(beginnings) + body

    return [text() for _ in range(count)]


def columns(texts: list[str | None]) -> Iterator[tuple[pa.Array, list[str | None]]]:
    """The column whole, and a slice of it, whose bytes do not begin where Arrow's do, with its texts."""
    whole = pa.array(texts, pa.string())
    yield whole, texts
    yield whole.slice(7, len(texts) // 2), texts[7 : 7 + len(texts) // 2]


@pytest.mark.parametrize("low, high", [(0, 5), (1, 8000), (3, 12), (7, 7)])
def test_characters_are_those_of_each_text_wherever_a_bound_is_passed(low, high):
    for column, texts in columns(random_texts(low, 3000, ("", " ", "\u00a0"))):
        for text, got in zip(texts, char_counts(column, low, high).tolist(), strict=True):
            want = pc.utf8_length(pc.utf8_trim_whitespace(text or "")).as_py()
            assert got == want if not low <= want <= high else low <= got <= high, (text, got, want)
            assert (got == 0) == (want == 0)


def test_no_text_with_space_around_it_is_missed():
    for column, texts in columns(random_texts(1, 3000, ("", " ", "x"))):
        marks = may_have_space(column)
        assert len(marks) == len(texts) and 0 < marks.sum() < len(texts)
        for text, marked in zip(texts, marks, strict=True):
            assert marked or not text or pc.utf8_trim_whitespace(text).as_py() == text


def test_addresses_are_those_that_the_expression_matches():
    beginnings = ("http://", "https://", "HTTP://", "https:/", "http:///", "ftp://", "")
    for column, texts in columns(random_texts(2, 20_000, beginnings)):
        want = pc.match_substring_regex(column, URL_PATTERN).fill_null(False).to_pylist()
        assert are_urls(column).tolist() == want and 0.1 < sum(want) / len(texts) < 0.9


@pytest.mark.parametrize("texts", [[], [None], ["", None], [""]])
def test_columns_without_a_byte_are_no_error(texts):
    column = pa.array(texts, pa.string())
    nothing = [0] * len(texts)
    assert char_counts(column, 1, 9).tolist() == nothing and are_urls(column).tolist() == nothing
    assert len(may_have_space(column)) == len(texts)
