"""Paint-with-words: the bias is the paper's formula, no weight is no bias, and images are painted one by one."""

import math

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.base.config.sampling import Sampling
from raphael.edit.paint import SIGMA_MAX, PaintedBias, arranged, arrangements, paint, painted_tokens
from raphael.edit.run import How, Session
from raphael.edit.words import words_of
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.attention import ActiveHooks, CrossAttention
from raphael.net.condition import AttentionHooks, AttentionSite, Condition, HookCall

PROMPT = "a red circle and a blue star"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def half(side="left", size=32):
    mask = np.zeros((size, size), bool)
    mask[:, : size // 2] = True
    return mask if side == "left" else ~mask


def how(num_images=2):
    return How(seed=3, num_images=num_images, sampling=Sampling(steps=3, guidance_scale=2.0))


def test_a_painted_layer_is_the_papers_formula_written_out():
    """softmax((Q K^T + w A) / sqrt d) V, w = w' log(1 + sigma) max(Q K^T), with heads and padding."""
    generator = torch.Generator().manual_seed(0)
    layer = CrossAttention(8, 6, 4).double()
    h = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    painted = torch.rand(5, 2, 2, generator=generator).double()
    bias = PaintedBias(painted, mask[0], 0.7)
    hooks = ActiveHooks.of(
        Condition(tokens, mask).with_hooks(bias.hooks).at(*torch.tensor([[3.0] * 2, [0.5] * 2])), 2, "cpu"
    )
    out, _ = layer(h, tokens, mask, AttentionSite("cross", 0, 2, 2), hooks)

    d, heads, expected = 4, 2, []
    keys, values = layer.kv(tokens).view(2, 5, 2, heads, d).unbind(2)
    queries = layer.q(h).view(2, 4, heads, d)
    for row in range(2):
        products = torch.einsum("phd,nhd->hpn", queries[row], keys[row])[:, :, :4]
        w = 0.7 * math.log(1 + 3.0) * products.max()
        a = painted.flatten(1).T[None, :, :4]
        share = ((products + w * a) / math.sqrt(d)).softmax(-1)
        expected.append(torch.einsum("hpn,nhd->phd", share, values[row, :4]).flatten(1))
    torch.testing.assert_close(out, layer.out(torch.stack(expected)), rtol=0, atol=1e-6)  # softmax is float32's


def test_at_infinite_noise_the_bias_is_that_of_the_largest_finite_level():
    bias = PaintedBias(torch.ones(3, 2, 2), torch.ones(3, dtype=torch.bool), 1.0)
    site = AttentionSite("cross", 0, 2, 2)
    scores = torch.tensor([[[[2.0, 1.0, 0.5]] * 4]])
    added = bias(HookCall(site, torch.arange(1), math.inf, 0.0, torch.ones(1, dtype=torch.bool)), scores)
    torch.testing.assert_close(added, torch.full((1, 1, 4, 3), 2.0 * math.log(1 + SIGMA_MAX)))


def test_a_region_is_told_to_a_map_by_the_share_of_its_pixels(pipeline):
    words = words_of(pipeline.text_encoder, PROMPT)
    painted = painted_tokens(words, {"red circle": half()}, (32, 32))
    assert painted[2:4].unique().tolist() == [0.0, 1.0] and not painted[[0, 1, 4, 5, 6, 7]].any()
    at = PaintedBias(painted, torch.ones(16, dtype=torch.bool), 1.0).at(8, 8)
    assert at.shape == (64, 16) and at[:, 2].view(8, 8)[:, :4].all() and not at[:, 2].view(8, 8)[:, 4:].any()


def test_away_is_taken_from_a_phrases_tokens_outside_their_region_and_from_no_other():
    painted = torch.zeros(3, 4, 4)
    painted[1, :, :2] = 1
    real = torch.ones(3, dtype=torch.bool)
    plain, away = (PaintedBias(painted, real, 1.0, by).at(2, 2) for by in (0.0, 0.5))
    assert plain[:, 1].tolist() == [1, 0, 1, 0] and away[:, 1].tolist() == [1, -0.5, 1, -0.5]
    assert not plain[:, [0, 2]].any() and not away[:, [0, 2]].any()
    half_cell = PaintedBias(painted, real, 1.0, 0.5).at(1, 1)
    assert half_cell[0, 1] == 0.5 - 0.5 * 0.5


def test_arrangements_are_permutations_of_the_noise_and_all_differ():
    eps = torch.arange(2 * 4 * 8 * 8.0).view(2, 4, 8, 8)
    found = arrangements(eps)
    assert torch.equal(found[0], eps) and len(found) == 12
    for number, one in enumerate(found):
        assert torch.equal(one.flatten(2).sort(-1).values, eps.flatten(2)), "numbers stay in their channel and image"
        assert not any(torch.equal(one, other) for other in found[:number])


def test_the_arrangement_is_the_one_whose_first_steps_look_at_the_phrase_where_it_is_painted(pipeline):
    """Against maps that a second way of recording them gives, one row at a time."""
    session = Session(pipeline, how())
    words = words_of(pipeline.text_encoder, PROMPT)
    painted = painted_tokens(words, {"red circle": half(), "blue star": half("right")}, (32, 32))
    start, chosen = arranged(session, session.condition(PROMPT), painted, 2)
    tokens, best = [2, 3, 6, 7], []
    for row in range(2):
        shares = []
        for eps in arrangements(session.noise().start()[row : row + 1]):
            maps = []

            def edit(call, map_RHPN, maps=maps):
                if call.site.kind == "cross" and call.site.height == 8:
                    maps.append(map_RHPN.mean((0, 1)))
                return map_RHPN

            settings = Sampling(steps=3, guidance_scale=1.0)
            alone = Session(pipeline, How(seed=3, sampling=settings))
            cond = alone.condition(PROMPT).with_hooks(AttentionHooks(edit=edit))
            alone.draw(cond, start=eps, callback=lambda step, *_: step == 1)
            mean = torch.stack(maps).mean(0).view(8, 8, -1)
            inside = [mean[:, :4, token].sum() if token < 6 else mean[:, 4:, token].sum() for token in tokens]
            shares.append(sum(float(part / mean[..., token].sum()) for part, token in zip(inside, tokens, strict=True)))
        best.append(int(np.argmax(shares)))
        torch.testing.assert_close(start[row], arrangements(session.noise().start())[best[-1]][row])
    assert chosen == best


def test_an_image_is_painted_as_it_is_alone_and_without_is_the_seeds_own(pipeline):
    regions = {"red circle": half(), "blue star": half("right")}
    both, alone = (paint(pipeline, PROMPT, regions, 0.5, how(count)) for count in (2, 1))
    assert both.facts["arrangements"][0] == alone.facts["arrangements"][0]
    assert np.abs(both.result[0].astype(int) - alone.result[0]).max() <= 1
    plain = pipeline([PROMPT] * 2, sampling=how().sampling, seed=3, output_type="np").images
    assert np.abs(both.without / 255 - plain).max() <= 1.01 / 255
    paper = paint(pipeline, PROMPT, regions, 0.5, how(), away=0.0, arrange=0)
    assert paper.facts["arrangements"] == [0, 0] and not np.array_equal(paper.result, both.result)


def test_no_weight_is_no_painting_to_the_bit_and_a_weight_is_some(pipeline):
    edited = paint(pipeline, PROMPT, {"red circle": half()}, 0.0, how())
    assert np.array_equal(edited.result, edited.without)
    edited = paint(pipeline, PROMPT, {"red circle": half(), "blue star": half("right")}, 2.0, how())
    assert not np.array_equal(edited.result, edited.without)


def test_bad_phrases_and_regions_are_refused(pipeline):
    with pytest.raises(ValueError, match="got 'red circle' and 'circle', which overlap"):
        paint(pipeline, PROMPT, {"red circle": half(), "circle": half()})
    with pytest.raises(ValueError, match="phrase: got 'a', which stands in 2 places"):
        paint(pipeline, PROMPT, {"a": half()})
    with pytest.raises(ValueError, match="got 'cube', which is not in"):
        paint(pipeline, PROMPT, {"cube": half()})
    with pytest.raises(ValueError, match="mask: got an empty one"):
        paint(pipeline, PROMPT, {"red": np.zeros((32, 32), bool)})
    with pytest.raises(ValueError, match=r"mask: got bool \(16, 16\), expected bool \(32, 32\)"):
        paint(pipeline, PROMPT, {"red": half(size=16)})
    with pytest.raises(ValueError, match="regions: got none"):
        paint(pipeline, PROMPT, {})
    with pytest.raises(ValueError, match="weight: got -1"):
        paint(pipeline, PROMPT, {"red": half()}, -1.0)
    with pytest.raises(ValueError, match="arrange: got -2, expected a number from 0"):
        paint(pipeline, PROMPT, {"red": half()}, arrange=-2)
