"""The Efficient U-Net's rules, recorded, and what it is told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from raphael.base.config.efficient import EfficientUNetConfig
from raphael.net.condition import AttentionHooks, Condition
from raphael.net.efficient.blocks import DownBlock, PixelShuffle, ResNetBlock, UpBlock, joined
from raphael.net.efficient.unet import EfficientUNet
from raphael.net.plain import PlainBlock

SHAPE = {
    "latent_channels": 3, "stem_channels": 8, "channels": (8, 16, 24), "res_blocks": (1, 2, 3), "strides": (2, 2, 1),
    "attention_levels": (2,), "head_dim": 8, "norm_groups": 4, "context_dim": 16, "context_length": 5,
    "text_pool": True, "picture_channels": 3, "level_embedding": True,
}  # fmt: skip


def network(seed: int = 0, **changes: object) -> EfficientUNet:
    """Every weight random, so that nothing is silent because it begins at zero."""
    torch.manual_seed(seed)
    net = EfficientUNet(EfficientUNetConfig(**{**SHAPE, **changes}), PlainBlock).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net


def told(count: int = 2, seed: int = 1, side: int = 16) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    tokens, picture = (
        torch.randn(count, 5, 16, generator=generator),
        torch.randn(count, 3, side, side, generator=generator),
    )
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])[:count]
    return Condition(tokens, mask, picture=picture, level=torch.tensor([100.0, 700.0])[:count])


def noisy(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def recorded(net: EfficientUNet, side: int = 16) -> dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """block -> (convolution, side of its input, side of its output), in the order in which they ran."""
    seen: dict[str, list] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and (name.startswith(("down.", "up."))) and "attention" not in name:
            block, place = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
            module.register_forward_hook(
                lambda _, given, out, block=block, place=place: seen.setdefault(block, []).append(
                    (place, given[0].shape[-1], out.shape[-1])
                )
            )
    net(noisy(side=side), torch.tensor([10.0, 900.0]), told(side=side))
    return seen


def test_a_level_shrinks_before_its_convolutions_and_grows_after_them() -> None:
    """arXiv 2205.11487, appendix B.1, rules recorded: of a way down of 16 px by the strides 2, 2, 1."""
    seen = recorded(network())
    inside, enlarged = [8, 4, 4], [16, 8, 4]  # side of the map inside a level, and of what its UpBlock returns
    for level, side in enumerate(inside):
        first, *rest = seen[f"down.{level}"]
        assert first == ("down", enlarged[level], side), "the strided convolution comes first"
        assert rest and all(given == out == side for _, given, out in rest), "and all others see the small map"
        *blocks, last = seen[f"up.{2 - level}"]
        assert blocks and all(given == out == side for _, given, out in blocks)
        assert last[0].startswith("up") and last[1] == side, "the enlarging convolution comes last, on the small map"


def test_an_up_block_returns_the_map_of_the_level_above() -> None:
    net, sides = network(), []
    for module in net.up:
        module.register_forward_hook(lambda _, given, out: sides.append((given[0].shape[-1], out[0].shape[-1])))
    net(noisy(), torch.tensor([10.0, 900.0]), told())
    assert sides == [(4, 4), (4, 8), (8, 16)]


def test_the_depth_lies_where_the_settings_say_and_attention_ends_its_level() -> None:
    net = network()
    assert [len(module.level.blocks) for module in net.down] == [1, 2, 3]
    assert [len(module.level.blocks) for module in net.up] == [3, 2, 1]
    assert [module.level.attention is not None for module in [*net.down, *net.up]] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert net.num_blocks == net.config.num_blocks == 2 and net.config.multiple == 4
    assert [block.index for block in net.transformer_blocks()] == [0, 1]


def test_a_joined_skip_keeps_the_variance_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    h, skip = torch.randn(2, 4, 8, 64, 64, generator=generator, dtype=torch.float64)
    assert joined(h, skip).var() == pytest.approx(1.0, rel=0.01)
    assert (h + skip).var() == pytest.approx(2.0, rel=0.01), "without the factor it doubles at every level"
    assert (
        torch.equal(joined(h, skip), (h + skip) / torch.tensor(2.0, dtype=torch.float64).sqrt().item())
        or (joined(h, skip) - (h + skip) / 2**0.5).abs().max() < 1e-15
    )


def test_every_skip_of_the_network_is_joined_so() -> None:
    """What each level of the way up computes on is (h + skip) / sqrt 2 of what was recorded on the way down."""
    net, skips, joins, given = network(), [], [], []
    net.conv_in.register_forward_hook(lambda _, __, out: skips.append(out))
    for module in net.down:
        module.register_forward_hook(lambda _, __, out: skips.append(out[0]))
    for module in net.up:
        module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        module.level.register_forward_pre_hook(lambda _, args: joins.append(args[0]))
    net.norm_out.register_forward_pre_hook(lambda _, args: joins.append(args[0]))
    net.up[-1].register_forward_hook(lambda _, __, out: given.append(out[0]))
    condition = told()
    net(noisy(), torch.tensor([10.0, 900.0]), condition)
    skips[0] = skips[0] + net.picture_in(condition.picture)
    assert torch.equal(joins[0], skips[3]), "the smallest map is not added to itself"
    for at, skip in ((1, skips[2 - 0]), (2, skips[1]), (3, skips[0])):
        torch.testing.assert_close(joins[at], (given[at] + skip) / 2**0.5, rtol=1e-6, atol=1e-6)


def test_a_resnet_block_is_the_formula_and_begins_as_the_identity() -> None:
    torch.manual_seed(0)
    block, x = ResNetBlock(8, 8, 4), torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(block(x), x)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        grouped = h.view(2, 4, 2, 5, 5)
        mean, var = grouped.mean((2, 3, 4), keepdim=True), grouped.var((2, 3, 4), keepdim=True, unbiased=False)
        h = ((grouped - mean) / (var + norm.eps).sqrt()).view_as(h)
        h = h * norm.weight[:, None, None] + norm.bias[:, None, None]
        h = torch.nn.functional.conv2d(h * torch.sigmoid(h), conv.weight, conv.bias, padding=1)
    skip = torch.einsum("oc,bchw->bohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(x), skip + h, rtol=1e-4, atol=1e-5)


def test_enlarging_begins_as_the_nearest_neighbour_of_a_convolution() -> None:
    torch.manual_seed(0)
    up, x = PixelShuffle(6, 4), torch.randn(2, 6, 5, 5)
    small = torch.nn.functional.conv2d(x, up.conv.weight[::4], up.conv.bias[::4])
    assert torch.equal(up(x), small.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize("what", ["tokens", "picture", "level"])
def test_it_reads_what_it_is_told_row_by_row(what: str) -> None:
    net, x, t, condition = network(), noisy(), torch.tensor([10.0, 900.0]), told()
    before = net(x, t, condition).prediction
    value = getattr(condition, what).clone()
    value[0] = value[0] + 1.0 if what != "level" else 900.0
    after = net(x, t, dataclasses.replace(condition, **{what: value})).prediction
    assert (after[0] - before[0]).abs().max() > 1e-4
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-6)


def test_padding_is_not_read_and_a_caption_without_a_token_is_none() -> None:
    net, x, t, condition = network(), noisy(), torch.tensor([10.0, 900.0]), told()
    other = condition.tokens.clone()
    other[0, 3:] = float("nan")
    seen = [net(x, t, dataclasses.replace(condition, tokens=tokens)).prediction for tokens in (condition.tokens, other)]
    assert torch.equal(*seen)
    nothing = dataclasses.replace(condition, mask=torch.zeros(2, 5, dtype=torch.bool))
    silent = [
        net(x, t, dataclasses.replace(nothing, tokens=tokens)).prediction
        for tokens in (condition.tokens, torch.zeros_like(condition.tokens))
    ]
    assert torch.equal(*silent) and silent[0].isfinite().all()


def test_hooks_see_its_attention_and_an_edit_that_changes_nothing_changes_nothing() -> None:
    net, x, t, condition, seen = network(), noisy(), torch.tensor([10.0, 900.0]), told(), []

    def edit(call, probabilities):
        seen.append((call.site.kind, call.site.block, tuple(probabilities.shape[-2:])))
        return probabilities

    plain = net(x, t, condition).prediction
    edited = net(x, t, condition.with_hooks(AttentionHooks(edit=edit))).prediction
    torch.testing.assert_close(edited, plain)
    assert seen == [("self", 0, (16, 16)), ("cross", 0, (16, 5)), ("self", 1, (16, 16)), ("cross", 1, (16, 5))]
    maps = [block.attention for block in net(x, t, condition, collect=True).blocks]
    assert [tuple(one.shape) for one in maps] == [(2, 16, 5)] * 2


def test_without_self_attention_its_blocks_read_the_text_alone() -> None:
    net = network(self_attention=False)
    names = {name for name, _ in net.named_parameters()}
    assert any("cross_attention" in name for name in names) and not any("self" in name for name in names)
    assert net(noisy(), torch.tensor([1.0, 2.0]), told()).prediction.shape == (2, 3, 16, 16)


def test_an_untrained_network_predicts_zero_and_trains_every_parameter() -> None:
    torch.manual_seed(0)
    net = EfficientUNet(EfficientUNetConfig(**SHAPE), PlainBlock)
    x, t, condition = noisy(), torch.tensor([10.0, 900.0]), told()
    assert not net(x, t, condition).prediction.any()
    other = network().train()
    other(x, t, condition).prediction.square().mean().backward()
    assert not [name for name, parameter in other.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (2, 2)}, r"strides: got \[2, 2\], expected one number for each of the 3 levels"),
        ({"strides": (2, 3, 1)}, r"strides: got \[2, 3, 1\], expected 1 or 2"),
        ({"res_blocks": (1, 0, 1)}, r"res_blocks: got \[1, 0, 1\], expected at least 1"),
        ({"stem_channels": 6}, "stem_channels: got 6, expected a multiple of norm_groups 4"),
        ({"patch_px": 2}, "patch_px: got 2, expected 1"),
        ({"context_dim": 12}, "context_dim: got 12 with text_pool, expected a multiple of head_dim 8"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientUNetConfig(**{**SHAPE, **changes})


def test_what_it_cannot_read_is_named() -> None:
    net, t = network(), torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="multiples of 4"):
        net(noisy(side=18), t, told(side=18))
    with pytest.raises(ValueError, match="picture: got none, expected"):
        net(noisy(), t, dataclasses.replace(told(), picture=None))
    assert isinstance(net.down[0], DownBlock) and isinstance(net.up[0], UpBlock)
