"""A pipeline folder of the real classes at the smallest size with random weights: models/raphael, untrained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raphael.base.config.params import AutoencoderConfig, ClipConfig, load_config
from raphael.base.config.preset import RaphaelUNetConfig, load_preset
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parents[2]


def small_unet() -> RaphaelUNetConfig:
    preset = load_preset(str(ROOT / "raphael/presets/tiny.yaml")).unet
    return replace(
        preset,
        channels=(16, 32),
        attention_levels=(0, 1),
        head_dim=8,
        norm_groups=8,
        context_dim=32,
        context_length=16,
        edge_channels=4,
        edge_layers=2,
    )


def write_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write a pipeline folder for 32 x 32 px images (latents 4 x 8 x 8). Every weight is random, none is zero."""
    import torch

    from raphael.base.checkpoint.folder import write_checkpoint
    from raphael.encoders.autoencoder import build_autoencoder
    from raphael.encoders.clip import build_clip, save_clip
    from raphael.net.moe.unet import RaphaelUNet

    torch.manual_seed(seed)
    config = load_config(ROOT / "params.yaml")
    unet = RaphaelUNet(small_unet())
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    diffusion = load_preset(str(ROOT / "raphael/presets/tiny.yaml")).diffusion
    meta = {
        "unet": to_dict(unet.config),
        "diffusion": to_dict(diffusion),
        "picture": {"sizes_px": [[32, 32], [24, 40]]},
        "mean_over": unet.config.mean_over,
        "images_seen": 0,
    }
    write_checkpoint(folder, {"ema": unet.state_dict(), "raw": unet.state_dict()}, meta)
    autoencoder: AutoencoderConfig = replace(config.autoencoder, channels=(8, 8, 8), norm_groups=4)
    build_autoencoder(autoencoder).save(folder / "autoencoder")
    clip: ClipConfig = replace(
        config.clip,
        context_length=16,
        embed_dim=16,
        text_width=32,
        text_heads=4,
        text_layers=1,
        image_tower="vit",
        image_size_px=32,
        image_width=64,
        image_layers=1,
        patch_size_px=16,
    )
    save_clip(build_clip(clip), folder / "text_encoder")
    return folder
