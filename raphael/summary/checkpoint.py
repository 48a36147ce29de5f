"""What a checkpoint or a preset is made of, in words and numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from raphael.base.checkpoint.folder import read_checkpoint
from raphael.base.config.preset import RaphaelUNetConfig, load_preset
from raphael.base.config.systems import DEFAULT, system_of
from raphael.base.strict import load, to_dict
from raphael.net.moe.parts import kind_of
from raphael.net.moe.unet import RaphaelUNet
from raphael.pretrained.find import find_pipeline


def describe_preset(name: str) -> str:
    preset = load_preset(name)
    return _describe(f"preset {name}", preset.unet, to_dict(preset.diffusion))


def describe_checkpoint(path: str | Path) -> str:
    """path: a pipeline folder, or the name of one. Raises StageError where there is none."""
    folder = find_pipeline(path)
    _, meta = read_checkpoint(folder, [])
    if system_of(meta) != DEFAULT:
        return "\n".join([f"checkpoint {path}", *(f"  {key:<28}{value}" for key, value in meta.items())])
    config = load(RaphaelUNetConfig, meta["unet"], str(folder / "meta.json"), "unet")
    text = _describe(f"checkpoint {path}", config, meta["diffusion"])
    rest = {key: value for key, value in meta.items() if key not in ("unet", "diffusion")}
    return text + "\n" + "\n".join(f"  {key:<28}{value}" for key, value in rest.items())


def parameter_counts(config: RaphaelUNetConfig) -> dict[str, int]:
    """Parameters by what they are for. Built without memory (meta device), so that the largest preset costs nothing."""
    with torch.device("meta"):
        unet = RaphaelUNet(config)
    counts: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        counts[kind_of(name)] += parameter.numel()
    return dict(counts)


def _describe(title: str, config: RaphaelUNetConfig, diffusion: dict[str, Any]) -> str:
    counts = parameter_counts(config)
    with torch.device("meta"):
        blocks = RaphaelUNet(config).num_blocks
    lines = [title, f"  {'transformer blocks':<28}{blocks}"]
    lines += [f"  {kind:<28}{count:>15,}" for kind, count in sorted(counts.items())]
    lines += [f"  {'U-Net, all parameters':<28}{sum(counts.values()):>15,}"]
    lines += [f"  {key:<28}{value}" for key, value in {**to_dict(config), **diffusion}.items()]
    return "\n".join(lines)
