"""Weights of words: the parser against a second one, and what a weight does to the encoding."""

import math
import random
import re
import warnings

import numpy as np
import pytest
import torch

from raphael import RaphaelPipeline
from raphael.encoders.text import load_text_encoder
from raphael.encoders.weighted import CutPromptWarning, encode_prompts, parse_weights
from raphael.pretrained.find import find_pipeline


def texts(letters, most, count, least=0):
    """`count` texts at random, the same in every run."""
    rng = random.Random(0)
    return ["".join(rng.choices(letters, k=rng.randint(least, most))) for _ in range(count)]


def tree(rng, depth=3):
    """A nested prompt: a list of words and of (kind, weight, list)."""
    found = []
    for _ in range(rng.randint(1, 3)):
        if depth == 0 or rng.random() < 0.5:
            found.append("".join(rng.choices("abc ,.é", k=rng.randint(1, 5))))
        else:
            found.append((rng.choice("([:"), rng.randint(1, 30) / 10, tree(rng, depth - 1)))
    return found


def written(tree):
    parts = []
    for item in tree:
        if isinstance(item, str):
            parts.append(item)
        else:
            kind, weight, inner = item
            text = written(inner)
            parts.append({"(": f"({text})", "[": f"[{text}]", ":": f"({text}:{weight})"}[kind])
    return "".join(parts)


def letters(tree, by=1.0):
    """Every letter with its weight, by going down the tree: what the parser has to find from the text alone."""
    for item in tree:
        if isinstance(item, str):
            yield from ((letter, by) for letter in item)
        else:
            kind, weight, inner = item
            yield from letters(inner, by * {"(": 1.1, "[": 1 / 1.1, ":": weight}[kind])


@pytest.mark.parametrize("seed", range(300))
def test_every_letter_of_a_nested_prompt_gets_the_product_of_the_weights_around_it(seed):
    prompt = tree(random.Random(seed))
    found = [(letter, weight) for text, weight in parse_weights(written(prompt)) for letter in text]
    wanted = list(letters(prompt))
    assert [letter for letter, _ in found] == [letter for letter, _ in wanted]
    assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(found, wanted, strict=True))


def test_whatever_is_typed_is_parsed_and_only_brackets_and_weights_are_taken_out():
    for text in texts("ab ()[]:\\1.2", 24, 2000):
        parsed = parse_weights(text)
        kept = "".join(piece for piece, _ in parsed)
        rest = iter(text)
        assert all(letter in rest for letter in kept), f"{text!r}: letters in another order, or new ones"
        assert all(math.isfinite(weight) for _, weight in parsed)
        assert re.findall(r"[ab]", kept) == re.findall(r"[ab]", text)


def test_what_is_escaped_is_the_text_itself():
    for text in texts("abc xyz(),.[]:\\", 24, 1000):
        escaped = re.sub(r"([()\[\]\\])", r"\\\1", text)
        assert parse_weights(escaped) == ([(text, 1.0)] if text else [])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a (red:1.3) circle", [("a ", 1.0), ("red", 1.3), (" circle", 1.0)]),
        ("a: b (c:d) (e: 2 )", [("a: b ", 1.0), ("c:d", 1.1), (" ", 1.0), ("e", 2.0)]),
        ("a) b] (c", [("a) b] ", 1.0), ("c", 1.1)]),
        ("time: 5)", [("time: 5)", 1.0)]),
        ("(red:1.0) ring", [("red ring", 1.0)]),
        ("", []),
    ],
)
def test_the_forms_that_users_type(text, wanted):
    assert parse_weights(text) == wanted


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return load_text_encoder(find_pipeline("scenes") / "text_encoder")


