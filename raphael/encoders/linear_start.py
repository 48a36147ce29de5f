"""A start for AutoencoderKL that already halves and doubles images, so that a short training goes into the details.

From random weights the first thousands of images teach the network no more than the colours. Here the first channels
carry red, green and blue linearly, through the nonlinearity too: silu(x) - silu(-x) = x, so each colour travels as the
pair (x, -x). A constant pair keeps the group norms' divisor nearly the same for all images. All else stays random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

COLOURS = 3
CARRIED = 2 * (COLOURS + 1)  # three colours and the constant, each with both signs
CONSTANT = 2.0
COLOUR_ENERGY = 0.5  # mean square of a colour in [-1,1], roughly
OTHERS = 0.1  # share of their random weights that other channels keep where the colours leave
DETAIL_GAIN = 5.0  # of the latent channels beside the colours, so that they too stand out from the posterior's noise


@torch.no_grad()
def start_linear(network: nn.Module) -> None:
    """Change the weights of a fresh AutoencoderKL in place. Raises ValueError where it is too narrow."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    narrowest = min(network.config.block_out_channels)
    if narrowest < CARRIED or network.config.latent_channels < COLOURS:
        raise ValueError(
            f"autoencoder: got channels {narrowest} and latent_channels {network.config.latent_channels}, expected at "
            f"least {CARRIED} and {COLOURS}; set them in params.yaml"
        )
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            _carry(module.conv, torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]))  # padded right and below
        elif isinstance(module, Upsample2D):
            _carry(module.conv, _centre())
    for half in (network.encoder, network.decoder):
        _enter(half.conv_in)
        _leave(half.conv_out, half.conv_norm_out)
    for conv in (network.quant_conv, network.post_quant_conv):
        if conv is not None:
            rows = network.config.latent_channels
            conv.weight[:rows] = torch.eye(*conv.weight.shape[:2])[:rows, :, None, None]
            conv.bias[:rows] = 0
    network.encoder.conv_out.weight[COLOURS : network.config.latent_channels] *= DETAIL_GAIN


def _carry(conv: nn.Conv2d, taps: Tensor) -> None:
    """The carried channels go through on their own, with these weights over the window."""
    conv.weight[:CARRIED] = 0
    for channel in range(CARRIED):
        conv.weight[channel, channel] = taps
    conv.bias[:CARRIED] = 0


def _enter(conv: nn.Conv2d) -> None:
    """Channels 2k, 2k+1: plus and minus colour k; the next two: plus and minus the constant."""
    conv.weight[:CARRIED] = 0
    conv.bias[:CARRIED] = 0
    for colour in range(COLOURS):
        conv.weight[2 * colour, colour] = _centre()
        conv.weight[2 * colour + 1, colour] = -_centre()
    conv.bias[CARRIED - 2], conv.bias[CARRIED - 1] = CONSTANT, -CONSTANT


def _leave(conv: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Colour k is the difference of its pair, times what the norm divided it by."""
    width = norm.num_channels // norm.num_groups
    pairs = min(width, CARRIED) / 2
    constant = CONSTANT**2 if width >= CARRIED else 0.0
    energy = 2 * (min(pairs, COLOURS) * COLOUR_ENERGY + constant) / width
    conv.weight[:COLOURS] *= OTHERS
    conv.bias[:COLOURS] = 0
    for colour in range(COLOURS):
        conv.weight[colour, :CARRIED] = 0
        conv.weight[colour, 2 * colour] = math.sqrt(energy) * _centre()
        conv.weight[colour, 2 * colour + 1] = -math.sqrt(energy) * _centre()


def _centre() -> Tensor:
    taps = torch.zeros(3, 3)
    taps[1, 1] = 1
    return taps
