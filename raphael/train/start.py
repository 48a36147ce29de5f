"""Where a training begins when it does not begin from nothing, and when it has learned enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from raphael.base.checkpoint.folder import Stored, checkpoint_sha256, load_weights, read_checkpoint
from raphael.base.config.params import TrainConfig
from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.systems import DEFAULT, expect_system
from raphael.base.stage import StageError
from raphael.base.strict import load
from raphael.net.inputs import widened
from raphael.pretrained.find import find_pipeline

if TYPE_CHECKING:
    from raphael.base.config.preset import Preset
    from raphael.net.unet import UNet

Arranged = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]

SMALLEST_SLICE = 8  # images of a batch for each worker on a CPU, below which a second one gains nothing
WORTH_WORKERS = 6400  # images: Ray's start costs as much as 20 s of training


def begin_from(
    unet: UNet,
    config: TrainConfig,
    preset: Preset,
    system: str = DEFAULT,
    arranged: Arranged = lambda tensors, meta: tensors,
) -> None:
    """Fill `unet` with the EMA weights of train.init_from; moments and EMAs begin anew.

    arranged(weights, meta): what a system makes of them before they are loaded, such as columns in its own order.
    Raises StageError where it is another checkpoint than the settings say, or of another noise; CheckpointError where
    it is damaged or of another shape.
    """
    try:
        folder = find_pipeline(config.init_from)
    except StageError as error:
        raise StageError(f"train.init_from: {error}") from None
    found = checkpoint_sha256(folder)
    if not found.startswith(config.init_sha256):
        raise StageError(
            f"train.init_from: {folder}: got checkpoint {found[:16]}, expected {config.init_sha256}; another model "
            "lies there now: set train.init_sha256, or restore it"
        )
    expect_system(Stored(folder).meta, folder, system)
    groups, meta = read_checkpoint(folder, ["ema"])
    theirs = load(DiffusionConfig, meta["diffusion"], str(folder / "meta.json"), "diffusion")
    for field in fields(DiffusionConfig):
        value, mine = getattr(theirs, field.name), getattr(preset.diffusion, field.name)
        if mine != value:
            raise StageError(
                f"train.init_from: {folder}: was trained with diffusion.{field.name} {value}, this preset has {mine}; "
                "set it in the preset"
            )
    load_weights(unet, widened(unet, arranged(groups["ema"], meta)), folder)


def workers_for(train: TrainConfig, cores: int, gpus: int) -> int:
    """What `num_workers: auto` comes to on one machine: Ray workers, or 0, this process alone.

    A worker a GPU where there are several; on a GPU this process, where there is one. On CPUs a worker a core, if each
    has SMALLEST_SLICE images of a batch at least and the training is long enough to win back Ray's start
    (benchmarks/results: two workers gain 1.2 at 8 images a worker, 1.5 at 16). The update is the same up to rounding.
    """
    if train.num_workers != "auto":
        return train.num_workers
    if gpus:
        counts = range(gpus, 1, -1)
        return next((count for count in counts if train.loop.batch_size % count == 0), 0) if train.use_gpu else 0
    if train.loop.num_images < WORTH_WORKERS:
        return 0
    most = min(cores, train.loop.batch_size // SMALLEST_SLICE)
    return next((count for count in range(most, 1, -1) if train.loop.batch_size % count == 0), 0)


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
