from dataclasses import replace

import pytest
import torch
from torch import nn
from truth.toy_training import LOOP

from raphael.train.optim.ema import Ema, Landing
from raphael.train.optim.optimizer import FusedAdamW, clip_gradients, learning_rate, make_optimizer, parameter_groups


class Odd(nn.Module):
    decayed = ("w1",)

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(2, 3, 4))
        self.scale = nn.Parameter(torch.zeros(4))


def names(module, groups):
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    return [{by_id[id(parameter)] for parameter in group["params"]} for group in groups]


def test_only_mixing_matrices_are_decayed():
    module = nn.ModuleDict({
        "linear": nn.Linear(2, 2), "conv": nn.Conv2d(2, 2, 1), "up": nn.ConvTranspose2d(2, 2, 1), "norm":
        nn.GroupNorm(1, 2),
        "embedding": nn.Embedding(3, 2), "attention": nn.MultiheadAttention(2, 1), "odd": Odd(),
        "frozen": nn.Linear(2, 2).requires_grad_(False),
    })  # fmt: skip
    decayed, plain = names(module, parameter_groups(module, 0.1))
    assert decayed == {
        "linear.weight",
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "odd.w1",
    }
    assert "embedding.weight" in plain and "norm.weight" in plain and "odd.scale" in plain and "linear.bias" in plain
    assert not any(name.startswith("frozen") for name in decayed | plain)


def test_a_group_without_parameters_is_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert len(parameter_groups(nn.LayerNorm(2), 0.1)) == 1
    with pytest.raises(ValueError, match="expected something to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


def test_tied_weights_are_in_one_group_once():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    assert sum(len(group["params"]) for group in parameter_groups(module, 0.1)) == 3


def test_the_rate_warms_up_and_ends_at_zero():
    loop = replace(LOOP, learning_rate=1.0, warmup_images=100, num_images=1100)
    assert learning_rate(50, loop) == pytest.approx(0.5)
    assert learning_rate(100, loop) == pytest.approx(1.0)
    assert learning_rate(600, loop) == pytest.approx(0.5)
    assert learning_rate(1100, loop) == pytest.approx(0.0) == learning_rate(1200, loop)
    constant = replace(loop, schedule="constant")
    assert learning_rate(1, constant) == pytest.approx(0.01) and learning_rate(900, constant) == 1.0
    assert learning_rate(8, replace(constant, warmup_images=0)) == 1.0


def test_clipping_is_torchs_own():
    a, b = (nn.Linear(3, 3) for _ in range(2))
    b.load_state_dict(a.state_dict())
    for module in (a, b):
        (module(torch.arange(6.0).view(2, 3)) ** 2).sum().backward()
    norm = clip_gradients(a.parameters(), 0.5)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(b.parameters(), 0.5))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    before = a.weight.grad.clone()
    clip_gradients(a.parameters(), 0.0)
    assert torch.equal(a.weight.grad, before)


def test_the_update_is_the_textbooks_adamw():
    layer = nn.Linear(3, 2, bias=False).double()
    loop = replace(LOOP, weight_decay=0.1, learning_rate=0.01)
    optimizer = make_optimizer(layer, loop)
    weight, m, v = layer.weight.detach().clone(), 0.0, 0.0
    for t in range(1, 6):
        layer.weight.grad = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        g = layer.weight.grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-9, atol=1e-12)


def test_the_ema_follows_its_formula():
    weight = nn.Parameter(torch.zeros(3))
    ema, truth = Ema({"w": weight}, 0.7), torch.zeros(3)
    for count in range(1, 30):
        with torch.no_grad():
            weight += count
        ema.update(count)
        decay = min(0.7, (1 + count) / (10 + count))
        truth = decay * truth + (1 - decay) * weight.detach()
    torch.testing.assert_close(ema.weights()["w"], truth)
    own = weight.detach().clone()
    with ema.applied():
        assert torch.equal(weight, ema.shadow["w"])
    assert torch.equal(weight, own)


def test_an_ema_that_starts_late_is_the_weights_until_then_and_forgets_what_was_before():
    weight = nn.Parameter(torch.zeros(3))
    ema, truth = Ema({"w": weight}, 0.7, start=4), None
    for count in range(1, 20):
        with torch.no_grad():
            weight += count
        ema.update(count)
        if count == 4:
            truth = weight.detach().clone()
        if count < 5:
            assert torch.equal(ema.weights()["w"], weight)
            continue
        decay = min(0.7, (1 + count - 4) / (10 + count - 4))
        truth = decay * truth + (1 - decay) * weight.detach()
        torch.testing.assert_close(ema.weights()["w"], truth)


def test_an_ema_of_every_fourth_step_is_that_of_every_step_where_the_weights_stand_still_in_between():
    weight = nn.Parameter(torch.zeros(3))
    each, fourth = Ema({"w": weight}, 0.7, start=2), Ema({"w": weight}, 0.7, start=2, every=4)
    for count in range(1, 31):
        with torch.no_grad():  # new weights right after an update
            weight += count * (count < 3 or (count - 2) % 4 == 1)
        each.update(count)
        fourth.update(count)
        if count < 2:
            assert torch.equal(fourth.weights()["w"], weight)
        elif (count - 2) % 4 == 0:
            torch.testing.assert_close(fourth.weights()["w"], each.weights()["w"])
            now = fourth.weights()["w"].clone()
        else:
            assert torch.equal(fourth.weights()["w"], now)


def test_an_ema_in_main_memory_is_the_same_whenever_it_is_looked_at():
    """The landing is what an EMA of a GPU's parameters goes through; here it lands from main memory itself."""
    weight = nn.Parameter(torch.zeros(5, 2))
    direct, landed = Ema({"w": weight}, 0.9), Ema({"w": weight}, 0.9)
    landed.landing = Landing({"w": weight})
    for count in range(1, 12):
        with torch.no_grad():
            weight += torch.sin(torch.arange(10.0) * count).view(5, 2)
        for ema in (direct, landed):
            ema.update(count)
        if count % 3 == 0:
            with landed.applied():
                assert torch.equal(weight, direct.shadow["w"])
    assert torch.equal(landed.weights()["w"], direct.weights()["w"])
    assert landed.update(12) is None and not torch.equal(landed.shadow["w"], weight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_every_parameter_is_in_one_group_of_one_optimizer(optimizer):
    module = nn.ModuleDict(
        {"linear": nn.Linear(4, 4), "conv": nn.Conv2d(2, 2, 3), "norm": nn.LayerNorm(4), "odd": Odd()}
    )
    groups = make_optimizer(module, replace(LOOP, optimizer=optimizer)).param_groups
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in module.parameters())
    assert all(group["params"] for group in groups)


def test_the_update_of_a_channels_last_convolution_is_that_of_its_contiguous_copy_to_the_bit():
    def trained(layout):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)).to(memory_format=layout)
        optimizer = FusedAdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
            optimizer.step()
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [*net.parameters(), *moments]

    plain, last = trained(torch.contiguous_format), trained(torch.channels_last)
    assert last[0].shape == plain[0].shape and last[0].stride() != plain[0].stride()
    assert all(torch.equal(one, other) for one, other in zip(plain, last, strict=True))
