import contextlib
import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from raphael.base.config.preset import load_preset
from raphael.net.attention import ActiveHooks, CrossAttention, SelfAttention
from raphael.net.condition import AttentionHooks, AttentionSite, Condition
from raphael.net.layers import FeedForward, sinusoidal_embedding
from raphael.net.moe.block import GateNoise, MixtureInput
from raphael.net.moe.experts import ExpertBank
from raphael.net.moe.unet import RaphaelUNet

CONFIG = load_preset("tiny-debug").unet


def inputs(batch=2, side=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CONFIG.latent_channels, side, side, generator=generator)
    t = torch.linspace(0, 999, batch)
    context = torch.randn(batch, CONFIG.context_length, CONFIG.context_dim, generator=generator)
    mask = torch.arange(CONFIG.context_length) < torch.tensor([[5], [9]])[:batch]
    return x, t, context, mask


def asked():
    x, t, context, mask = inputs()
    return x, t, Condition(context, mask)


def unet(**changes):
    torch.manual_seed(0)
    net = RaphaelUNet(replace(CONFIG, **changes))
    with torch.no_grad():  # the zero-initialised layers would hide everything behind them
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net.eval()


def hooks(rows, bias=None, edit=None):
    condition = Condition(torch.zeros(rows, 1, 1), hooks=AttentionHooks(bias, edit))
    return ActiveHooks.of(condition, rows, torch.device("cpu"))


def test_the_sd_shape_has_the_sixteen_transformer_blocks_of_the_paper():
    with torch.device("meta"):
        assert RaphaelUNet(load_preset("sd").unet).num_blocks == 16
        net = RaphaelUNet(load_preset("raphael-3b").unet)
    assert net.num_blocks == 16
    unet_millions = sum(p.numel() for p in net.parameters()) / 1e6
    # with OpenCLIP-g/14's text tower (354 M) and Stable Diffusion's autoencoder (84 M): three billion, within 5 %
    assert 2850 <= unet_millions + 354 + 84 <= 3150


def test_blocks_come_in_the_order_of_the_forward_pass_with_the_maps_that_are_announced():
    net = unet()
    x, t, context, mask = inputs()
    seen = []
    hooks = AttentionHooks(edit=lambda at, a: seen.append(at.site) or a)
    output = net(x, t, Condition(context, mask, hooks=hooks), collect=True)
    assert [site.block for site in seen if site.kind == "cross"] == list(range(net.num_blocks))
    assert [(b.height, b.width) for b in output.blocks] == net.attention_maps_px(8, 8)
    assert [block.index for block in net.transformer_blocks()] == list(range(net.num_blocks))
    for block in output.blocks:
        assert block.edge_logits.shape == (2, 1, block.height, block.width)
        torch.testing.assert_close(block.attention.sum(-1), torch.ones(2, block.height * block.width))


@pytest.mark.parametrize("name", ["tiny", "sd-debug", "raphael-3b"])
def test_the_number_of_blocks_follows_from_the_preset(name):
    config = load_preset(name).unet
    with torch.device("meta"):
        net = RaphaelUNet(config)
    assert config.num_blocks == net.num_blocks == len(net.transformer_blocks()) == len(net.attention_maps_px(64, 64))


def test_padding_changes_nothing_when_the_mean_is_over_real_tokens_and_something_when_over_all():
    x, t, context, mask = inputs()
    other = torch.where(mask.unsqueeze(-1), context, context + 1)
    real, everything = unet(mean_over="real_tokens"), unet(mean_over="all_tokens")
    assert torch.equal(real(x, t, Condition(context, mask)).prediction, real(x, t, Condition(other, mask)).prediction)
    assert not torch.allclose(
        everything(x, t, Condition(context, mask)).prediction,
        everything(x, t, Condition(other, mask)).prediction,
        atol=1e-4,
    )


def test_routes_are_functions_of_the_prompt_and_of_the_timestep_alone():
    net = unet()
    x, t, context, mask = inputs()
    output = net(x, t, Condition(context, mask))
    space, time = net.space_routes(context), net.time_routes(t)
    assert space.shape == (net.num_blocks, 2, CONFIG.context_length) and time.shape == (net.num_blocks, 2)
    for index, block in enumerate(output.blocks):
        assert torch.equal(block.space.expert, space[index])
        assert torch.equal(block.time.expert, time[index])


def test_gate_noise_given_by_the_caller_makes_training_repeatable():
    net = unet(gate_noise=1.0).train()
    x, t, context, mask = inputs()
    generator = torch.Generator().manual_seed(5)
    space = torch.randn(2, net.num_blocks, CONFIG.context_length, CONFIG.num_space_experts, generator=generator)
    noise = GateNoise(space, torch.randn(2, net.num_blocks, CONFIG.num_time_experts, generator=generator))
    first, second = (net(x, t, Condition(context, mask), gate_noise=noise).prediction for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, net.eval()(x, t, Condition(context, mask)).prediction)


