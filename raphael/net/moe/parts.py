"""What RAPHAEL's U-Net is made of, by name and by number, and what its blocks show: for whoever describes it."""

from __future__ import annotations

from torch import Tensor, nn

from raphael.net.condition import Condition
from raphael.net.moe.unet import RaphaelUNet
from raphael.net.unet import UNetOutput

KINDS = (  # a part of a parameter's name, what it is for; the first that fits
    ("space_moe.gate", "gates"),
    ("time_moe.gate", "gates"),
    ("space_moe", "space experts"),
    ("time_moe", "time experts"),
    ("self_attention", "attention"),
    ("cross_attention", "attention"),
    ("edge_head", "edge heads"),
    ("_dense", "feed-forwards"),
)
OTHERS = "convolutions, norms, time"


def kind_of(name: str) -> str:
    """What a parameter of that name is for."""
    return next((kind for part, kind in KINDS if part in name), OTHERS)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def active_parameters(unet: RaphaelUNet) -> int:
    """Of one denoising step: a time expert of each block instead of all; all space experts, the most a prompt can use.

    Edge heads are for training alone.
    """
    idle = 0
    for block in unet.transformer_blocks():
        if block.time_moe is not None:
            num = block.time_moe.gate.num_experts
            idle += num_parameters(block.time_moe.experts) // num * (num - 1)
        idle += num_parameters(block.edge_head) if block.edge_head is not None else 0
    return num_parameters(unet) - idle


def edge_maps(output: UNetOutput) -> list[Tensor]:
    """Edge probabilities (n, h, w) of every block that has an edge head."""
    return [block.edge_logits.float().sigmoid()[:, 0] for block in output.blocks if block.edge_logits is not None]


def word_routes(unet: RaphaelUNet, condition: Condition) -> Tensor:
    """(blocks, n, N) int64: the space expert of every token."""
    return unet.space_routes(condition.tokens, condition.mask)
