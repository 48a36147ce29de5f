"""Inputs that begin at zero, and the plain U-Net that has them, against a second implementation."""

import math
from dataclasses import fields, replace

import pytest
import torch
from truth import plain_unet

from raphael.base.checkpoint.folder import CheckpointError, load_weights
from raphael.base.config.preset import PRESETS, RaphaelUNetConfig, load_preset
from raphael.base.config.unet import PlainUNetConfig, UNetConfig
from raphael.base.strict import load, to_dict
from raphael.net.condition import Condition
from raphael.net.inputs import told_vector, widened
from raphael.net.moe.unet import RaphaelUNet
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet

SHAPE = {"channels": (16, 32), "res_blocks": 1, "attention_levels": (1,), "head_dim": 8, "norm_groups": 8}
TEXT = {"context_dim": 24, "context_length": 6}
INPUTS = {"vector_dim": 3, "picture_channels": 2, "level_embedding": True}
KINDS = {
    "unconditional": PlainUNetConfig(latent_channels=3, **SHAPE),
    "labels": PlainUNetConfig(latent_channels=3, vector_dim=3, **SHAPE),
    "learned variance": PlainUNetConfig(latent_channels=3, out_channels=6, **SHAPE),
    "everything": PlainUNetConfig(expansion=2.0, activation="geglu", num_heads=2, **INPUTS, **TEXT, **SHAPE),
    "text": PlainUNetConfig(expansion=1.5, **TEXT, **SHAPE),
    "patches": PlainUNetConfig(patch_px=2, expansion=2.0, **INPUTS, **TEXT, **SHAPE),
    "three levels": PlainUNetConfig(**{**SHAPE, "channels": (16, 16, 32), "attention_levels": (0, 2), "res_blocks": 2}),
}