def test_every_parameter_gets_a_gradient_whatever_was_routed():
    net = unet(num_space_experts=5, num_time_experts=5)
    output = net(*asked(), collect=True)
    (output.prediction.square().sum() + sum(b.edge_logits.square().sum() for b in output.blocks)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_attention_with_an_edit_that_changes_nothing_equals_the_fast_path():
    torch.manual_seed(0)
    layer, h = SelfAttention(32, 16), torch.randn(2, 9, 32)
    site = AttentionSite("self", 0, 3, 3)
    torch.testing.assert_close(layer(h, site), layer(h, site, hooks(2, edit=lambda at, a: a)))


def test_cross_attention_is_softmax_of_scaled_scores_head_by_head():
    torch.manual_seed(0)
    layer, h, context = CrossAttention(8, 6, 4), torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    out, attention = layer(h, context, None, AttentionSite("cross", 0, 5, 1))
    q, kv = h[0] @ layer.q.weight.T, context[0] @ layer.kv.weight.T
    maps = [torch.softmax(q[:, s] @ kv[:, s].T / 2, dim=-1) for s in (slice(0, 4), slice(4, 8))]
    values = [maps[i] @ kv[:, 8 + 4 * i : 12 + 4 * i] for i in range(2)]
    torch.testing.assert_close(attention[0], (maps[0] + maps[1]) / 2)
    torch.testing.assert_close(out[0], torch.cat(values, -1) @ layer.out.weight.T + layer.out.bias)


def test_a_bias_on_the_scores_moves_attention_to_its_token():
    layer, h, context = CrossAttention(8, 6, 4), torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    push = torch.tensor([0.0, 50.0, 0.0])
    _, attention = layer(h, context, None, AttentionSite("cross", 0, 5, 1), hooks(1, lambda at, scores: push))
    assert attention[..., 1].min() > 0.99


def test_the_time_embedding_is_cos_and_sin_at_geometric_frequencies():
    t, dim = torch.tensor([0.0, 3.0]), 6
    frequency = 10_000.0 ** (-torch.arange(3) / 3)
    expected = torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], -1)
    torch.testing.assert_close(sinusoidal_embedding(t, dim), expected)


def test_a_sample_without_any_token_attends_to_nothing_and_stays_finite():
    torch.manual_seed(0)
    layer, h, context = CrossAttention(8, 6, 4), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    mask = torch.tensor([[False] * 3, [True, False, True]])
    out, attention = layer(h, context, mask, AttentionSite("cross", 0, 5, 1))
    assert (attention[0] == 0).all() and (attention[1, :, 1] == 0).all()
    torch.testing.assert_close(out[0], layer.out.bias.expand(5, 8))
    torch.testing.assert_close(attention[1].sum(-1), torch.ones(5))


def test_texts_are_read_once_while_remembering_and_change_no_bit():
    net = unet()
    x, t, context, mask = inputs()
    with torch.no_grad():
        plain = [net(x, t + step, Condition(context, mask)).prediction for step in range(3)]
        with net.remembering() as memory:
            kept = [net(x, t + step, Condition(context.clone(), mask)).prediction for step in range(3)]
            assert memory.computed == 1
            net(x, t, Condition(context + 1, mask))
            assert memory.computed == 2
        net(x, t, Condition(context, mask))
        assert memory.computed == 2  # outside nothing is remembered
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))


@pytest.mark.parametrize("where", ["cross_attention.kv.weight", "space_moe.gate.net.0.weight"])
def test_a_changed_weight_is_noticed_while_remembering(where):
    net = unet()
    x, t, context, mask = inputs()
    weight = net.transformer_blocks()[1].get_parameter(where)
    with torch.no_grad(), net.remembering() as memory:
        net(x, t, Condition(context, mask))
        weight.mul_(-2)
        changed = net(x, t, Condition(context, mask)).prediction
        assert memory.computed == 2
    with torch.no_grad():
        assert torch.equal(changed, net(x, t, Condition(context, mask)).prediction)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_samplings_between_steps_of_a_fused_optimizer_remember_nothing_of_the_weights_before(inside, bf16):
    # it writes without counting it in Tensor._version: whoever enters `remembering` begins anew
    net = unet()
    x, t, context, mask = inputs()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=True)

    @torch.no_grad()
    def draw():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return net(x, t, Condition(context, mask)).prediction

    before = None
    with net.remembering() if inside else contextlib.nullcontext():
        for _ in range(3):
            with net.remembering() as memory:
                drawn = draw()
                assert torch.equal(draw(), drawn) and memory.computed == 1
            net.zero_grad()
            twin = copy.deepcopy(net)  # its weights lie elsewhere, and nothing was remembered of them
            twin._memory = None
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                assert torch.equal(drawn, twin(x, t, Condition(context, mask)).prediction)
            assert before is None or not torch.equal(drawn, before)
            before = drawn
            net(x, t, Condition(context, mask)).prediction.square().sum().backward()
            optimizer.step()


