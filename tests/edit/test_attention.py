"""Prompt-to-prompt: against loops over heads, pixels and tokens; nothing changed is nothing moved; pairs are apart."""

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.base.config.sampling import Sampling
from raphael.diffusion.samplers import SAMPLERS
from raphael.edit.attention import AttentionEditor, MapRecorder
from raphael.edit.rewrite import RECOLOURING, Blended, Keep, _places, kept, refine, replace, reweight
from raphael.edit.run import How, Session
from raphael.edit.words import Words
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import AttentionSite, HookCall

SOURCE, TARGET = "a red circle on a blue background", "a yellowish star on a blue background"
HEADS, SIDE, TOKENS = 2, 3, 5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def how(steps=4, num_images=2, seed=3, **changes):
    return How(seed=seed, num_images=num_images, sampling=Sampling(steps=steps, guidance_scale=2.0, **changes))


def random_editor(pairs=2, self_pixels=9):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.rand(TOKENS, TOKENS, dtype=torch.float64, generator=generator)
    taken = torch.tensor([True, False, True, True, False])
    cross = torch.tensor([0.2, 0.9, 0.5, 0.8, 0.1], dtype=torch.float64)
    factor = torch.tensor([1.0, 2.0, 1.0, -0.5, 3.0], dtype=torch.float64)
    return AttentionEditor(pairs, matrix, taken, cross, factor, 0.4, self_pixels)


def maps(rows, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, HEADS, SIDE**2, keys, dtype=torch.float64, generator=generator).softmax(-1)


def call(kind, progress, rows):
    conditional = torch.ones(len(rows), dtype=torch.bool)
    return HookCall(AttentionSite(kind, 0, SIDE, SIDE), torch.tensor(rows), 1.0, progress, conditional)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.6, 0.95])
def test_an_edited_cross_map_is_that_of_a_loop_over_heads_pixels_and_tokens(progress):
    editor, before = random_editor(), maps(5, TOKENS)
    after = editor.edit(call("cross", progress, [0, 1, 2, 3, 4]), before.clone())
    expected = before.clone()
    for pair in range(2):
        for head in range(HEADS):
            for pixel in range(SIDE**2):
                for token in range(TOKENS):
                    value = before[2 + pair, head, pixel, token]
                    if editor.taken_N[token] and progress < editor.cross_N[token]:
                        source = before[pair, head, pixel]
                        value = sum(source[other] * editor.matrix_NN[other, token] for other in range(TOKENS))
                    expected[2 + pair, head, pixel, token] = value * editor.factor_N[token]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)
    assert torch.equal(after[[0, 1, 4]], before[[0, 1, 4]])


@pytest.mark.parametrize(("progress", "pixels", "edited"), [(0.3, 9, True), (0.3, 8, False), (0.5, 9, False)])
def test_self_attention_is_the_sources_for_its_share_of_the_steps_on_small_maps(progress, pixels, edited):
    editor, before = random_editor(self_pixels=pixels), maps(4, SIDE**2)
    after = editor.edit(call("self", progress, [0, 1, 2, 3]), before.clone())
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[2:], before[:2] if edited else before[2:])


def test_a_pair_is_found_in_whatever_order_its_rows_come():
    editor, before = random_editor(), maps(4, TOKENS)
    straight = editor.edit(call("cross", 0.3, [0, 1, 2, 3]), before)
    order = [3, 0, 2, 1]
    assert torch.equal(editor.edit(call("cross", 0.3, order), before[order]), straight[order])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_an_edit_that_changes_nothing_is_the_source_to_the_bit(pipeline, sampler):
    edited = replace(pipeline, SOURCE, SOURCE, how(sampler=sampler), Keep(cross=1.0, self_attention=1.0))
    assert np.array_equal(edited.result, edited.source) and np.array_equal(edited.without, edited.source)
    edited = replace(pipeline, SOURCE, SOURCE, how(sampler=sampler), RECOLOURING)
    assert np.array_equal(edited.result, edited.source) and edited.facts["keep"]["blend"] == []
    edited = reweight(pipeline, SOURCE, {"red": 1.0}, how(sampler=sampler))
    assert np.array_equal(edited.result, edited.source)


def test_by_default_colours_are_replaced_with_all_of_the_sources_layout_and_shapes_are_not(pipeline):
    green = SOURCE.replace("red", "Green")
    for source, target in ((SOURCE, TARGET), (SOURCE, SOURCE), (SOURCE, "a red square on a blue background")):
        assert kept("replace", source, target) == Keep()
    assert kept("replace", SOURCE, green) == RECOLOURING and kept("refine", SOURCE, green) == Keep()
    assert kept("replace", SOURCE, f"a {green}") == Keep()
    asked = kept("replace", SOURCE, green, cross=0.5, blend=(), self_attention=None)
    assert asked == Keep(0.5, 1.0, blend=(), threshold=0.6)
    by_default, said = (replace(pipeline, SOURCE, green, how(2), keep) for keep in (None, RECOLOURING))
    assert np.array_equal(by_default.result, said.result) and by_default.facts == said.facts
    named = replace(pipeline, SOURCE, green, how(2), Keep(1.0, 1.0, blend=("red", "Green"), threshold=0.6))
    assert np.array_equal(by_default.result, named.result) and named.facts["keep"]["blend"] == ["red", "Green"]


