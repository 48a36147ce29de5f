"""An adapter of the smallest network (tests/truth/tiny_raphael.py) after a training that never was."""

from __future__ import annotations

from truth.tiny_raphael import small_unet


def made_pairs(targets: tuple[str, ...], rank: int = 2, alpha: float = 2.0, seed: int = 0) -> dict:
    """Site -> Pair of random numbers, none of them zero."""
    import torch

    from raphael.base.config.lora import LoraConfig
    from raphael.net.lora.low_rank import attach, pairs_in
    from raphael.net.lora.sites import Pair
    from raphael.net.moe.unet import RaphaelUNet

    torch.manual_seed(seed)
    net = RaphaelUNet(small_unet())
    attach(net, net, LoraConfig(rank=rank, alpha=alpha, targets=targets), seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.2)
    held = pairs_in(net.state_dict(), alpha)
    return {site: Pair(pair.down.detach(), pair.up.detach(), pair.alpha) for site, pair in held.items()}