def test_a_changed_balance_bias_is_noticed_while_remembering():
    net = unet()
    x, t, context, mask = inputs()
    with torch.no_grad(), net.remembering() as memory:
        net(x, t, Condition(context, mask))
        net.transformer_blocks()[0].space_moe.gate.balance_bias += 1
        net(x, t, Condition(context, mask))
    assert memory.computed == 2
    with torch.no_grad(), net.remembering() as memory, torch.autocast("cpu", torch.bfloat16):
        net(x, t, Condition(context, mask))
    assert memory.computed == 1


def test_training_and_gradients_do_without_the_memory():
    net = unet()
    with net.remembering() as memory:
        net(*asked())
        net.train()
        with torch.no_grad():
            net(*asked())
    assert memory.computed == 0


def test_a_nan_reaches_its_own_sample_and_no_other():
    net = unet(mean_over="all_tokens")
    x, t, context, _ = inputs()
    for broken in (x, t, context):
        kept = broken.clone()
        broken[0].view(-1)[0] = float("nan")
        with torch.no_grad():
            prediction = net(x, t, Condition(context)).prediction
        assert prediction[0].isnan().all() and prediction[1].isfinite().all()
        broken.copy_(kept)


def test_inputs_of_another_shape_are_refused_with_what_was_expected():
    net = unet()
    x, t, context, mask = inputs()
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4, 8, 7\).*multiples of 2"):
        net(x[..., :7], t, Condition(context, mask))
    with pytest.raises(ValueError, match=r"tokens: got shape \(2, 15, 32\), expected \(B, 16, 32\)"):
        net(x, t, Condition(context[:, :15], mask[:, :15]))
    with pytest.raises(ValueError, match=r"tokens: got shape \(2, 17, 32\), expected \(B, 16, 32\)"):
        net(x, t, Condition(torch.zeros(2, 17, 32)))
    with pytest.raises(ValueError, match=r"t: got shape \(3,\), expected \(B,\) = \(2,\)"):
        net(x, torch.zeros(3), Condition(context, mask))
    with pytest.raises(ValueError, match=r"tokens: got shape \(1, 16, 32\)"):
        net(x, t, Condition(context[:1]))
    with pytest.raises(ValueError, match="mask: got torch.int64, expected torch.bool"):
        net(x, t, Condition(context, mask.long()))


def test_the_edge_head_can_read_the_closing_tokens_map_alone():
    net = unet(edge_tokens="last")
    x, t, context, mask = inputs()
    block = net(x, t, Condition(context, mask), collect=True).blocks[0]
    closing = block.attention[[0, 1], :, [4, 8]].unsqueeze(-1) * CONFIG.context_length
    expected = net.transformer_blocks()[0].edge_head(closing, block.height, block.width)
    torch.testing.assert_close(block.edge_logits, expected)


def test_without_residual_and_norm_a_block_is_the_printed_chain():
    from torch import nn

    net = unet(moe_residual=False, moe_norm=False)
    block = net.transformer_blocks()[0]
    assert [type(norm) for norm in block.norms] == [nn.LayerNorm] * 2 + [nn.Identity] * 2
    with torch.no_grad():  # experts that give 0: with nothing around them nothing is left but the outer residual
        for parameter in (block.space_moe.experts.w2, block.space_moe.experts.b2, block.out.bias):
            parameter.zero_()
        x, t, context, _ = inputs()
        features = torch.randn(2, block.norm_in.num_channels, 8, 8)
        time = net.time_embedding(t)
        assert torch.equal(block(features, MixtureInput(time=time, embedding=time, tokens=context))[0], features)


@pytest.mark.parametrize(("kind", "attribute"), [("space", "space_moe"), ("time", "time_moe")])
@pytest.mark.parametrize("layer", ["dense", "none"])
def test_a_mixture_may_be_a_plain_feed_forward_or_nothing(kind, attribute, layer):
    net = unet(**{f"{kind}_layer": layer})
    x, t, context, mask = inputs()
    output = net(x, t, Condition(context, mask), collect=True)
    for module, block in zip(net.transformer_blocks(), output.blocks, strict=True):
        assert getattr(module, attribute) is None and getattr(block, kind) is None
        assert (getattr(module, f"{kind}_dense") is None) == (layer == "none")
    routes = net.space_routes(context) if kind == "space" else net.time_routes(t)
    assert len(routes) == 0 and output.prediction.isfinite().all()
    with net.remembering(), torch.no_grad():
        torch.testing.assert_close(net(x, t, Condition(context, mask)).prediction, output.prediction)


