"""Words and tokens of two prompts: alignment against all alignments there are, maps that lose nothing."""

import itertools
import random

import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.edit.words import align, refined, replaced, text_encoder_of, words_of
from raphael.generate.pipeline import RaphaelPipeline


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = write_pipeline(tmp_path_factory.mktemp("model") / "raphael")
    return text_encoder_of(RaphaelPipeline.from_pretrained(folder))


def best_score(source, target):
    """Over every way to pair items in order: pairs that agree minus pairs that do not; what is left alone costs 0."""
    best = 0
    for size in range(1, min(len(source), len(target)) + 1):
        for ours in itertools.combinations(range(len(source)), size):
            for theirs in itertools.combinations(range(len(target)), size):
                best = max(best, sum(1 if source[i] == target[j] else -1 for i, j in zip(ours, theirs)))
    return best


def test_an_alignment_is_as_good_as_the_best_of_all():
    rng = random.Random(0)
    for _ in range(60):
        source, target = ([rng.choice("abc") for _ in range(rng.randint(0, 5))] for _ in range(2))
        found = align(source, target)
        pairs = [(place, at) for at, place in enumerate(found) if place >= 0]
        assert all(source[place] == target[at] for place, at in pairs)
        assert [place for place, _ in pairs] == sorted({place for place, _ in pairs})
        assert len(pairs) == best_score(source, target), (source, target)


def test_words_stand_where_their_tokens_do(encoder):
    words = words_of(encoder, "A red circle, yellowish, on BLUE.")
    assert words.words == ("A", "red", "circle", ",", "yellowish", ",", "on", "BLUE", ".")
    pieces = encoder.tokens_of(words.prompt)
    for word, (first, last) in zip(words.words, words.spans):
        assert "".join(pieces[first:last]) == word.casefold()
    assert words.spans[0][0] == 1 and words.spans[-1][1] == len(words.ids) - 1
    assert any(last - first > 1 for first, last in words.spans)
    assert words.find("Red Circle") == [[2, 3]]
    assert len(words.find(",")) == 2


def test_words_that_a_tokenizer_cuts_at_an_apostrophe_are_told_apart_by_blanks(encoder):
    words = words_of(encoder, "don't draw")
    assert words.words == ("don't", "draw") and words.spans[0][1] - words.spans[0][0] == 2


def test_a_replaced_word_hands_on_all_of_its_attention(encoder):
    source, target = words_of(encoder, "a red circle"), words_of(encoder, "a yellowish circle")
    matrix = replaced(source, target)
    real = len(source.ids)
    assert torch.equal(matrix[:real].sum(1), torch.ones(real, dtype=torch.float64))
    first, last = target.spans[1]
    assert matrix[2, first:last].tolist() == [1 / (last - first)] * (last - first)
    shrunk = replaced(target, source)
    assert shrunk[first:last, 2].tolist() == [1.0] * (last - first)
    same = replaced(source, source)
    assert torch.equal(same[:real, :real], torch.eye(real, dtype=torch.float64))


def test_a_refined_prompt_takes_what_both_have_and_leaves_what_is_new(encoder):
    source, target = words_of(encoder, "a circle on blue"), words_of(encoder, "a red circle on blue")
    matrix, taken = refined(source, target)
    assert taken[: len(target.ids)].tolist() == [True, True, False, True, True, True, True]
    assert [int(matrix[:, at].argmax()) for at in (0, 1, 3, 4, 5, 6)] == [0, 1, 2, 3, 4, 5]
    assert not matrix[:, 2].any()


def test_bad_words_are_refused(encoder):
    source, target = words_of(encoder, "a red circle"), words_of(encoder, "a big red circle")
    with pytest.raises(ValueError, match="replace: got 3 and 4 words, expected equal numbers; use refine"):
        replaced(source, target)
    with pytest.raises(ValueError, match="'star', which is not in 'a red circle'; expected some of: a, red, circle"):
        source.find("star")
    with pytest.raises(ValueError, match="prompt: got 22 tokens, expected at most 16"):
        words_of(encoder, "a red circle " * 6 + "on blue")
