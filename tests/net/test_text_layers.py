"""Text layers and positions: what the network has beside the paper's, and what it is without them."""

from dataclasses import replace

import pytest
import torch

from raphael.base.config.preset import RaphaelUNetConfig, load_preset
from raphael.base.strict import load, to_dict
from raphael.net.condition import Condition
from raphael.net.moe.block import MixtureInput
from raphael.net.moe.unet import RaphaelUNet
from raphael.net.text_layers import Positions, TextRefiner

CONFIG = load_preset("tiny-debug").unet
OURS = {"text_layers": 2, "positions": "learned", "positions_side": 8}


def unet(**changes):
    torch.manual_seed(0)
    net = RaphaelUNet(replace(CONFIG, **changes))
    with torch.no_grad():  # the zero-initialised layers would hide everything behind them
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net.eval()


def inputs(height=8, width=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, CONFIG.latent_channels, height, width, generator=generator)
    context = torch.randn(2, CONFIG.context_length, CONFIG.context_dim, generator=generator)
    mask = torch.arange(CONFIG.context_length) < torch.tensor([[5], [9]])
    return x, torch.tensor([10.0, 900.0]), context, mask


def test_by_default_the_network_has_neither_and_begins_with_the_weights_it_always_began_with():
    old = {name: value for name, value in to_dict(CONFIG).items() if name not in OURS}  # what old checkpoints say
    assert load(RaphaelUNetConfig, old, "an old checkpoint", "unet") == CONFIG
    torch.manual_seed(0)
    plain = RaphaelUNet(CONFIG).state_dict()
    torch.manual_seed(0)
    ours = RaphaelUNet(replace(CONFIG, positions="learned")).state_dict()
    added = ours.keys() - plain.keys()
    assert not plain.keys() - ours.keys() and added and all(name.endswith("positions.table") for name in added)
    assert not any("text_refiner" in name or "positions" in name for name in plain)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_positions_begin_at_zero_and_then_change_nothing():
    torch.manual_seed(0)
    plain = RaphaelUNet(CONFIG).eval()
    placed = RaphaelUNet(replace(CONFIG, positions="learned")).eval()
    placed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for net in (plain, placed):
            torch.manual_seed(1)
            net.conv_out.weight.normal_()
        x, t, context, mask = inputs()
        asked = x, t, Condition(context, mask)
        assert torch.equal(plain(*asked).prediction, placed(*asked).prediction)


def test_a_text_layer_is_attention_over_the_real_tokens_and_a_feed_forward_each_behind_a_norm():
    torch.manual_seed(0)
    refiner = TextRefiner(dim=8, head_dim=4, num_layers=1)
    x, mask = torch.randn(1, 5, 8), torch.tensor([[True, True, True, False, False]])
    layer = refiner.layers[0]
    h = layer.norm_attention(x[0, :3])
    q, k, v = (h @ layer.qkv.weight.T).chunk(3, dim=1)
    heads = [torch.softmax(q[:, s] @ k[:, s].T / 2, dim=1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
    after = x[0, :3] + layer.out(torch.cat(heads, dim=1))
    wide, narrow = layer.forward_layer.wide, layer.forward_layer.narrow
    after = after + narrow(torch.nn.functional.gelu(wide(layer.norm_forward(after))))
    torch.testing.assert_close(refiner(x, mask)[0, :3], refiner.norm(after))


@pytest.mark.parametrize("grad", [True, False])  # two ways of computing attention
def test_what_stands_in_the_padding_reaches_no_prediction(grad):
    net = unet(**OURS)
    x, t, context, mask = inputs()
    other = torch.where(mask[..., None], context, torch.full_like(context, 1000.0))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            net(x, t, Condition(context, mask)).prediction, net(x, t, Condition(other, mask)).prediction
        )
        changed = context.clone()
        changed[0, 4] += 1
        moved = net(x, t, Condition(changed, mask)).prediction - net(x, t, Condition(context, mask)).prediction
    assert moved[0].abs().max() > 0 and moved[1].abs().max() == 0


def test_every_real_token_reads_those_after_it():
    net = unet(**OURS)
    _, _, context, mask = inputs()
    changed = context.clone()
    changed[0, 4] += 1
    with torch.no_grad():
        moved = (net.refined(changed, mask) - net.refined(context, mask)).abs().amax(-1)
    assert (moved[0, :5] > 0).all() and (moved[1] == 0).all()


def test_remembering_refines_a_text_once_and_changes_no_bit():
    net = unet(**OURS)
    x, t, context, mask = inputs()
    calls = []
    net.text_refiner.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        plain = [net(x, t - step, Condition(context, mask)).prediction for step in range(3)]
        assert len(calls) == 3
        with net.remembering() as memory:
            kept = [net(x, t - step, Condition(context.clone(), mask.clone())).prediction for step in range(3)]
            assert memory.computed == 1 and len(calls) == 4
            fewer = net(x, t, Condition(context, mask & (torch.arange(mask.shape[1]) < 4))).prediction
            assert memory.computed == 2  # another mask is another text
            net.text_refiner.layers[0].out.weight.mul_(-1)
            after = net(x, t, Condition(context, mask)).prediction
            assert memory.computed == 3
        assert torch.equal(after, net(x, t, Condition(context, mask)).prediction)
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))
    assert not torch.equal(fewer, kept[0])


