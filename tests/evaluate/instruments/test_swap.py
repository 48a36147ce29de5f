"""The swap of texts on random networks: the vector is A's and all else B's, exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from truth.tiny_raphael import small_unet, write_pipeline

from raphael.evaluate.instruments import swap as sw
from raphael.evaluate.scenes.reader import ReadObject, SceneReading
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.moe.unet import RaphaelUNet

A, B = ["a red circle on white", "a star"], ["a blue square on green", "two pink hearts on black"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def entry(colour: str, shape: str, background: str, suite: str = "single") -> dict:
    truth = {"objects": [{"colour": colour, "shape": shape}], "background": {"colour": background}}
    return {"prompt": f"a {colour} {shape} on {background}", "suite": suite, "truth": truth}


def read(colour: str, shape: str, background: str) -> SceneReading:
    return SceneReading(background, (ReadObject(shape, colour, (0.5, 0.5), 0.4, 0.1, "flat", 1.0),), "flat", None)


@torch.inference_mode()
def test_inside_the_res_blocks_read_as_text_and_attention_bs(pipeline):
    """Held against the network's own forward, its pooled text computed from A by hand."""
    unet = pipeline.unet
    assert unet.config.pooled_text
    a, b = pipeline.encode(A), pipeline.encode(B)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 900.0])
    plain = unet(x, t, b).prediction
    with sw.pooled_text_of(unet, sw.pooled_vectors(pipeline, A)):
        got = unet(x, t, b).prediction
        twice = unet(torch.cat([x, x]), torch.cat([t, t]), b.concat(b)).prediction
    own, mine = RaphaelUNet._pooled, unet._pooled(a.tokens, a.mask)
    try:
        RaphaelUNet._pooled = lambda self, tokens, mask: mine
        expected = unet(x, t, b).prediction
    finally:
        RaphaelUNet._pooled = own
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)
    torch.testing.assert_close(twice[:2], got, rtol=0, atol=1e-5)  # the conditional half alone
    torch.testing.assert_close(twice[2:], plain, rtol=0, atol=1e-5)
    assert torch.equal(unet(x, t, b).prediction, plain) and not unet.text_embedding._forward_hooks


def test_swapping_a_text_with_itself_changes_nothing(pipeline):
    prompts = [entry("red", "circle", "white"), entry("blue", "square", "black")]
    parts, seeds = pipeline.parts(), [(0, 0), (0, 1)]
    settings = dataclasses.replace(pipeline.defaults, steps=2)
    texts = [item["prompt"] for item in prompts]
    plain = sw.generate_images(parts, texts, seeds, settings)
    with sw.pooled_text_of(pipeline.unet, sw.pooled_vectors(pipeline, texts)):
        same = sw.generate_images(parts, texts, seeds, settings)
    assert abs(plain.astype(int) - same.astype(int)).max() <= 1


def test_pairs_differ_in_all_three_and_are_single_objects():
    red, blue = entry("red", "circle", "white"), entry("blue", "square", "black")
    alike, other = entry("red", "star", "green"), entry("pink", "heart", "cyan", suite="text")
    assert sw.pairs_of([red, blue, alike, other], 9) == [(blue, red), (alike, blue), (blue, alike)]
    assert sw.pairs_of([red, blue, alike], 1) == [(blue, red)] and sw.pairs_of([red, alike], 5) == []


def test_whose_counts_as_bs_and_neithers():
    pairs = [(entry("red", "circle", "white"), entry("blue", "square", "black"))] * 4
    readings = [read("red", "square", "black"), read("red", "circle", "black"), read("pink", "square", "black"),
                SceneReading("green", (), None, None)]  # fmt: skip
    found = sw.whose(pairs, readings)
    shares = {fact: tuple(row[name] for name in ("pooled", "attention", "neither")) for fact, row in found.items()}
    assert shares == {"colour": (0.5, 0.0, 0.5), "shape": (0.25, 0.5, 0.25), "background": (0.0, 0.75, 0.25)}
    assert found["colour"]["pooled_n"] == 4


def test_a_model_without_pooled_text_says_so_and_generates_bs(pipeline, monkeypatch):
    unet = RaphaelUNet(dataclasses.replace(small_unet(), pooled_text=False)).eval()
    monkeypatch.setattr(pipeline, "unet", unet)
    monkeypatch.setattr(pipeline, "defaults", dataclasses.replace(pipeline.defaults, steps=1))
    measured = sw.swap(pipeline, [(entry("red", "circle", "white"), entry("blue", "square", "black"))])
    assert measured["pooled_text"] is False and "no pooled text in this model" in sw.swap_text(measured)
    with pytest.raises(ValueError, match="got no pairs"):
        sw.swap(pipeline, [])
