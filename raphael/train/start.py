"""Where a training begins when it does not begin from nothing, and when it has learned enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raphael.checkpoint import checkpoint_sha256, load_weights, read_checkpoint
from raphael.config import TrainConfig
from raphael.stage import StageError
from raphael.strict import to_dict

if TYPE_CHECKING:
    from raphael.net.unet import UNet
    from raphael.preset import Preset


def begin_from(unet: UNet, config: TrainConfig, preset: Preset) -> None:
    """Fill `unet` with the averaged weights of train.init_from; moments and averages begin anew.

    Raises StageError where it is another checkpoint than the settings say, or of another noise; CheckpointError where
    it is damaged or of another shape.
    """
    folder = Path(config.init_from)
    if not folder.exists():
        raise StageError(f"train.init_from: {folder}: no such folder; expected a pipeline folder (models/raphael)")
    found = checkpoint_sha256(folder)
    if not found.startswith(config.init_sha256):
        raise StageError(
            f"train.init_from: {folder}: got checkpoint {found[:16]}, expected {config.init_sha256}; another model "
            "lies there now: set train.init_sha256, or restore it"
        )
    groups, meta = read_checkpoint(folder, ["ema"])
    mine = to_dict(preset.diffusion)
    for name, value in meta["diffusion"].items():
        if mine[name] != value:
            raise StageError(
                f"train.init_from: {folder}: was trained with diffusion.{name} {value}, this preset has {mine[name]}; "
                "set it in the preset"
            )
    load_weights(unet, groups["ema"], folder)


@dataclass(frozen=True)
class Patience:
    """Early stopping, for Hooks.enough: so many points in a row without a lower value of `metric` than the best.

    A function of the points logged alone, so that every rank and a resumed run decide alike. Points without the metric
    do not count.
    """

    metric: str
    points: int

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"patience: got {self.points} points, expected at least 1")

    def __call__(self, history: list[dict[str, float]]) -> bool:
        values = [point[self.metric] for point in history if self.metric in point]
        return bool(values) and len(values) - 1 - values.index(min(values)) >= self.points
