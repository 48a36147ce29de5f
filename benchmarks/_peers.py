"""The peer of the speed benchmarks, diffusers' UNet2DConditionModel, and our U-Net in the same shape.

Ours is the dense variant: neither mixture, no edge heads, one GEGLU feed-forward of 4 x the width a block, as theirs.
What stays different: theirs has a linear layer before each transformer block as well as after it, ours only after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raphael.base.config.preset import RaphaelUNetConfig, load_preset
from raphael.net.condition import Condition
from raphael.net.layers import ResBlock
from raphael.net.moe.block import RaphaelBlock
from raphael.net.moe.unet import RaphaelUNet


def config_of(preset: str, **changes: object) -> RaphaelUNetConfig:
    """The preset's U-Net with the mixtures, as it is trained; fields replaced by `changes`."""
    return dataclasses.replace(load_preset(preset).unet, **changes)


def dense(config: RaphaelUNetConfig) -> RaphaelUNetConfig:
    """The same shape with what Stable Diffusion has in place of the mixtures."""
    return dataclasses.replace(
        config,
        time_layer="none",
        space_layer="dense",
        dense_expansion=4.0,
        dense_activation="geglu",
        edge_tokens="none",
        pooled_text=False,
    )


def diffusers_unet(config: RaphaelUNetConfig, heads: int | None = None) -> nn.Module:
    """UNet2DConditionModel of that shape, with random weights, from no download.

    heads: of every level, as in SD v1 (8); None: as many as ours has at each level, all config.head_dim wide.
    """
    from diffusers import UNet2DConditionModel

    levels = range(len(config.channels))
    attention = [level in config.attention_levels for level in levels]
    return UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        # a trap of names: diffusers takes `attention_head_dim` for the number of heads
        attention_head_dim=heads or tuple(width // config.head_dim for width in config.channels),
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
    )


class Theirs(nn.Module):
    """diffusers' network, called as ours is."""

    def __init__(self, config: RaphaelUNetConfig, heads: int | None = None):
        super().__init__()
        self.net = diffusers_unet(config, heads)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.net(x, t, context, return_dict=False)[0]

    def checkpoint_activations(self) -> None:
        self.net.enable_gradient_checkpointing()


class Ours(nn.Module):
    def __init__(self, config: RaphaelUNetConfig):
        super().__init__()
        self.net = RaphaelUNet(config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.net(x, t, Condition(context)).prediction

    def checkpoint_activations(self) -> None:
        """Of every res-block and transformer block, as theirs does."""
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

        wrapping.apply_activation_checkpointing(
            self.net, check_fn=lambda module: isinstance(module, (RaphaelBlock, ResBlock))
        )


def make_inputs(
    config: RaphaelUNetConfig, batch: int, latent: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, latent, latent), t (B,), context (B, N, context_dim): random, the same every time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.latent_channels, latent, latent, generator=generator)
    t = torch.arange(batch) * 997 % 1000
    context = torch.randn(batch, config.context_length, config.context_dim, generator=generator)
    return x.to(device), t.to(device), context.to(device)


def size_and_cost(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Millions of parameters, and GFLOP of a forward pass, from shapes alone: 2 a multiply-add of a matrix product,
    convolution or attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = make().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*(tensor.to("meta") for tensor in inputs))
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return {"parameters_m": round(millions, 1), "forward_gflop": round(counter.get_total_flops() / 1e9, 2)}


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Random weights of a sane size, at once: torch's own initialisation of 860 million takes longer than a step."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.dim() < 2:
            parameter.fill_(float(name.endswith("weight")))  # of a norm; the others are biases
            continue
        flat = parameter.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block.roll(number)[: len(part)])
        parameter.mul_(parameter[0].numel() ** -0.5)
    for buffer in module.buffers():
        buffer.zero_()
    return module
