"""Knock-outs held against naive loops, on random networks: what they take away, what they cost, that they leave."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from truth.tiny_raphael import small_unet, write_pipeline

from raphael.evaluate.instruments import knockouts as ko
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.moe.unet import RaphaelUNet


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    pipeline = RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))
    with torch.no_grad():  # attention that chooses: that of random weights is flat, and masks of it are full
        for block in pipeline.unet.transformer_blocks():
            block.cross_attention.q.weight *= 30
    return pipeline


@pytest.fixture
def asked(pipeline):
    generator = torch.Generator().manual_seed(0)
    text = pipeline.encode(["a red circle", "two blue squares on green", "a star", "a cross above a heart"])
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    return ko.Images(latents, text, "test images")


def inputs(unet: RaphaelUNet, pipeline, asked):
    t = torch.tensor([100, 300, 600, 990])
    return asked.latents, t, asked.text


def predict(pipeline, asked):
    with torch.inference_mode():
        return pipeline.unet(*inputs(pipeline.unet, pipeline, asked)).prediction


@pytest.mark.parametrize("part", ko.SPACE + ko.TIME)
def test_every_part_changes_the_prediction_inside_and_nothing_is_left_behind(part, pipeline, asked):
    before = predict(pipeline, asked)
    with ko.knocked_out(pipeline.unet, part):
        assert not torch.equal(predict(pipeline, asked), before)
    assert torch.equal(predict(pipeline, asked), before)
    with pytest.raises(RuntimeError, match="in between"), ko.knocked_out(pipeline.unet, part, block=0):
        raise RuntimeError("in between")
    assert torch.equal(predict(pipeline, asked), before)
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


@pytest.mark.parametrize("kind", ["space", "time"])
def test_a_removed_mixture_is_a_network_whose_experts_give_nothing(kind, pipeline, asked):
    with ko.knocked_out(pipeline.unet, f"{kind}_moe_removed"):
        got = predict(pipeline, asked)
    with silenced(pipeline.unet, f"{kind}_moe"):
        torch.testing.assert_close(got, predict(pipeline, asked), rtol=0, atol=0)


class silenced:  # noqa: N801
    """Experts of W2 = 0 and b2 = 0: the mixture is there, and is the identity of the residual stream."""

    def __init__(self, unet, kind):
        self.banks = [getattr(block, kind).experts for block in unet.transformer_blocks()]

    def __enter__(self):
        self.kept = [(bank.w2.detach().clone(), bank.b2.detach().clone()) for bank in self.banks]
        with torch.no_grad():
            for bank in self.banks:
                bank.w2.zero_()
                bank.b2.zero_()

    def __exit__(self, *exception):
        with torch.no_grad():
            for bank, (w2, b2) in zip(self.banks, self.kept, strict=True):
                bank.w2.copy_(w2)
                bank.b2.copy_(b2)


def test_uniform_routes_are_the_mean_of_all_experts(pipeline, asked):
    """Of a block on its own: a loop over experts, tokens and pixels."""
    block = pipeline.unet.transformer_blocks()[0]
    moe, generator = block.space_moe, torch.Generator().manual_seed(1)
    dim = moe.experts.w1.shape[-1]
    h, context = torch.randn(2, 6, dim, generator=generator), torch.randn(2, 5, moe.gate.dim, generator=generator)
    attention = torch.rand(2, 6, 5, generator=generator).softmax(-1)
    with torch.inference_mode(), ko.knocked_out(pipeline.unet, "uniform_space_routes"):
        got = moe(h, context, attention)[0]
    with torch.inference_mode():
        expected = torch.zeros_like(h)
        for b, i, k in np.ndindex(2, 5, moe.gate.num_experts):
            mask = attention[b, :, i] >= moe.mask_threshold * attention[b, :, i].max()
            w1, b1, w2, b2 = (weight[k] for weight in (moe.experts.w1, moe.experts.b1, moe.experts.w2, moe.experts.b2))
            inside = h[b] * mask[:, None]
            hidden = torch.nn.functional.gelu(inside @ w1.T + b1, approximate=gelu_form())
            expected[b] += (hidden @ w2.T + b2) / (5 * moe.gate.num_experts)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

        time = block.time_moe
        with ko.knocked_out(pipeline.unet, "uniform_time_routes"):
            got = time(h, torch.randn(2, time.gate.dim, generator=generator))[0]
        every = []
        for k in range(time.gate.num_experts):
            w1, b1, w2, b2 = (
                weight[k] for weight in (time.experts.w1, time.experts.b1, time.experts.w2, time.experts.b2)
            )
            every.append(torch.nn.functional.gelu(h @ w1.T + b1, approximate=gelu_form()) @ w2.T + b2)
        torch.testing.assert_close(got, torch.stack(every).mean(0), rtol=1e-4, atol=1e-5)


def gelu_form() -> str:
    from raphael.net import layers

    x = torch.linspace(-3, 3, 13)
    same = torch.allclose(layers.gelu(x), torch.nn.functional.gelu(x), atol=1e-7)
    return "none" if same else "tanh"


def test_masks_of_ones_cover_the_whole_map(pipeline, asked):
    measured = ko.knockouts(ko.Knockouts(pipeline, asked, precision="fp32", every_block=()))
    assert all(0 < cover < 1 for cover in measured["mask_cover"])
    with ko.knocked_out(pipeline.unet, "masks_of_ones"):
        assert ko.knockouts(ko.Knockouts(pipeline, asked, precision="fp32", every_block=()))["mask_cover"] == [1.0] * 7
    assert {block.space_moe.mask_threshold for block in pipeline.unet.transformer_blocks()} == {0.2}


def test_an_identity_costs_nothing_and_is_called_inert_and_a_part_that_works_is_not(pipeline, asked):
    with silenced(pipeline.unet, "space_moe"):
        measured = ko.knockouts(ko.Knockouts(pipeline, asked, precision="fp32"))
        text = ko.knockout_table(measured)
    rows = {(row["part"], row["block"]): row for row in measured["parts"]}
    assert len(rows) == (len(ko.SPACE) + len(ko.TIME)) * (1 + pipeline.unet.num_blocks)
    for part in ko.SPACE:
        assert rows[part, None]["cost"] == 0 and rows[part, None]["inert"]
        assert rows[part, None]["low"] == rows[part, None]["high"] == 0
    assert "inert" in next(line for line in text.splitlines() if line.startswith("space moe removed"))


def test_a_cost_is_the_rise_over_the_loss_of_a_loop_over_images(pipeline, asked):
    measured = ko.knockouts(ko.Knockouts(pipeline, asked, precision="fp32", every_block=("time_moe_removed",), seed=2))

    def loss() -> float:
        from raphael.base.randomness import SampleRng

        total = 0.0
        for quarter in range(4):
            for row in range(4):
                t = torch.tensor([int((quarter + (row + 0.5) / 4) / 4 * 1000)])
                x0, noise = asked.latents[row : row + 1], SampleRng(2, 0, [row]).normal("knockouts", (4, 8, 8))
                text = asked.text.rows([row])
                out = pipeline.unet(pipeline.schedule.add_noise(x0, noise, t), t, text).prediction
                a = pipeline.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
                v = a.sqrt() * noise - (1 - a).sqrt() * x0
                total += float((out - v).square().mean()) / 16
        return total

    with torch.inference_mode():
        base = loss()
        assert measured["loss"] == pytest.approx(base, rel=1e-4)
        with ko.knocked_out(pipeline.unet, "time_moe_removed", 1):
            expected = loss() / base - 1
    row = next(row for row in measured["parts"] if (row["part"], row["block"]) == ("time_moe_removed", 1))
    assert row["cost"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert row["inert"] == (row["cost"] < 0.01)


def test_a_network_without_mixtures_has_no_parts_and_a_name_that_is_none_is_refused():
    unet = RaphaelUNet(dataclasses.replace(small_unet(), space_layer="dense", time_layer="none"))
    assert ko.parts_of(unet) == []
    assert ko.parts_of(RaphaelUNet(dataclasses.replace(small_unet(), space_layer="dense"))) == list(ko.TIME)
    with pytest.raises(ValueError, match="got 'gates', expected one of masks_of_ones"), ko.knocked_out(unet, "gates"):
        pass
