"""A pipeline folder of a DDPM of classes at the smallest size with random weights, untrained."""

from __future__ import annotations

from pathlib import Path

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.strict import to_dict

CLASSES = ("circle", "cross", "heart", "square", "star", "triangle")


def write_ddpm(folder: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write a pipeline folder for 32 x 32 px images. Every weight is random, none is zero."""
    import torch

    from raphael.base.checkpoint.folder import write_checkpoint
    from raphael.net.plain import PlainBlock
    from raphael.net.unet import UNet

    torch.manual_seed(seed)
    sizes = {"channels": (8, 16), "res_blocks": 1, "attention_levels": (1,), "head_dim": 8, "norm_groups": 4}
    unet = UNet(PlainUNetConfig(latent_channels=3, **sizes, vector_dim=len(classes)), PlainBlock)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    meta = {
        "system": "ddpm",
        "unet": to_dict(unet.config),
        "diffusion": to_dict(DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", zero_terminal_snr=True)),
        "classes": list(classes),
        "picture": {"sizes_px": [[32, 32]]},
        "images_seen": 0,
    }
    write_checkpoint(folder, {"ema": unet.state_dict(), "raw": unet.state_dict()}, meta)
    return folder
