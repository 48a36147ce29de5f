"""A second implementation of the plain U-Net: functions over a state dict, one map at a time, attention by loops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.base.config.unet import PlainUNetConfig
from raphael.net.condition import Condition

State = dict[str, Tensor]


def predict(state: State, config: PlainUNetConfig, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """What `UNet(config, PlainBlock)` of these weights predicts, sample by sample."""
    rows = [condition.rows([i]) for i in range(len(x))] if condition.num_rows else [condition] * len(x)
    return torch.cat([_one(state, config, x[i : i + 1], float(t[i]), rows[i]) for i in range(len(x))])


def _one(state: State, config: PlainUNetConfig, x: Tensor, t: float, condition: Condition) -> Tensor:
    levels, attends = len(config.channels), set(config.attention_levels)
    time = _two_layers(state, "time_embedding", _sinusoids(t, config.channels[0]))
    if condition.vector is not None:
        time = time + condition.vector[0] @ state["vector_in.weight"].T
    if condition.level is not None:
        time = time + _two_layers(state, "level_in", _sinusoids(float(condition.level), config.channels[0]))
    kernel = state["conv_in.weight"]
    x = _joined_pixels(x, config.patch_px)
    if condition.picture is not None:  # one convolution over the joined channels
        kernel = torch.cat([kernel, state["picture_in.weight"]], 1)
        x = torch.cat([x, _joined_pixels(condition.picture, config.patch_px)], 1)
    h = F.conv2d(x, kernel, state["conv_in.bias"], padding=1)
    control = list(condition.control or ())

    def unit(h: Tensor, name: str, level: int) -> Tensor:
        h = _res(state, config, f"{name}.0", h, time)
        return _block(state, config, f"{name}.1", h, condition) if level in attends else h

    skips, number = [h], 0
    for level in range(levels):
        for _ in range(config.res_blocks):
            h = unit(h, f"down.{number}", level)
            number += 1
            skips.append(h)
        if level < levels - 1:
            h = _conv(state, f"down.{number}.conv", h, stride=2)
            number += 1
            skips.append(h)
    h = _res(state, config, "middle_in", h, time)
    h = _block(state, config, "middle", h, condition)
    h = _res(state, config, "middle_out", h, time)
    if control:
        h, skips = h + control[-1], [skip + residual for skip, residual in zip(skips, control, strict=False)]
    number = 0
    for level in reversed(range(levels)):
        for _ in range(config.res_blocks + 1):
            h = unit(torch.cat([h, skips.pop()], 1), f"up.{number}", level)
            number += 1
        if level:
            h = _conv(state, f"up.{number}.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            number += 1
    out, p = _conv(state, "conv_out", F.silu(_group(state, config, "norm_out", h))), config.patch_px
    whole = out.new_zeros(1, out.shape[1] // p**2, p * out.shape[2], p * out.shape[3])
    for channel in range(whole.shape[1]):
        for place in range(p**2):
            whole[0, channel, place // p :: p, place % p :: p] = out[0, channel * p**2 + place]
    return whole


def _joined_pixels(x: Tensor, p: int) -> Tensor:
    """(1, C, h, w) -> (1, C p^2, h / p, w / p): channel by channel, the pixels of a patch row by row."""
    found = [x[:, c : c + 1, row::p, column::p] for c in range(x.shape[1]) for row in range(p) for column in range(p)]
    return torch.cat(found, 1)


def _block(state: State, config: PlainUNetConfig, name: str, x: Tensor, condition: Condition) -> Tensor:
    _, width, rows, columns = x.shape
    heads = config.num_heads or width // config.head_dim
    h = _group(state, config, f"{name}.norm_in", x)[0].flatten(1).T  # (P, D)
    q, k, v = (_layer(state, f"{name}.norm_self", h) @ state[f"{name}.self_attention.qkv.weight"].T).chunk(3, -1)
    h = h + _linear(state, f"{name}.self_attention.out", _attention(q, k, v, heads))
    if config.context_dim:
        tokens = condition.tokens[0] if condition.mask is None else condition.tokens[0][condition.mask[0]]
        q = _layer(state, f"{name}.norm_cross", h) @ state[f"{name}.cross_attention.q.weight"].T
        k, v = (tokens @ state[f"{name}.cross_attention.kv.weight"].T).chunk(2, -1)
        h = h + _linear(state, f"{name}.cross_attention.out", _attention(q, k, v, heads))
    if config.expansion:
        wide = _linear(state, f"{name}.feed_forward.wide", _layer(state, f"{name}.norm_forward", h))
        if config.activation == "geglu":
            value, gate = wide.chunk(2, -1)
            wide = value * F.gelu(gate)
        else:
            wide = F.gelu(wide)
        h = h + _linear(state, f"{name}.feed_forward.narrow", wide)
    return x + _conv(state, f"{name}.out", h.T.reshape(1, width, rows, columns), padding=0)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    found = []
    for one_q, one_k, one_v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = torch.stack([one_k @ query for query in one_q]) / math.sqrt(one_q.shape[-1])
        found.append(torch.softmax(scores, -1) @ one_v)
    return torch.cat(found, -1)


def _res(state: State, config: PlainUNetConfig, name: str, x: Tensor, time: Tensor) -> Tensor:
    h = _conv(state, f"{name}.conv1", F.silu(_group(state, config, f"{name}.norm1", x)))
    h = h + _linear(state, f"{name}.time", F.silu(time)).view(1, -1, 1, 1)
    h = _conv(state, f"{name}.conv2", F.silu(_group(state, config, f"{name}.norm2", h)))
    return h + (_conv(state, f"{name}.skip", x, padding=0) if f"{name}.skip.weight" in state else x)


def _sinusoids(t: float, dim: int) -> Tensor:
    angles = [t / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def _two_layers(state: State, name: str, h: Tensor) -> Tensor:
    return _linear(state, f"{name}.net.2", F.silu(_linear(state, f"{name}.net.0", h)))


def _linear(state: State, name: str, h: Tensor) -> Tensor:
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _conv(state: State, name: str, h: Tensor, padding: int = 1, stride: int = 1) -> Tensor:
    return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)


def _layer(state: State, name: str, h: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def _group(state: State, config: PlainUNetConfig, name: str, h: Tensor) -> Tensor:
    groups = h.reshape(config.norm_groups, -1)
    centred = groups - groups.mean(1, keepdim=True)
    normal = (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).view_as(h)
    return normal * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)
