"""A guide: a network that reads noised images and says by its gradient where to go (raphael/systems/guides)."""

from __future__ import annotations

from dataclasses import dataclass

from raphael.base.config.data import NonNegative
from raphael.base.config.params import LoopConfig, refuse_unread
from raphael.base.config.preset import Positive
from raphael.base.config.unet import PlainUNetConfig, Whole


@dataclass(frozen=True, kw_only=True)
class HalfUNetConfig(PlainUNetConfig):
    """The way down of a U-Net, its middle, and attention pooling to one vector (raphael/net/noised/half.py).

    The last two are left out in settings: they follow from the model that is to be guided.
    """

    embedding_dim: Whole = 0  # of the vector that comes out: a number for each class, or the text encoder's width
    pool_side: Whole = 0  # side of the last map, which has a learned vector for each place; others are interpolated

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("out_channels", "context_dim", "picture_channels", "vector_dim", "size_px", "level_embedding"):
            if value := getattr(self, name):
                raise ValueError(f"{name}: got {value}, expected none: a guide reads an image and its timestep alone")


@dataclass(frozen=True)
class GuideConfig:
    """raphael/systems/guides/<kind>.yaml, over it what `raphael train --guide` is told by --set."""

    seed: NonNegative  # of weights, order and noise
    num_heldout: NonNegative  # records kept out, on which its accuracy is measured at the end
    timestep_shift: Positive  # where in time it is trained (raphael/objectives/timesteps.py); 1: everywhere alike
    network: HalfUNetConfig
    loop: LoopConfig

    def __post_init__(self) -> None:
        refuse_unread(self.loop)