def encoded(encoder, *prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encode_prompts(encoder, list(prompts), torch.device("cpu"))


def test_weight_one_is_the_plain_prompt_to_the_bit(encoder):
    plain = encoder.encode(encoder.tokenize(["a red circle", "two (green) stars"]))
    weighted = encoded(encoder, "a (red:1.0) circle", "two \\(green\\) stars")
    for one, other in zip(plain, weighted, strict=True):
        assert torch.equal(one, other)


def test_a_weighted_token_is_its_vector_times_the_weight_and_no_other_changes(encoder):
    plain = encoder.encode(encoder.tokenize(["a red circle"] * 2))
    found = encoded(encoder, "a (red:1.5) [circle]", "a red circle")
    assert torch.equal(found.context[1], plain.context[1]), "a neighbour's weight reaches another prompt"
    words = encoder.tokens_of("a red circle")
    by = torch.tensor([{"red": 1.5, "circle": 1 / 1.1}.get(word, 1.0) for word in words])
    assert torch.equal(found.context[0], plain.context[0] * by[:, None])
    assert torch.equal(found.mask, plain.mask) and torch.equal(found.pooled, plain.pooled)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_shows_what_is_lost(encoder):
    fits = "red " * encoder.room
    encoded(encoder, fits)
    for long in (fits + "lost words", f"(red:1.2) {'red ' * (encoder.room - 1)}lost words"):
        with pytest.warns(
            CutPromptWarning, match=f"got {encoder.room + 2} tokens, the model reads {encoder.room}"
        ) as told:
            cut = encode_prompts(encoder, [long], torch.device("cpu"))
        assert str(told[0].message).endswith("'lost words'")
        assert cut.mask.all()
    plain = encoder.encode(encoder.tokenize([fits]))
    with pytest.warns(CutPromptWarning):
        assert torch.equal(encode_prompts(encoder, [fits + "lost"], torch.device("cpu")).context, plain.context)


def chunked(encoder, *prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encode_prompts(encoder, list(prompts), torch.device("cpu"), chunks=True)


def real(encoding, row=0):
    return encoding.context[row][encoding.mask[row]]


def test_a_long_prompts_contexts_are_texts_of_their_own_one_behind_another(encoder):
    first, second = "a red circle " * 10, "left of a blue star"
    found = chunked(encoder, first + second)
    assert found.context.shape == (1, 2 * encoder.context_length, encoder.dim)
    parts = [encoder.encode(encoder.tokenize([text])) for text in (first, second)]
    torch.testing.assert_close(real(found), torch.cat([real(part) for part in parts]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, parts[0].pooled, rtol=1e-5, atol=1e-5)
    count = int(found.mask.sum())
    assert found.mask[0, :count].all() and not found.mask[0, count:].any()


def test_a_prompt_that_fits_is_read_as_without_chunks_also_beside_a_long_one(encoder):
    plain = encoder.encode(encoder.tokenize(["a red circle"]))
    for one, other in zip(plain, chunked(encoder, "a red circle"), strict=True):
        assert torch.equal(one, other)
    beside = chunked(encoder, "a red circle", "a red circle " * 25)
    assert beside.context.shape[1] == 3 * encoder.context_length
    torch.testing.assert_close(real(beside), real(plain), rtol=1e-5, atol=1e-6)


def test_a_context_ends_at_a_comma_of_its_last_quarter_and_words_stay_whole(encoder):
    room = encoder.room
    head, tail = "red " * (room - 6) + "star,", "a blue heart with the word SUN"
    found = chunked(encoder, f"{head} {tail}")
    parts = [encoder.encode(encoder.tokenize([text])) for text in (head, tail)]
    torch.testing.assert_close(real(found), torch.cat([real(part) for part in parts]), rtol=1e-5, atol=1e-5)
    early = "red star, " + "red " * (room - 4) + "blue heart"  # the comma is far from the end
    assert int(chunked(encoder, early).mask.sum()) == len(encoder.pieces(early)) + 4
    letters = "x" * 500
    assert len(encoder.pieces(letters)) > room
    assert int(chunked(encoder, letters).mask.sum()) >= len(encoder.pieces(letters)) + 4


def test_weights_go_into_every_context(encoder):
    first, second = "a red circle " * 10, "left of a blue star"
    found, plain = chunked(encoder, f"{first}(left of a blue star:1.5)"), chunked(encoder, first + second)
    closed = len(encoder.pieces(first)) + 2
    opened = closed + 1  # the first context, and what opens the second
    assert torch.equal(real(found)[:opened], real(plain)[:opened])
    assert torch.equal(real(found)[opened:-1], 1.5 * real(plain)[opened:-1])
    written = encode_prompts(encoder, ["a (red:1.5) circle"], torch.device("cpu"), weighted=False)
    assert torch.equal(written.context, encoder.encode(encoder.tokenize(["a (red:1.5) circle"])).context)


def test_weights_and_their_absence_reach_the_pixels():
    pipeline = RaphaelPipeline.from_pretrained("scenes")

    def drawn(prompt):
        return pipeline(prompt, num_inference_steps=2, output_type="np").images

    plain = drawn("a red circle")
    assert np.array_equal(plain, drawn("a (red:1.0) circle"))
    assert not np.array_equal(plain, drawn("a (red:1.6) circle"))
