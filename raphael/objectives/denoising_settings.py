"""What RAPHAEL's objective (raphael/objectives/denoising.py) is told. Without torch: who reads settings needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from raphael.base.config.data import NonNegative
from raphael.base.config.params import PhaseConfig
from raphael.base.config.preset import Positive, Share
from raphael.base.strict import Range


@dataclass(frozen=True)
class DenoisingSettings:
    """Of train.settings."""

    latents: Literal["sample", "mean"]  # of the autoencoder's posterior; sample: as in latent diffusion
    caption_drop: Share  # share of samples whose caption is replaced by the empty one
    edge_weight: Annotated[float, Range(0)]
    edge_block_weights: tuple[Annotated[float, Range(0)], ...]  # one a transformer block, in their order; empty: all 1
    edge_max_timestep: NonNegative  # T_c: no edge loss at t > T_c
    focal_alpha: Share
    focal_gamma: Annotated[float, Range(0)]
    noise_offset: Annotated[float, Range(0, 1)]  # share of noise that is the same on a whole channel; 0: off
    timestep_shift: Positive  # s: timesteps are drawn as T s u / (1 + (s - 1) u), u uniform; 1: uniform
    min_snr_gamma: Annotated[float, Range(0)]  # 0: off, every timestep counts alike; 5 in arXiv 2303.09556
    edge_resolution: Literal["map", "target"]  # targets brought to each block's map, or logits to the targets' size
    balance: Literal["none", "switch", "loss_free"]  # none: as in the paper; loss_free: a bias moved outside gradients
    balance_weight: Annotated[float, Range(0)]  # of Switch's loss
    balance_rate: Annotated[float, Range(0)]  # u of loss_free: what a step adds to or takes from a gate's bias
    phases: tuple[PhaseConfig, ...] = ()  # before the rest of this section holds (raphael/train/phases.py)