def test_a_dense_layer_is_the_feed_forward_of_its_formula_with_and_without_a_gate():
    h = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    plain, gated = FeedForward(8, 4), FeedForward(8, 4, "geglu")
    torch.testing.assert_close(plain(h), plain.narrow(torch.nn.GELU()(plain.wide(h))))
    value, gate = gated.wide(h)[..., :32], gated.wide(h)[..., 32:]
    normal = torch.distributions.Normal(0, 1)
    torch.testing.assert_close(gated(h), gated.narrow(value * gate * normal.cdf(gate)))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_whose_map_nobody_reads_equals_attention_with_its_map(gradients, masked):
    torch.manual_seed(0)
    layer, h = CrossAttention(8, 6, 4), torch.randn(3, 5, 8)
    context, site = torch.randn(3, 4, 6), AttentionSite("cross", 0, 1, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool() if masked else None
    if masked:  # 0 * NaN is NaN in the gradient of the keys' weight, whichever way
        context = torch.where(mask.unsqueeze(-1), context, 9.0 if gradients else torch.nan)
    with torch.set_grad_enabled(gradients):
        want, seen = layer(h, context, mask, site)
        got, unseen = layer(h, context, mask, site, need_map=False)
    torch.testing.assert_close(got, want)
    assert seen is not None and unseen is None
    if gradients:
        for wanted, found in zip(*(torch.autograd.grad(out.sum(), layer.parameters()) for out in (want, got))):
            torch.testing.assert_close(found, wanted)


def test_without_edge_heads_there_are_no_edges_and_the_rest_is_the_same():
    x, t, context, mask = inputs()
    output = unet(edge_tokens="none").train()(x, t, Condition(context, mask), collect=True)
    assert all(block.edge_logits is None for block in output.blocks)


def test_a_dense_layer_of_the_experts_joint_width_costs_what_the_mixture_costs():
    """Equal floating-point operations, as the ablation's arms claim: K experts of expansion e against one of K e."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(**changes):
        with torch.device("meta"):
            net = RaphaelUNet(replace(load_preset("tiny").unet, **changes)).eval()
            size = (1, 4, 16, 16), (1,), (1, 32, 128)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                x, t, tokens = (torch.empty(*shape) for shape in size)
                net(x, t, Condition(tokens))
        return counter.get_total_flops()

    full = flops()
    assert flops(space_layer="dense", dense_expansion=8) == pytest.approx(full, rel=0.02)
    assert flops(time_layer="dense", dense_expansion=2) == pytest.approx(full, rel=0.02)
    assert flops(time_layer="none", space_layer="dense", dense_expansion=10) == pytest.approx(full, rel=0.02)


def test_the_map_is_the_mean_or_the_maximum_of_the_heads():
    torch.manual_seed(0)
    mean, largest = CrossAttention(8, 6, 4), CrossAttention(8, 6, 4, "max_of_heads")
    largest.load_state_dict(mean.state_dict())
    h, context, site = torch.randn(2, 5, 8), torch.randn(2, 3, 6), AttentionSite("cross", 0, 1, 5)
    q, k = mean.q(h).view(2, 5, 2, 4), mean.kv(context).view(2, 3, 2, 2, 4)[:, :, 0]
    heads = torch.stack([torch.softmax(q[:, :, i] @ k[:, :, i].mT / 2, dim=-1) for i in range(2)])
    torch.testing.assert_close(mean(h, context, None, site)[1], heads.mean(0))
    torch.testing.assert_close(largest(h, context, None, site)[1], heads.amax(0))
    assert torch.equal(largest(h, context, None, site)[0], mean(h, context, None, site)[0])


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_every_bank_of_experts_is_built_once_with_the_activation_of_the_preset(activation, monkeypatch):
    built = []
    init = ExpertBank.__init__
    monkeypatch.setattr(ExpertBank, "__init__", lambda bank, *rest: (built.append(bank), init(bank, *rest))[1])
    net = unet(expert_activation=activation)
    assert len(built) == 2 * net.num_blocks
    halves = 2 if activation == "geglu" else 1
    assert all(bank.w1.shape[1] == halves * bank.w2.shape[2] for bank in built)


def test_sampling_imports_no_compiler_which_costs_seconds_and_serves_training_alone():
    program = "import sys, raphael.net.moe.unet, raphael.diffusion.sampling, raphael.generate.pipeline; "
    program += "print([name for name in ('torch._dynamo', 'raphael.net.moe.covered') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
