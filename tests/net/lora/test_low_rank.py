"""Low rank beside frozen weights: against W x + (alpha / rank) up (down x) written out, and against plain networks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from truth.tiny_raphael import small_unet

from raphael.base.config.lora import LoraConfig
from raphael.base.config.preset import load_preset
from raphael.base.strict import ConfigError
from raphael.net.condition import Condition
from raphael.net.lora import low_rank
from raphael.net.lora.low_rank import LowRank, attach, check_rank, merged, pairs_in
from raphael.net.lora.sites import ALL, own_names, owners
from raphael.net.moe.unet import RaphaelUNet

EVERY = LoraConfig(rank=3, alpha=6.0, targets=ALL)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = RaphaelUNet(replace(small_unet(), text_layers=1, pooled_text=False, **changes))
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net.eval()


def given(net, batch=2):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, net.config.context_length, net.config.context_dim, generator=generator)
    mask = torch.arange(net.config.context_length).expand(batch, -1) < torch.tensor([[5], [9]])[:batch]
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.tensor([10.0, 700.0])[:batch], Condition(tokens, mask)


def trained(net, config=EVERY, seed=0):
    """With up that is not zero, as after a training."""
    attach(net, net, config, seed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def test_before_its_first_step_the_network_computes_the_same_bits():
    net = network()
    before = net(*given(net)).prediction
    attach(net, net, EVERY, 0)
    assert torch.equal(net(*given(net)).prediction, before)


@pytest.mark.parametrize(("shape", "rank"), [((5, 7), 2), ((3, 5, 7), 2), ((5, 4, 3, 3), 2)])
def test_the_sum_is_w_x_plus_scale_up_of_down_x(shape, rank):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    low = LowRank(weight, rank, 1.5).double()
    nn.init.normal_(low.up)
    got = low(weight)
    if len(shape) == 4:
        x = torch.randn(2, shape[1], 6, 6, dtype=torch.float64)
        conv = nn.functional.conv2d
        expected = conv(x, weight, padding=1) + 1.5 * conv(conv(x, low.down, padding=1), low.up)
        assert torch.allclose(conv(x, got, padding=1), expected, atol=1e-12)
        return
    x = torch.randn(shape[-1], dtype=torch.float64)
    for part in range(shape[0]) if len(shape) == 3 else [slice(None)]:
        expected = weight[part] @ x + 1.5 * low.up[part] @ (low.down[part] @ x)
        assert torch.allclose(got[part] @ x, expected, atol=1e-12)


def test_merged_it_is_a_plain_network_that_computes_the_same():
    net = trained(network())
    plain = network()
    assert not torch.allclose(net(*given(net)).prediction, plain(*given(plain)).prediction, atol=1e-3)
    plain.load_state_dict(merged(net.state_dict(), EVERY.strength))
    assert torch.allclose(net(*given(net)).prediction, plain(*given(plain)).prediction, atol=1e-5)


def test_only_what_is_low_rank_has_a_gradient():
    net = trained(network(), LoraConfig(rank=2)).train()
    net(*given(net)).prediction.square().mean().backward()
    with_gradient = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    low = {name for name, _ in net.named_parameters() if name.endswith((".up", ".down"))}
    assert with_gradient == low and {name for name, p in net.named_parameters() if p.requires_grad} == low
    assert all(parameter.grad.any() for name, parameter in net.named_parameters() if name in low)


def test_its_numbers_are_rank_times_in_plus_out_of_each_matrix():
    for targets in (("attention",), ALL):
        net, plain = network(), network()
        attach(net, net, LoraConfig(rank=2, targets=targets), 0)
        expected = 0
        for _, module, name in owners(plain, targets):
            shape = getattr(module, name).shape
            matrices, out = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
            expected += matrices * 2 * (math.prod(shape) // (matrices * out) + out)
        assert sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad) == expected


@pytest.mark.parametrize("preset", ["scenes", "sd", "raphael-3b"])
def test_on_attention_at_rank_4_it_is_less_than_a_hundredth_of_the_model(preset):
    with torch.device("meta"):
        net = RaphaelUNet(load_preset(preset).unet)
    whole = sum(parameter.numel() for parameter in net.parameters())
    pairs = 0
    for _, module, _ in owners(net, ("attention",)):
        pairs += 4 * (module.in_features + module.out_features)
    assert 0 < pairs < whole / 100


def test_gates_edge_heads_and_the_first_and_last_layer_are_no_targets():
    names = set(own_names(network()))
    assert not [name for name in names if "gate" in name or "edge" in name or name.startswith(("conv_", "time_emb"))]
    assert "middle.self_attention.qkv" in names and "middle.time_moe.experts.w1.3" in names
    assert "text_refiner.layers.0.qkv" in names and "down.0.0.conv1" in names


def test_attention_alone_is_the_default_and_experts_have_a_pair_each():
    net = network()
    attach(net, net, LoraConfig(rank=1), 0)
    assert all("attention" in site.parameter for site in pairs_in(net.state_dict(), 1.0))
    net = network()
    attach(net, net, LoraConfig(rank=1, targets=("experts",)), 0)
    pairs = pairs_in(net.state_dict(), 1.0)
    of_one = [site for site in pairs if site.parameter == "middle.space_moe.experts.w1"]
    assert [site.expert for site in of_one] == list(range(net.config.num_space_experts))
    down = [pairs[site].down for site in of_one]
    assert not torch.equal(down[0], down[1])


def test_equal_seeds_begin_alike_and_the_generator_of_torch_is_left_alone():
    states = []
    for seed in (1, 1, 2):
        net = network()
        before = torch.get_rng_state()
        attach(net, net, LoraConfig(rank=2), seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(net.state_dict()["middle.self_attention.qkv.parametrizations.weight.0.down"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_rank_above_a_side_and_a_target_that_is_absent_are_named():
    with pytest.raises(ConfigError, match=r"lora.rank: got 17, expected at most 16, the smaller side of \S+weight"):
        check_rank(network(), LoraConfig(rank=17))
    bare = network(time_layer="none", space_layer="none")
    with pytest.raises(ConfigError, match="lora.targets: got experts, but the network has none, expected some of"):
        check_rank(bare, LoraConfig(rank=1, targets=("experts",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("", 0, "ddp"), "expected a model that it is trained on"),
        (("m", 4, "ddp"), "chosen once a step"),
        (("m", 0, "fsdp2"), "parallel.strategy fsdp2, expected ddp"),
    ],
)
def test_settings_that_contradict_it_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(rank=2, dropout=0.5).check(*settings)
    LoraConfig().check(*settings)


def test_dropout_leaves_out_that_share_keeps_the_mean_and_is_a_function_of_seed_and_step():
    config = LoraConfig(rank=4, dropout=0.25)
    net = trained(network(), config)
    lows = [module for module in net.modules() if isinstance(module, LowRank)]
    seen = []
    for _ in range(200):
        low_rank._drop(net.train(), config, seed=3)
        seen.append(torch.stack([low.kept for low in lows]))
    kept = torch.stack(seen)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    n = kept.numel()
    assert abs(float((kept == 0).float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    again = trained(network(), config)
    again.lora_steps += 150  # as read from a checkpoint
    low_rank._drop(again.train(), config, seed=3)
    first = next(module for module in again.modules() if isinstance(module, LowRank))
    assert torch.equal(first.kept, kept[150, 0])


def test_dropout_leaves_out_components_of_the_sum_in_training_alone():
    config = LoraConfig(rank=2, dropout=0.5)
    net = trained(network(), config)
    low = next(module for module in net.modules() if isinstance(module, LowRank))
    weight = torch.zeros(len(low.up), low.down.shape[1])
    low.kept = torch.tensor([0.0, 2.0])
    low.train()
    assert torch.allclose(low(weight), 2 * low.up[:, 1:] @ low.down[1:], atol=1e-6)
    low.eval()
    assert torch.allclose(low(weight), low.up @ low.down, atol=1e-6)
    assert low_rank.STEPS not in merged(net.state_dict(), config.strength)
