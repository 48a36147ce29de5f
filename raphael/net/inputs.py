"""Inputs that a U-Net gains: a vector, a picture beside x, a level of augmentation. They begin at zero.

GLIDE's rule for inpainting (arXiv 2112.10741, section 2.2): the new columns are zero, so that a trained network
computes at first what it computed before, whatever the new input shows. A convolution of joined channels is the sum of
two; the picture's is kept apart, because a kernel of more channels may sum in another order: bits stay this way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raphael.base.config.unet import SIZES, UNetConfig
from raphael.net.condition import Condition
from raphael.net.layers import sinusoidal_embedding

NAMES = ("picture_in.", "vector_in.", "level_in.")  # of their parameters, in a U-Net's state


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class LevelEmbedding(nn.Module):
    """Sinusoids of the level, in timesteps, then two linear layers, the last of them zero at the start."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.channels = channels
        self.net = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), zeroed(nn.Linear(dim, dim)))

    def forward(self, level: Tensor) -> Tensor:  # (B,) -> (B, dim)
        return self.net(sinusoidal_embedding(level, self.channels).to(self.net[0].weight.dtype))


class SizesIn(nn.Linear):
    """(B, SIZES) sizes and crop in px, sinusoids of each, one layer without a bias, zero at the start (SDXL, arXiv
    2307.01952, section 2.2; there the layers of the timestep follow, too)."""

    WIDTH = 64  # sinusoids of a number

    def __init__(self, dim: int):
        super().__init__(SIZES * self.WIDTH, dim, bias=False)

    def forward(self, sizes: Tensor) -> Tensor:  # (B, SIZES) -> (B, dim)
        waves = sinusoidal_embedding(sizes.flatten(), self.WIDTH).view(len(sizes), -1)
        return super().forward(waves.to(self.weight.dtype))


def vector_input(config: UNetConfig, dim: int) -> nn.Linear | None:
    """What reads the condition's vector: a layer of `dim` outputs, zero; None where the network is told none."""
    if config.size_px:
        return zeroed(SizesIn(dim))
    return zeroed(nn.Linear(config.vector_dim, dim, bias=False)) if config.vector_dim else None


def told_vector(config: UNetConfig, x: Tensor, condition: Condition, layer: nn.Linear | None) -> Tensor | None:
    """The vector that `layer` reads: the condition's. Where that has none, a network that knows sizes is told that
    the image is as large as x (B, C, h, w) says, was never scaled, and that nothing was cropped: sampling's case."""
    vector = condition.vector
    if not config.size_px:
        return None if vector is None else vector.to(layer.weight.dtype)
    if vector is not None:
        return vector.float()  # bfloat16 knows no 1001 px
    height, width = (side * config.size_px for side in x.shape[2:])
    return x.new_tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(len(x), SIZES)


def known_picture(x0: Tensor, known: Tensor) -> Tensor:
    """An inpainting network's picture (B, 1 + C, h, w): `known` (B, 1, h, w), 0 or 1, and x_0 (B, C, h, w) where 1.

    All 0 where nothing is known: to columns without a bias that is no picture.
    """
    return torch.cat([known.to(x0), x0 * known.to(x0)], dim=1)


def check_inputs(config: UNetConfig, x: Tensor, t: Tensor, condition: Condition) -> None:
    """Raises ValueError where x or t has another shape, or the condition tells what the network does not read, or not
    what it needs, or in another shape. A vector and a level may be missing: that is the vector 0, and nothing told of
    the level; an inpainting network's picture, too: nothing is known. Tokens may be of several contexts, one behind
    another."""
    channels, factor = config.latent_channels, config.multiple
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected (B, {channels}, h, w) with h and w multiples of {factor}"
        )
    if tuple(t.shape) != (len(x),):
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected (B,) = ({len(x)},)")
    may_miss = ("vector", "level", "picture") if config.inpainting else ("vector", "level")
    length = config.context_length
    if condition.tokens is not None and length:
        length *= max(1, condition.tokens.shape[1] // length)
    asked = {
        "tokens": (config.context_dim, (length, config.context_dim), "context_dim"),
        "vector": (config.vector_dim, (config.vector_dim,), "vector_dim"),
        "picture": (config.picture_channels, (config.picture_channels, *x.shape[2:]), "picture_channels"),
        "level": (config.level_embedding, (), "level_embedding"),
    }
    for name, (wanted, shape, setting) in asked.items():
        tensor = getattr(condition, name)
        if tensor is None and (not wanted or name in may_miss):
            continue
        want = f"(B, {', '.join(map(str, shape))}) with B {len(x)}, as x has" if shape else f"(B,) = ({len(x)},)"
        if tensor is None:
            raise ValueError(f"{name}: got none, expected {want}: the network has {setting} {wanted}")
        if not wanted:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected none: the network has no {setting}")
        if tuple(tensor.shape) != (len(x), *shape):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {want}")


def check_control(control: tuple[Tensor, ...], shapes: list[tuple[int, int, int]], batch_size: int) -> None:
    """Raises ValueError unless there is one residual for each of `shapes` (C, h, w)."""
    got, want = [tuple(residual.shape) for residual in control], [(batch_size, *shape) for shape in shapes]
    if len(got) != len(want):
        raise ValueError(f"control: got {len(got)} residuals, expected {len(want)}: each skip's, then the middle's")
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        if one != other:
            raise ValueError(f"control[{number}]: got shape {one}, expected {other}")


def widened(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint, for a `network` that has inputs which the checkpoint has not, or wider ones.

    Added are the network's own tensors of those inputs, which must be as they begin; columns that are missing are
    zero. Everything else is left as it is, so that what does not fit is still seen by whoever loads.
    """
    found = dict(tensors)
    for name, own in network.state_dict().items():
        if not name.startswith(NAMES):
            continue
        if name not in tensors:
            found[name] = own.detach().clone()
            continue
        columns = own.shape[1] - tensors[name].shape[1] if own.dim() > 1 else 0
        if columns > 0:
            missing = tensors[name].new_zeros(own.shape[0], columns, *own.shape[2:])
            found[name] = torch.cat([tensors[name], missing], dim=1)
    return found