def filled(net, seed=0):
    """No layer of zeros: it would hide everything behind it. The zero-started inputs too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net.eval()


def make(config, seed=0):
    torch.manual_seed(seed)
    return RaphaelUNet(config) if isinstance(config, RaphaelUNetConfig) else UNet(config, PlainBlock)


def inputs(config, rows=2, side=8, control=False):
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(rows, *shape, generator=generator)

    x = drawn(config.latent_channels, side, side)
    condition = Condition(
        tokens=drawn(config.context_length, config.context_dim) if config.context_dim else None,
        mask=torch.arange(config.context_length) < torch.tensor([[2], [5]]) if config.context_dim else None,
        vector=drawn(config.vector_dim) if config.vector_dim else None,
        picture=drawn(config.picture_channels, side, side) if config.picture_channels else None,
        level=torch.tensor([40.0, 700.0]) if config.level_embedding else None,
    )
    if control:
        shapes = make(config).control_shapes(side, side)
        condition = replace(condition, control=tuple(drawn(*shape) for shape in shapes))
    return x, torch.tensor([3.0, 870.5]), condition


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("control", [False, True])
@torch.no_grad()
def test_the_plain_u_net_is_its_second_implementation(kind, control):
    config = KINDS[kind]
    net = filled(make(config))
    x, t, condition = inputs(config, control=control)
    got = net(x, t, condition).prediction
    assert got.shape == (2, config.predicted_channels, 8, 8) and got.std() > 0.1
    torch.testing.assert_close(got, plain_unet.predict(net.state_dict(), config, x, t, condition), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["text", "everything"])
@torch.no_grad()
def test_a_plain_u_net_remembers_its_texts_and_changes_no_bit(kind):
    net = filled(make(KINDS[kind]))
    x, t, condition = inputs(KINDS[kind])
    plain = [net(x, t + step, condition).prediction for step in range(3)]
    with net.remembering() as memory:
        kept = [net(x, t + step, condition).prediction for step in range(3)]
    assert memory.computed == 1 and all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    unconditional = filled(make(KINDS["unconditional"]))
    with unconditional.remembering() as memory:
        unconditional(*inputs(KINDS["unconditional"]))
    assert memory.computed == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_of_a_plain_u_net_learns_also_when_blocks_are_recomputed(recompute):
    net = filled(make(KINDS["everything"])).train()
    for block in net.transformer_blocks():
        block.recompute = recompute
    net(*inputs(KINDS["everything"])).prediction.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("preset", [load_preset("tiny-debug").unet, KINDS["text"], KINDS["unconditional"]])
@pytest.mark.parametrize("gained", [{name: value} for name, value in INPUTS.items()] + [INPUTS], ids=str)
@torch.no_grad()
def test_a_trained_network_gains_an_input_without_changing_a_bit(preset, gained):
    """Whatever the input shows: it begins at zero."""
    old = filled(make(preset))
    wide = replace(preset, **gained)
    net = make(wide, seed=9).eval()
    load_weights(net, widened(net, old.state_dict()), "the old one")
    x, t, condition = inputs(wide)
    told = replace(condition, vector=None, picture=None, level=None)
    before = old(x, t, told if told.num_rows else Condition()).prediction
    assert before.std() > 0.1 and torch.equal(net(x, t, condition).prediction, before)
    with torch.autocast("cpu", torch.bfloat16):
        before = old(x, t, told if told.num_rows else Condition()).prediction
        assert torch.equal(net(x, t, condition).prediction, before)


@pytest.mark.parametrize("name", list(INPUTS))
def test_an_input_that_begins_at_zero_learns_from_the_first_step(name):
    config = replace(KINDS["unconditional"], **{name: INPUTS[name]})
    net = filled(make(replace(config, **{name: type(INPUTS[name])(0)})))
    wide = make(config)
    load_weights(wide, widened(wide, net.state_dict()), "the old one")
    x, t, condition = inputs(config)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    before = wide(x, t, condition).prediction
    before.square().mean().backward()
    new = {
        key: p for key, p in wide.named_parameters() if key.startswith(("picture_in", "vector_in", "level_in.net.2"))
    }
    assert new and all(p.grad.any() for p in new.values())
    optimizer.step()
    other = replace(condition, **{f: -getattr(condition, f) for f in ("vector", "picture", "level") if f in name})
    assert not torch.equal(wide(x, t, condition).prediction, wide(x, t, other).prediction)


@torch.no_grad()
def test_residuals_of_zero_change_no_bit_and_others_are_added_to_the_skips_and_behind_the_middle():
    net = filled(make(load_preset("tiny-debug").unet))
    x, t, condition = inputs(net.config, control=True)
    plain = net(x, t, replace(condition, control=None)).prediction
    zeros = replace(condition, control=tuple(torch.zeros_like(residual) for residual in condition.control))
    assert torch.equal(net(x, t, zeros).prediction, plain)
    for number in range(len(condition.control)):
        one = tuple(r if i == number else torch.zeros_like(r) for i, r in enumerate(condition.control))
        assert not torch.allclose(net(x, t, replace(condition, control=one)).prediction, plain, atol=1e-3), number


@torch.no_grad()
def test_no_vector_is_the_vector_zero_and_an_untold_level_adds_nothing():
    config = KINDS["labels"]
    net = filled(make(config))
    x, t, condition = inputs(config)
    zero = replace(condition, vector=torch.zeros_like(condition.vector))
    assert torch.equal(net(x, t, Condition()).prediction, net(x, t, zero).prediction)
    assert not torch.allclose(net(x, t, condition).prediction, net(x, t, zero).prediction, atol=1e-3)


def test_wider_inputs_get_columns_of_zeros_and_what_does_not_fit_is_still_refused():
    small, large = replace(KINDS["labels"], picture_channels=1), replace(KINDS["labels"], picture_channels=3)
    old, net = filled(make(small)), make(large, seed=4)
    tensors = widened(net, old.state_dict())
    kernel = tensors["picture_in.weight"]
    assert torch.equal(kernel[:, :1], old.picture_in.weight) and not kernel[:, 1:].any()
    load_weights(net, tensors, "the old one")
    with pytest.raises(CheckpointError, match="picture_in.weight: got shape"):
        load_weights(make(small), widened(make(small), net.state_dict()), "a wider one")
    with pytest.raises(CheckpointError, match="unknown picture_in.weight"):
        load_weights(make(KINDS["labels"]), widened(make(KINDS["labels"]), net.state_dict()), "one with a picture")


def test_the_same_seed_gives_the_rest_of_a_network_the_same_weights_with_and_without_inputs():
    for config in (load_preset("tiny-debug").unet, KINDS["text"]):
        plain, wide = make(config).state_dict(), make(replace(config, **INPUTS)).state_dict()
        assert all(torch.equal(tensor, wide[name]) for name, tensor in plain.items()) and len(wide) > len(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": torch.zeros(2, 4)}, r"vector: got shape \(2, 4\), expected \(B, 3\)"),
        ({"picture": None}, r"picture: got none, expected \(B, 2, 8, 8\).*picture_channels 2"),
        ({"picture": torch.zeros(2, 2, 4, 8)}, r"picture: got shape \(2, 2, 4, 8\), expected \(B, 2, 8, 8\)"),
        ({"tokens": None, "mask": None}, "tokens: got none, expected .B, 6, 24."),
        ({"control": (torch.zeros(2, 16, 8, 8),)}, "control: got 1 residuals, expected 5"),
    ],
)
def test_a_condition_of_another_shape_than_the_network_reads_is_refused(change, message):
    net = make(KINDS["everything"])
    x, t, condition = inputs(net.config)
    with pytest.raises(ValueError, match=message):
        net(x, t, replace(condition, **change))


def test_what_a_network_does_not_read_is_refused_and_not_forgotten():
    net, x, t = make(KINDS["unconditional"]), torch.zeros(2, 3, 8, 8), torch.zeros(2)
    told = {"vector": torch.zeros(2, 3), "tokens": torch.zeros(2, 6, 24), "level": torch.zeros(2)}
    for name, setting in (("vector", "vector_dim"), ("tokens", "context_dim"), ("level", "level_embedding")):
        with pytest.raises(ValueError, match=f"{name}: got shape .*, expected none: the network has no {setting}"):
            net(x, t, Condition(**{name: told[name]}))
    with pytest.raises(ValueError, match=r"control\[0\]: got shape \(2, 1, 8, 8\), expected \(2, 16, 8, 8\)"):
        shapes = [(1, 8, 8), *net.control_shapes(8, 8)[1:]]
        net(x, t, Condition(control=tuple(torch.zeros(2, *shape) for shape in shapes)))


def test_a_field_that_came_later_is_named_only_where_it_says_something():
    config = load_preset("tiny").unet
    assert not {"vector_dim", "picture_channels", "level_embedding", "out_channels"} & set(to_dict(config))
    wide = replace(config, **INPUTS)
    told = to_dict(wide)
    assert {name: told[name] for name in INPUTS} == INPUTS and load(RaphaelUNetConfig, told, "meta.json") == wide


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != "none"))
def test_a_preset_is_raphaels_config_and_loads_from_what_it_names(name):
    config = load_preset(name).unet
    assert type(config) is RaphaelUNetConfig and load(RaphaelUNetConfig, to_dict(config), name) == config


def test_a_plain_config_has_no_field_of_raphael():
    own = {field.name for field in fields(RaphaelUNetConfig)} - {field.name for field in fields(UNetConfig)}
    assert own & {field.name for field in fields(PlainUNetConfig)} == {"expansion"}  # each its own feed-forward's
    assert {"num_space_experts", "edge_tokens", "mean_over", "gate_noise"} <= own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_dim": 8}, "context_dim: got 8 with context_length 0, expected both"),
        ({"pooled_text": True}, "context_dim: got 0 with pooled_text or text_layers"),
        ({"attention_levels": (2,)}, "attention_levels: got 2"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PlainUNetConfig(**{**SHAPE, **change})


TOLD = {"vector_dim": 6, "size_px": 4}
SIZES = torch.tensor([[320.0, 400, 5, 0, 32, 32], [99, 264, 0, 5, 32, 32]])


@pytest.mark.parametrize("preset", [load_preset("tiny-debug").unet, KINDS["unconditional"]], ids=["raphael", "plain"])
@torch.no_grad()
def test_a_trained_network_gains_sizes_without_changing_a_bit_and_is_told_x_s_own_where_nobody_tells_it(preset):
    old = filled(make(preset))
    config = replace(preset, **TOLD)
    net = make(config, seed=9).eval()
    load_weights(net, widened(net, old.state_dict()), "the old one")
    x, t, condition = inputs(config)
    condition = replace(condition, vector=None)
    before = old(x, t, condition).prediction
    for told in (None, SIZES):
        assert torch.equal(net(x, t, replace(condition, vector=told)).prediction, before)
    filled(net)
    own = torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(2, 6)  # 8 x 8, of 4 px a side
    got = net(x, t, condition).prediction
    assert torch.equal(net(x, t, replace(condition, vector=own)).prediction, got)
    assert not torch.allclose(net(x, t, replace(condition, vector=SIZES)).prediction, got, atol=1e-3)


@torch.no_grad()
def test_sizes_are_read_as_sinusoids_of_each_number():
    """Against a loop in float64; also of weights in bfloat16, to which 1001 px would be 1000."""
    net = filled(make(replace(KINDS["unconditional"], **TOLD)))
    layer, width = net.vector_in, net.vector_in.WIDTH
    large = SIZES + 1001
    waves = torch.zeros(2, 6 * width, dtype=torch.float64)
    for row in range(2):
        for place in range(6):
            for k in range(width // 2):
                angle = float(large[row, place]) * 10_000.0 ** (-k / (width // 2))
                waves[row, place * width + k] = math.cos(angle)
                waves[row, place * width + width // 2 + k] = math.sin(angle)
    torch.testing.assert_close(layer(large).double(), waves @ layer.weight.double().T, rtol=1e-3, atol=1e-3)
    condition = Condition(vector=large)
    half = layer.to(torch.bfloat16)
    told = told_vector(net.config, torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), condition, half)
    assert torch.equal(told, large)


def test_a_network_that_is_told_sizes_reads_six_numbers():
    with pytest.raises(ValueError, match="vector_dim: got 3 with size_px 4, expected 6"):
        replace(KINDS["labels"], size_px=4)
