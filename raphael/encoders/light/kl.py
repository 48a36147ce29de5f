"""AutoencoderKL of convolutions alone, as `build_autoencoder` makes it: diffusers' class by the same names of weights.

One with attention (Stable Diffusion's), or built otherwise, is left to diffusers.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raphael.base.stage import read_json
from raphael.encoders.pretrained import CONFIG

WEIGHTS = "diffusion_pytorch_model.safetensors"
EPS = 1e-6
PLAIN = {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": False}
PLAIN |= {"use_quant_conv": True, "use_post_quant_conv": True, "in_channels": 3, "out_channels": 3}


class Resnet(nn.Module):
    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, EPS), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after, EPS), nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Halve(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only, as Stable Diffusion's was trained


class Double(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Resnets, then a change of the side; `name` is that of the list in which diffusers keeps it."""

    def __init__(self, resnets: list[Resnet], name: str, change: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.name = name
        if change is not None:
            setattr(self, name, nn.ModuleList([change]))

    def forward(self, x: Tensor) -> Tensor:
        for part in [*self.resnets, *getattr(self, self.name, ())]:
            x = part(x)
        return x


class Side(nn.Module):
    """Encoder or decoder."""

    def __init__(self, channels: tuple[int, int], ends: tuple[int, int], groups: int, mid: int):
        super().__init__()
        self.conv_in = nn.Conv2d(ends[0], channels[0], 3, padding=1)
        self.mid_block = Level([Resnet(mid, mid, groups) for _ in range(2)], "none", None)
        self.conv_norm_out = nn.GroupNorm(groups, channels[1], EPS)
        self.conv_out = nn.Conv2d(channels[1], ends[1], 3, padding=1)

    def finish(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Encoder(Side):
    def __init__(self, widths: list[int], layers: int, groups: int, latent: int):
        super().__init__((widths[0], widths[-1]), (3, 2 * latent), groups, widths[-1])
        befores = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            Level(
                [Resnet(before if i == 0 else after, after, groups) for i in range(layers)],
                "downsamplers",
                Halve(after) if level < len(widths) - 1 else None,
            )
            for level, (before, after) in enumerate(zip(befores, widths, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.finish(self.mid_block(x))


class Decoder(Side):
    def __init__(self, widths: list[int], layers: int, groups: int, latent: int):
        super().__init__((widths[-1], widths[0]), (latent, 3), groups, widths[-1])
        afters = widths[::-1]
        befores = [afters[0], *afters[:-1]]
        self.up_blocks = nn.ModuleList(
            Level(
                [Resnet(before if i == 0 else after, after, groups) for i in range(layers + 1)],
                "upsamplers",
                Double(after) if level < len(widths) - 1 else None,
            )
            for level, (before, after) in enumerate(zip(befores, afters, strict=True))
        )

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            z = level(z)
        return self.finish(z)


class KlNetwork(nn.Module):
    """What `Autoencoder` uses of diffusers' AutoencoderKL: config, encode(images).latent_dist.parameters and
    decode(z).sample; `to_diffusers` is that class, to be saved."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        widths, latent = list(config["block_out_channels"]), int(config["latent_channels"])
        shape = (widths, int(config["layers_per_block"]), int(config["norm_num_groups"]), latent)
        self.config = SimpleNamespace(**config)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=self.quant_conv(self.encoder(images))))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(z)))

    def to_diffusers(self) -> nn.Module:
        from diffusers import AutoencoderKL

        known = {name: value for name, value in vars(self.config).items() if not name.startswith("_")}
        network = AutoencoderKL.from_config(known)
        network.load_state_dict(self.state_dict())
        return network


def load_kl(folder: Path) -> KlNetwork | None:
    """A folder's network in float32 on the CPU, or None where it is one for diffusers.

    Raises OSError for damaged weights, RuntimeError for those that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / CONFIG
    config = read_json(file) if file.is_file() and (folder / WEIGHTS).is_file() else {}
    levels = len(config.get("block_out_channels", ()))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    if any(config.get(name) != value for name, value in {**PLAIN, **blocks}.items()):
        return None
    with torch.device("meta"):
        network = KlNetwork(config)
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        network.load_state_dict(tensors, assign=True)
    except SafetensorError as error:
        raise OSError(f"{WEIGHTS}: {error}") from None
    return network
