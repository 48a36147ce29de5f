"""TAEF2, a tiny autoencoder for FLUX.2's latents: 8 times down, 32 latent channels, no posterior, only a mean.

Weights: madebyollin/taesd (MIT), `taef2_encoder.pth` and `taef2_decoder.pth`. The layout below is read off the names
and shapes in those files, so that a plain state dict loads strictly.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

ENCODER_FILE, DECODER_FILE = "taef2_encoder.pth", "taef2_decoder.pth"
WIDTH = 64
POOL_EXPANSION, POOL_GROUPS = 4, 4
LATENT_BOUND = 3.0  # the decoder squashes what it gets to (-3, 3)


class Residual(nn.Module):
    """Three convolutions beside the identity, optionally after a pointwise branch normalised over the whole map."""

    def __init__(self, normalised: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [_conv(WIDTH, WIDTH), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.pool = None
        if normalised:
            hidden = WIDTH * POOL_EXPANSION
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, hidden, 1, bias=False),
                nn.GroupNorm(POOL_GROUPS, hidden),
                nn.ReLU(),
                nn.Conv2d(hidden, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LATENT_BOUND) * LATENT_BOUND


class TinyNetwork(nn.Module):
    """encode: images (B,3,H,W) in [0,1] -> (B,C,H/8,W/8). decode: the way back, not clamped."""

    downsampling = 8

    def __init__(self, latent_channels: int = 32):
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = nn.Sequential(
            _conv(3, WIDTH), Residual(),
            *_level_down(), *_level_down(), *_level_down(normalised=True),
            _conv(WIDTH, latent_channels),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            Squash(), _conv(latent_channels, WIDTH), nn.ReLU(),
            *_level_up(normalised=True), *_level_up(), *_level_up(),
            Residual(), _conv(WIDTH, 3),
        )  # fmt: skip

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def load_tiny(folder: str | Path) -> TinyNetwork:
    """The network with the weights of a folder that holds both .pth files, in float32. Raises ValueError, one line."""
    folder = Path(folder)
    states = {part: _read(folder / file) for part, file in (("encoder", ENCODER_FILE), ("decoder", DECODER_FILE))}
    try:
        network = TinyNetwork(states["encoder"]["14.weight"].shape[0])
        network.encoder.load_state_dict(states["encoder"])
        network.decoder.load_state_dict(states["decoder"])
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        expected = f"{ENCODER_FILE} and {DECODER_FILE}"
        raise ValueError(f"{folder}: not TAEF2's weights ({reason}); expected {expected}") from None
    return network


def save_tiny(network: TinyNetwork, folder: Path) -> None:
    """Write both files in float16, the precision they are published in. Equal weights give equal bytes."""
    for part, file in ((network.encoder, ENCODER_FILE), (network.decoder, DECODER_FILE)):
        torch.save(OrderedDict((name, tensor.half()) for name, tensor in part.state_dict().items()), folder / file)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {ENCODER_FILE} and {DECODER_FILE} in that folder")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.float() for name, tensor in state.items()}


def _conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=bias)


def _level_down(normalised: bool = False) -> list[nn.Module]:
    return [_conv(WIDTH, WIDTH, stride=2, bias=False), *(Residual(normalised) for _ in range(3))]


def _level_up(normalised: bool = False) -> list[nn.Module]:
    return [*(Residual(normalised) for _ in range(3)), nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]
