"""What a checkpoint or a preset is made of, in words and numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from raphael.checkpoint import read_checkpoint
from raphael.net.unet import UNet
from raphael.preset import UNetConfig, load_preset
from raphael.stage import StageError
from raphael.strict import load, to_dict


def describe_preset(name: str) -> str:
    preset = load_preset(name)
    return _describe(f"preset {name}", preset.unet, to_dict(preset.diffusion))


def describe_checkpoint(path: str) -> str:
    """Raises StageError where there is no checkpoint."""
    folder = Path(path)
    if not folder.is_dir():
        raise StageError(f"{path}: no such folder; expected a trained pipeline, or --preset NAME")
    _, meta = read_checkpoint(folder, [])
    config = load(UNetConfig, meta["unet"], str(folder / "meta.json"), "unet")
    text = _describe(f"checkpoint {path}", config, meta["diffusion"])
    rest = {key: value for key, value in meta.items() if key not in ("unet", "diffusion")}
    return text + "\n" + "\n".join(f"  {key:<28}{value}" for key, value in rest.items())


def parameter_counts(config: UNetConfig) -> dict[str, int]:
    """Parameters by what they are for. Built without memory (meta device), so that the largest preset costs nothing."""
    with torch.device("meta"):
        unet = UNet(config)
    counts: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        counts[_kind(name)] += parameter.numel()
    return dict(counts)


def _describe(title: str, config: UNetConfig, diffusion: dict[str, Any]) -> str:
    counts = parameter_counts(config)
    with torch.device("meta"):
        blocks = UNet(config).num_blocks
    lines = [title, f"  {'transformer blocks':<28}{blocks}"]
    lines += [f"  {kind:<28}{count:>15,}" for kind, count in sorted(counts.items())]
    lines += [f"  {'U-Net, all parameters':<28}{sum(counts.values()):>15,}"]
    lines += [f"  {key:<28}{value}" for key, value in {**to_dict(config), **diffusion}.items()]
    return "\n".join(lines)


def _kind(name: str) -> str:
    for part, kind in (
        ("space_moe.gate", "gates"),
        ("time_moe.gate", "gates"),
        ("space_moe", "space experts"),
        ("time_moe", "time experts"),
        ("self_attention", "attention"),
        ("cross_attention", "attention"),
        ("edge_head", "edge heads"),
        ("_dense", "feed-forwards"),
    ):
        if part in name:
            return kind
    return "convolutions, norms, time"