def test_the_announced_routes_are_those_of_the_refined_tokens():
    net = unet(**OURS)
    x, t, context, mask = inputs()
    with torch.no_grad():
        routes, taken = net.space_routes(context, mask), net(x, t, Condition(context, mask)).blocks
    for block, route in zip(taken, routes, strict=True):
        assert torch.equal(block.space.expert[mask], route[mask])


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (24, 4), (2, 2)])
def test_positions_serve_maps_of_any_size(size):
    net = unet(**OURS)
    x, t, context, mask = inputs(*size)
    output = net(x, t, Condition(context, mask))
    assert output.prediction.shape == x.shape and output.prediction.isfinite().all()
    output.prediction.square().sum().backward()
    assert all(block.positions.table.grad.abs().sum() > 0 for block in net.transformer_blocks())


def test_a_table_is_read_as_it_is_at_its_own_size_and_interpolated_at_others():
    positions = Positions(2, 8)
    with torch.no_grad():  # a vector that grows by 1 a row, and one that is the same everywhere
        positions.table[..., 0] = torch.arange(8.0)[:, None]
        positions.table[..., 1] = 7.0
        assert torch.equal(positions.of(8, 8), positions.table.flatten(0, 1))
        twice = positions.of(16, 8).view(16, 8, 2)
    torch.testing.assert_close(twice[..., 1], torch.full((16, 8), 7.0))
    rows = twice[6:10, :, 0]  # away from the rim a cubic keeps a straight line: half a row a step
    torch.testing.assert_close(rows, (torch.arange(6, 10) / 2 - 0.25)[:, None].expand(4, 8), atol=0.05, rtol=0)


def test_two_places_that_look_alike_are_told_apart_by_positions_alone():
    """A constant map: self-attention cannot tell its inner pixels apart without them."""
    x, t, context, mask = inputs(16, 16)
    x = torch.ones_like(x)
    plain, placed = unet(), unet(**OURS)
    with torch.no_grad():
        for net, alike in ((plain, True), (placed, False)):
            block = net.transformer_blocks()[0]
            features = torch.ones(2, block.norm_in.num_channels, 16, 16)
            time = net.time_embedding(t)
            out, _ = block(features, MixtureInput(time=time, embedding=time, tokens=context, mask=mask))
            assert torch.allclose(out[..., 3, 3], out[..., 3, 12], atol=1e-6) == alike


def test_text_layers_want_a_width_of_whole_heads():
    with pytest.raises(ValueError, match="context_dim: got 30 with text_layers 1, expected a multiple of head_dim"):
        replace(CONFIG, text_layers=1, context_dim=30)


def test_a_pooled_caption_is_what_its_mean_token_reads_of_its_real_tokens():
    """Against attention written out, head by head, in float64; padding may hold anything."""
    from raphael.net.text_layers import AttentionPool

    torch.manual_seed(0)
    pool, tokens = AttentionPool(12, 4, 7).double(), torch.randn(3, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    tokens[1, 2:] = float("nan")
    pooled = pool(tokens, mask)
    for row in range(3):
        real = pool.norm(tokens[row][mask[row]])
        read = torch.zeros(12, dtype=torch.float64)
        if len(real):
            query, (keys, values) = pool.q(real.mean(0)), pool.kv(real).chunk(2, dim=-1)
            for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
                weights = torch.softmax(keys[:, head] @ query[head] / 2.0, dim=0)
                read[head] = weights @ values[:, head]
        torch.testing.assert_close(pooled[row], pool.out(read), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pool(tokens[:1], None), pooled[:1])
