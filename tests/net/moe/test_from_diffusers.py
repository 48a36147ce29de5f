"""Against diffusers' own UNet2DConditionModel, small and with random weights, of Stable Diffusion 1's and 2's kind."""

from dataclasses import replace

import pytest
import torch

from raphael.base.config.preset import load_preset
from raphael.net.condition import Condition
from raphael.net.moe.from_diffusers import config_from, load_diffusers
from raphael.net.moe.unet import RaphaelUNet

KIND = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "sample_size": 8,
    "attention_head_dim": 8,  # the number of heads
}
SD2 = {"attention_head_dim": (4, 8, 8), "use_linear_projection": True}
LENGTH = 7


def their_unet(**changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**KIND, **changes}).eval()
    with torch.no_grad():  # norms and biases away from one and zero, else a mistaken order would not show
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return unet


def our_unet(theirs, **changes):
    like = replace(load_preset("sd").unet, context_length=LENGTH, edge_channels=4, gate_hidden=0.5)
    torch.manual_seed(1)
    unet = RaphaelUNet(replace(config_from(dict(theirs.config), like), **changes)).eval()
    return unet, load_diffusers(unet, theirs.state_dict())


def outputs(theirs, ours):
    torch.manual_seed(2)
    x, context, t = torch.randn(2, 4, 16, 8), torch.randn(2, LENGTH, 24), torch.tensor([3, 870])
    mask = torch.arange(LENGTH) < torch.tensor([[3], [7]])  # SD attends to padding: the mask must not matter
    with torch.no_grad():
        return ours(x, t, Condition(context, mask)).prediction, theirs(x, t, context).sample


@pytest.mark.parametrize(
    "layers",
    [
        {"time_layer": "none", "space_layer": "dense"},
        {"time_layer": "dense", "space_layer": "dense"},
        {"time_layer": "moe", "space_layer": "moe"},
        {"time_layer": "dense", "space_layer": "moe"},
    ],
    ids=lambda layers: "-".join(layers.values()),
)
@pytest.mark.parametrize("kind", [{}, SD2], ids=["sd1", "sd2"])
def test_the_network_computes_what_diffusers_computes(kind, layers):
    theirs = their_unet(**kind)
    ours, transfer = our_unet(theirs, **layers)
    assert transfer.exact and not transfer.left_over
    mine, true = outputs(theirs, ours)
    assert true.std() > 0.1
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_accounted_for_and_only_gates_and_edge_heads_are_our_own():
    theirs = their_unet()
    ours, transfer = our_unet(theirs)
    names = [*transfer.matched, *transfer.initialised, *transfer.own]
    assert sorted(names) == sorted(ours.state_dict())
    assert transfer.own and all(".gate." in name or ".edge_head." in name for name in transfer.own)
    read = sum(theirs.state_dict()[name].numel() for name in theirs.state_dict())
    ff = sum(tensor.numel() for name, tensor in theirs.state_dict().items() if ".ff." in name or ".norm3." in name)
    matched = sum(ours.state_dict()[name].numel() for name in transfer.matched)
    norms = sum(ours.state_dict()[n].numel() for n in transfer.matched if ".norms.2." in n)
    assert matched == read - ff + norms


def test_experts_begin_alike_and_part_by_their_gradients():
    ours, _ = our_unet(their_unet())
    block = ours.transformer_blocks()[0]
    w1 = block.time_moe.experts.w1
    assert torch.equal(w1[0], w1[3]) and torch.equal(block.space_moe.experts.w1[0], w1[0])
    assert not block.space_moe.experts.w2.any()
    ours.train()
    prediction = ours(torch.randn(2, 4, 8, 8), torch.tensor([3, 870]), Condition(torch.randn(2, LENGTH, 24))).prediction
    prediction.square().mean().backward()
    assert block.space_moe.experts.w2.grad.flatten(1).norm(dim=1).count_nonzero() > 1
    assert not torch.equal(*block.space_moe.experts.w2.grad[:2])


def test_gelu_layers_take_the_value_half_and_the_loss_is_said():
    theirs = their_unet()
    ours, transfer = our_unet(theirs, time_layer="none", space_layer="dense", dense_activation="gelu")
    assert not transfer.exact and "gates of the feed-forwards: dense_activation is gelu" in transfer.text()
    state = theirs.state_dict()
    wide = state["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"]
    assert torch.equal(ours.middle.space_dense.wide.weight, wide[: len(wide) // 2])


def test_a_space_layer_in_the_first_place_is_said_to_be_another_function():
    theirs = their_unet()
    ours, transfer = our_unet(theirs, time_layer="none", mask_threshold=1.0)
    assert not transfer.exact and "inside the words' regions only" in transfer.text()
    mine, true = outputs(theirs, ours)
    assert (mine - true).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "in_channels 9, out_channels 4, expected equal numbers"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block: got .1, 2, 10., expected 1"),
        ({"class_embed_type": "timestep"}, "class_embed_type: got 'timestep', expected None"),
        ({"attention_head_dim": [5, 10, 20]}, "got .5, 10, 20. heads for widths"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "and their mirror"),
    ],
)
def test_a_unet_of_another_kind_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        config_from({**KIND, **change}, load_preset("sd").unet)


def test_missing_and_misshapen_weights_are_named():
    theirs = their_unet()
    state = theirs.state_dict()
    ours, _ = our_unet(theirs)
    with pytest.raises(ValueError, match="got no conv_in.weight"):
        load_diffusers(ours, {name: tensor for name, tensor in state.items() if name != "conv_in.weight"})
    with pytest.raises(ValueError, match=r"conv_in.weight: got shape \[32, 3, 3, 3\], expected \[32, 4, 3, 3\]"):
        load_diffusers(ours, {**state, "conv_in.weight": torch.zeros(32, 3, 3, 3)})


def test_stable_diffusions_own_shape_is_the_preset_sd_with_eight_heads():
    sd1 = {**KIND, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "norm_num_groups": 32}
    sd1["down_block_types"] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    sd1["up_block_types"] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    preset = load_preset("sd").unet
    config = config_from(sd1, preset)
    for name in ("channels", "res_blocks", "attention_levels", "norm_groups", "num_space_experts", "num_time_experts"):
        assert getattr(config, name) == getattr(preset, name)
    assert (config.num_heads, config.num_blocks) == (8, 16)
    with torch.device("meta"):
        dense = RaphaelUNet(replace(config, time_layer="none", space_layer="dense", edge_tokens="none"))
    # norms.2 is there without a layer to feed; 859,520,964 is what diffusers counts for Stable Diffusion 1.5
    idle = sum(p.numel() for block in dense.transformer_blocks() for p in block.norms[2].parameters())
    assert sum(p.numel() for p in dense.parameters()) - idle == 859_520_964
