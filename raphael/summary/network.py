"""What a preset of one network is made of (raphael/presets/<folder>/): a cascade's base or upsampler, without the text
encoder, which it names by the width of its tokens alone. From the meta device, as raphael/summary/model.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raphael.base.config.efficient import EfficientUNetConfig
from raphael.base.config.preset import PRESETS, DiffusionConfig, load_preset
from raphael.base.config.unet import Count, PlainUNetConfig
from raphael.base.strict import read_yaml
from raphael.net.condition import Condition
from raphael.net.efficient.unet import EfficientUNet
from raphael.net.moe.parts import num_parameters
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet
from raphael.summary.model import count_flops, training_memory, tree

SIDE_PX = 64  # of a base's images, and of those that an upsampler is told


@dataclass(frozen=True)
class PlainPreset:
    unet: PlainUNetConfig
    diffusion: DiffusionConfig
    factor: Count = 1  # the side of its images / of those that it is told


@dataclass(frozen=True)
class EfficientPreset:
    unet: EfficientUNetConfig
    diffusion: DiffusionConfig
    factor: Count = 1


def networks_in(name: str) -> list[str]:
    """The presets of one network that `name` means: itself, or all of the folder of that name; [] for a preset of a
    whole model, and for what is no preset."""
    if (folder := PRESETS / name).is_dir() and name:
        return sorted((f"{name}/{file.stem}" for file in folder.glob("*.yaml")), key=lambda each: (len(each), each))
    file = Path(name) if name.endswith(".yaml") else PRESETS / f"{name}.yaml"
    found = read_yaml(file) if file.is_file() else {}
    return [name] if "unet" in found and "text" not in found else []


def network_text(name: str) -> str:
    """Tree, parameters, operations and memory of one of `networks_in`. Raises ConfigError."""
    efficient = "stem_channels" in read_yaml(name if name.endswith(".yaml") else PRESETS / f"{name}.yaml")["unet"]
    preset = load_preset(name, EfficientPreset if efficient else PlainPreset)
    with torch.device("meta"):
        network: nn.Module = (EfficientUNet if efficient else UNet)(preset.unet, PlainBlock).eval()
    side, config = SIDE_PX * preset.factor, preset.unet

    def step() -> Tensor:
        def meta(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta")

        tokens = meta(1, config.context_length, config.context_dim) if config.context_dim else None
        picture = meta(1, config.picture_channels, side, side) if config.picture_channels else None
        told = Condition(tokens, picture=picture, level=meta(1) if config.level_embedding else None)
        return network(meta(1, config.latent_channels, side, side), meta(1), told)

    trained = num_parameters(network)
    lines = [f"preset {name}: module, parameters, shape of the output for one image of {side} x {side} px", ""]
    lines += tree("unet", network, step)
    lines += ["", f"transformer blocks: {network.num_blocks}", f"unet: {trained:,} parameters"]
    if config.context_dim:
        lines += [
            f"reads {config.context_length} tokens of width {config.context_dim:,}, of an encoder that is not counted"
        ]
    flops = count_flops(step) / 1e9
    lines += [f"GFLOP for one image: {flops:,.2f} a denoising step, {3 * flops:,.2f} a training step (three forwards)"]
    memory = {what: size for what, size in training_memory(trained, 0).items() if size}
    lines += ["", "memory for training it, without activations:"]
    lines += [f"  {what:<36}{size / 1e9:>9.2f} GB" for what, size in memory.items()]
    return "\n".join([*lines, f"  {'sum':<36}{sum(memory.values()) / 1e9:>9.2f} GB"])