def test_of_two_red_objects_the_blend_is_at_the_one_whose_colour_is_replaced():
    spans = ((1, 2), (2, 4), (4, 5), (5, 6))
    old, new = (Words("", words, spans, (), 8) for words in (("red", "b", "red", "d"), ("red", "b", "blue", "d")))
    assert _places((old, new), None, "replace") == ([("red", [4])], [("blue", [4])])
    assert _places((old, new), ("red",), "replace") == ([("red", [1, 4])], [("red", [1])])
    assert _places((old, new), None, "refine") == _places((old, new), (), "replace") == ([], [])


def test_with_no_share_of_the_steps_it_is_the_target_without_the_edit_to_the_bit(pipeline):
    for edit in (replace, refine):
        edited = edit(pipeline, SOURCE, TARGET, how(), Keep(cross=0.0, self_attention=0.0))
        assert np.array_equal(edited.result, edited.without)


def test_the_source_is_what_it_is_without_an_edit(pipeline):
    edited = replace(pipeline, SOURCE, TARGET, how())
    session = Session(pipeline, how())
    plain = session.decode(session.draw(session.condition(SOURCE, TARGET, TARGET)))
    assert np.array_equal(edited.source, plain[:2]) and np.array_equal(edited.without, plain[2:4])
    assert not np.array_equal(edited.result, edited.without) and not np.array_equal(edited.result, edited.source)


def test_an_edit_depends_on_its_own_pair_alone(pipeline, monkeypatch):
    """The same pair beside another one, in a batch of the same size."""
    keep = Keep(blend=("star", "circle"))
    one = replace(pipeline, SOURCE, TARGET, how(), keep)
    beside = Session(pipeline, how())
    beside.seeds[1] = (77, 5)
    monkeypatch.setattr("raphael.edit.rewrite.Session", lambda pipeline, how: beside)
    other = replace(pipeline, SOURCE, TARGET, how(), keep)
    for name in ("source", "result", "without"):
        assert np.array_equal(getattr(one, name)[0], getattr(other, name)[0])
        assert not np.array_equal(getattr(one, name)[1], getattr(other, name)[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_blend_latents_are_the_sources_to_the_bit(pipeline, sampler):
    session = Session(pipeline, how(3, sampler=sampler))
    inside = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    inside[0, :, 2:5, 2:6], inside[1, :, 1:3] = True, True
    cond = session.condition(SOURCE, TARGET, TARGET)
    source, blended, plain = session.draw(cond, lambda denoiser: Blended(denoiser, inside)).chunk(3)
    within = inside.expand_as(source)
    assert torch.equal(blended[~within], source[~within])
    assert (blended[within] != source[within]).float().mean() > 0.9
    assert torch.equal(plain, session.draw(cond).chunk(3)[2])


def test_outside_the_blend_and_its_margin_pixels_are_the_sources_to_the_bit(pipeline):
    edited = replace(pipeline, SOURCE, TARGET, how(2), Keep(blend=("star",), threshold=0.97))
    (masks,) = edited.shown.values()
    for source, result, mask in zip(edited.source, edited.result, masks[..., 0], strict=True):
        near = lambda y, x: mask[max(0, y - 5) : y + 6, max(0, x - 5) : x + 6].any()  # noqa: B023, E731
        away = ~np.array([[near(y, x) for x in range(32)] for y in range(32)])
        assert away.any() and np.array_equal(result[away], source[away])
        assert not np.array_equal(result, source)


def test_a_recorder_keeps_the_mean_of_the_largest_maps_of_cross_attention():
    recorder = MapRecorder()
    seen = [maps(2, TOKENS, seed) for seed in (1, 2)]
    small = HookCall(AttentionSite("cross", 1, 2, 2), torch.arange(2), 1.0, 0.0, torch.ones(2, dtype=torch.bool))
    recorder.edit(small, torch.ones(2, HEADS, 4, TOKENS))
    for one in seen:
        recorder.edit(call("cross", 0.0, [0, 1]), one)
        recorder.edit(call("self", 0.0, [0, 1]), maps(2, SIDE**2))
        recorder.edit(small, torch.ones(2, HEADS, 4, TOKENS))
    expected = torch.stack(seen).mean((0, 2)).float().reshape(2, SIDE, SIDE, TOKENS)
    torch.testing.assert_close(recorder.mean(), expected)


def test_bad_words_and_shares_are_refused(pipeline):
    with pytest.raises(ValueError, match="replace: got 7 and 8 words, expected equal numbers; use refine"):
        replace(pipeline, SOURCE, "a big red circle on a blue background")
    with pytest.raises(ValueError, match="got 'cube', which is not in .*expected some of: a, red, circle"):
        reweight(pipeline, SOURCE, {"cube": 2.0})
    with pytest.raises(ValueError, match="factors: got none"):
        reweight(pipeline, SOURCE, {})
    with pytest.raises(ValueError, match="cross: got 1.2, expected a share from 0 to 1"):
        Keep(cross=1.2)
    with pytest.raises(ValueError, match="got 'cube', which is not in"):
        replace(pipeline, SOURCE, TARGET, how(2), Keep(blend=("cube",)))
