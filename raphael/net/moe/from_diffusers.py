"""Weights of diffusers' UNet2DConditionModel (Stable Diffusion 1 and 2) in our U-Net.

The two have one skeleton; with `proj_in`, `num_heads` and a geglu feed-forward also one block, up to the two mixtures:

    theirs   h += self-attention; h += cross-attention; h += FF(norm h)
    ours     h += self-attention; h += cross-attention; h += Time-MoE(norm h); h += Space-MoE(norm h)

The feed-forward goes to the first of our two places that the preset fills, to every expert alike (sparse upcycling,
arXiv 2212.05055); the second place gets its first matrix and a second matrix of zeros, so that it adds nothing yet. A
top-1 gate weighs its expert by 1, so with the Time-MoE first the network computes what theirs does, whatever the gates
say, and its experts part where their timesteps' and words' gradients do. Three things make it another function, and
`Transfer.exact` says so: gelu layers (only the value half of a geglu finds a place; its gate is lost), a Space-MoE in
the first place (it adds e(0) outside its regions), and a block without residuals, norms or `proj_in`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raphael.base.config.preset import RaphaelUNetConfig
from raphael.net.moe.unet import RaphaelUNet

FF_EXPANSION = 4.0  # of BasicTransformerBlock's feed-forward
# What UNet2DConditionModel can be besides Stable Diffusion's: absent from a config means diffusers' default, which fits
FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}


@dataclass
class Transfer:
    """Where every parameter came from. Names are ours, but for `left_over`."""

    matched: list[str] = field(default_factory=list)  # theirs, to the bit
    initialised: dict[str, str] = field(default_factory=dict)  # made from theirs; how
    own: list[str] = field(default_factory=list)  # no counterpart: as our U-Net begins
    left_over: list[str] = field(default_factory=list)  # theirs, of no use here
    lost: list[str] = field(default_factory=list)  # why the network is another function; empty: it is the same

    @property
    def exact(self) -> bool:
        """Whether our network computes what theirs does, up to rounding."""
        return not self.lost

    def text(self) -> str:
        counts = {"matched": self.matched, "initialised": self.initialised, "own": self.own}
        lines = [", ".join(f"{len(names)} {what}" for what, names in counts.items()) + " tensors of ours"]
        lines += [f"left over: {name}" for name in self.left_over]
        lines += [f"lost: {why}" for why in self.lost] or ["generates what the U-Net it came from generates"]
        return "\n".join(lines)


def config_from(theirs: dict[str, Any], like: RaphaelUNetConfig) -> RaphaelUNetConfig:
    """Our shape for a UNet2DConditionModel's config.json; mixtures, gates and edge heads as in `like`.

    Raises ValueError for a U-Net of another kind (Stable Diffusion XL, super-resolution, inpainting).
    """
    for key, expected in FIXED.items():
        got = theirs.get(key, expected)
        if got != expected and not (isinstance(got, list) and set(got) == {expected}):
            raise ValueError(f"unet config.json: {key}: got {got!r}, expected {expected!r}, as in Stable Diffusion 1")
    channels = tuple(theirs["block_out_channels"])
    down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])
    levels = tuple(level for level, kind in enumerate(down) if kind == "CrossAttnDownBlock2D")
    mirrored = ["CrossAttnUpBlock2D" if level in levels else "UpBlock2D" for level in reversed(range(len(down)))]
    if {*down} - {"CrossAttnDownBlock2D", "DownBlock2D"} or up != mirrored:
        raise ValueError(
            f"unet config.json: got blocks {down} and {up}, expected (CrossAttn)DownBlock2D and their mirror"
        )
    if theirs["in_channels"] != theirs["out_channels"]:
        got = f"in_channels {theirs['in_channels']}, out_channels {theirs['out_channels']}"
        raise ValueError(f"unet config.json: got {got}, expected equal numbers: it reads the latent alone")
    return replace(
        like,
        latent_channels=theirs["in_channels"],
        channels=channels,
        res_blocks=theirs["layers_per_block"],
        attention_levels=levels,
        norm_groups=theirs["norm_num_groups"],
        context_dim=theirs["cross_attention_dim"],
        **_heads(theirs, channels),
        proj_in=True,
        expansion=FF_EXPANSION,
        dense_expansion=FF_EXPANSION,
        dense_activation="geglu",
        expert_activation="geglu",
        mean_over="all_tokens",
        moe_residual=True,
        moe_norm=True,
        pooled_text=False,
    )


def _heads(theirs: dict[str, Any], channels: tuple[int, ...]) -> dict[str, int]:
    """attention_head_dim is the number of heads: of all levels (8 in 1.5) or of each (5, 10, 20, 20 in 2)."""
    heads = theirs.get("num_attention_heads") or theirs["attention_head_dim"]
    if isinstance(heads, int) or len(set(heads)) == 1:
        return {"num_heads": heads if isinstance(heads, int) else heads[0], "head_dim": 1}
    widths = {width / number for width, number in zip(channels, heads, strict=True)}
    if len(widths) > 1:
        raise ValueError(
            f"unet config.json: attention_head_dim: got {heads} heads for widths {list(channels)}, expected one number "
            "of heads, or heads of one width"
        )
    return {"num_heads": 0, "head_dim": int(widths.pop())}


@torch.no_grad()
def load_diffusers(unet: RaphaelUNet, theirs: dict[str, Tensor]) -> Transfer:
    """Fill `unet` from a UNet2DConditionModel's state dict and say what went where.

    Raises ValueError where a tensor is missing or of another shape: `config_from` gives the shape that fits.
    """
    transfer, own, unused = Transfer(), unet.state_dict(), dict(theirs)

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise ValueError(f"got no {name}, expected the weights of a UNet2DConditionModel of this shape")
        unused.pop(name, None)
        return theirs[name]

    def put(name: str, value: Tensor, how: str = "") -> None:
        value = value.reshape(own[name].shape) if value.numel() == own[name].numel() else value
        if value.shape != own[name].shape:
            raise ValueError(
                f"{name}: got shape {list(value.shape)}, expected {list(own[name].shape)}; does the preset fit?"
            )
        own[name].copy_(value)
        if how:
            transfer.initialised[name] = how
        else:
            transfer.matched.append(name)

    for mine, other in straight_names(unet.config):
        for kind in ("weight", "bias"):
            if f"{mine}.{kind}" in own:
                put(f"{mine}.{kind}", take(f"{other}.{kind}"))
    for mine, other in block_names(unet.config):
        _block(unet.config, mine, f"{other}.transformer_blocks.0", take, put)
    known = {*transfer.matched, *transfer.initialised}
    transfer.own = [name for name in own if name not in known]
    transfer.left_over = sorted(unused)
    transfer.lost = _lost(unet.config)
    return transfer


def _block(config: RaphaelUNetConfig, mine: str, other: str, take: Any, put: Any) -> None:
    """What of a transformer block has another form: attentions side by side, and the feed-forward."""
    for attention, own_name, parts in (
        ("attn1", "self_attention.qkv", ("to_q", "to_k", "to_v")),
        ("attn2", "cross_attention.q", ("to_q",)),
        ("attn2", "cross_attention.kv", ("to_k", "to_v")),
    ):
        put(f"{mine}.{own_name}.weight", torch.cat([take(f"{other}.{attention}.{part}.weight") for part in parts]))
    norm = [take(f"{other}.norm3.{kind}") for kind in ("weight", "bias")]
    layer = [take(f"{other}.ff.net.{name}") for name in ("0.proj.weight", "0.proj.bias", "2.weight", "2.bias")]
    for order, (index, place, kind) in enumerate(places(config)):
        if config.moe_norm:
            for name, value in zip(("weight", "bias"), norm, strict=True):
                put(f"{mine}.norms.{index}.{name}", value, "the feed-forward's norm, copied" if order else "")
        w1, b1, w2, b2 = layer if order == 0 else [*layer[:2], *map(torch.zeros_like, layer[2:])]
        how = "the feed-forward's first half; the second is zero" if order else ""
        gated = (config.dense_activation if kind == "dense" else config.expert_activation) == "geglu"
        if not gated:
            w1, b1 = w1.chunk(2)[0], b1.chunk(2)[0]
            how = how or "the value half of the feed-forward; its gate is lost"
        if kind == "dense":
            named = {"wide.weight": w1, "wide.bias": b1, "narrow.weight": w2, "narrow.bias": b2}
            for name, value in named.items():
                put(f"{mine}.{place}_dense.{name}", value, how)
            continue
        experts = config.num_time_experts if place == "time" else config.num_space_experts
        for name, value in {"w1": w1, "b1": b1, "w2": w2, "b2": b2}.items():
            each = value.expand(experts, *value.shape)
            put(f"{mine}.{place}_moe.experts.{name}", each, how or "the feed-forward, in every expert")


def places(config: RaphaelUNetConfig) -> list[tuple[int, str, str]]:
    """(index of its norm, time or space, moe or dense) of the places that are filled, the first first."""
    layers = ((2, "time", config.time_layer), (3, "space", config.space_layer))
    return [place for place in layers if place[2] != "none"]


def _lost(config: RaphaelUNetConfig) -> list[str]:
    filled, lost = places(config), []
    if not filled:
        lost.append("the feed-forwards: the preset has neither a time nor a space layer")
    elif filled[0][1:] == ("space", "moe"):
        lost.append("the feed-forward acts inside the words' regions only: a Space-MoE is the first layer")
    for _, place, kind in filled[:1]:
        name = "dense_activation" if kind == "dense" else "expert_activation"
        if getattr(config, name) != "geglu":
            lost.append(f"the gates of the feed-forwards: {name} is gelu, the {place} layers have one half")
    for name in ("proj_in", "moe_residual", "moe_norm"):
        if not getattr(config, name):
            lost.append(f"{name}, which is off in this preset")
    if config.pooled_text:
        lost.append("nothing of theirs, but res-blocks read the caption as well: pooled_text is on")
    if config.text_layers:
        lost.append("nothing of theirs, but their tokens pass through new layers first: text_layers is above 0")
    if config.mean_over != "all_tokens":
        lost.append("attention to padding: mean_over is real_tokens")
    return lost


def straight_names(config: RaphaelUNetConfig) -> Iterator[tuple[str, str]]:
    """(our module, their module) of all that is stored alike: convolutions, norms, linear layers."""
    yield "time_embedding.net.0", "time_embedding.linear_1"
    yield "time_embedding.net.2", "time_embedding.linear_2"
    yield from (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
    for mine, other, kind in _modules(config):
        if kind == "sampler":
            yield f"{mine}.conv", f"{other}.conv"
        elif kind == "res":
            for name in ("norm1", "conv1", "norm2", "conv2"):
                yield f"{mine}.{name}", f"{other}.{name}"
            yield from ((f"{mine}.time", f"{other}.time_emb_proj"), (f"{mine}.skip", f"{other}.conv_shortcut"))
        else:
            yield f"{mine}.norm_in", f"{other}.norm"
            if config.proj_in:
                yield f"{mine}.proj_in", f"{other}.proj_in"
            yield f"{mine}.out", f"{other}.proj_out"
            inner = f"{other}.transformer_blocks.0"
            yield from ((f"{mine}.norms.0", f"{inner}.norm1"), (f"{mine}.norms.1", f"{inner}.norm2"))
            yield f"{mine}.self_attention.out", f"{inner}.attn1.to_out.0"
            yield f"{mine}.cross_attention.out", f"{inner}.attn2.to_out.0"


def block_names(config: RaphaelUNetConfig) -> Iterator[tuple[str, str]]:
    """(our transformer block, theirs)"""
    yield from ((mine, other) for mine, other, kind in _modules(config) if kind == "block")


def _modules(config: RaphaelUNetConfig) -> Iterator[tuple[str, str, str]]:
    """(our module, theirs, res, block or sampler) in the order of the forward pass."""
    last = len(config.channels) - 1
    index = 0
    for level in range(last + 1):
        for j in range(config.res_blocks):
            yield from _unit(f"down.{index}", f"down_blocks.{level}", j, level in config.attention_levels)
            index += 1
        if level < last:
            yield f"down.{index}", f"down_blocks.{level}.downsamplers.0", "sampler"
            index += 1
    yield "middle_in", "mid_block.resnets.0", "res"
    yield "middle", "mid_block.attentions.0", "block"
    yield "middle_out", "mid_block.resnets.1", "res"
    index = 0
    for level in reversed(range(last + 1)):
        other = f"up_blocks.{last - level}"
        for j in range(config.res_blocks + 1):
            yield from _unit(f"up.{index}", other, j, level in config.attention_levels)
            index += 1
        if level > 0:
            yield f"up.{index}", f"{other}.upsamplers.0", "sampler"
            index += 1


def _unit(mine: str, other: str, j: int, attention: bool) -> Iterator[tuple[str, str, str]]:
    yield f"{mine}.0", f"{other}.resnets.{j}", "res"
    if attention:
        yield f"{mine}.1", f"{other}.attentions.{j}", "block"
