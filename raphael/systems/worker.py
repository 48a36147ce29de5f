"""The training of one part of a system, as one of its workers, whoever started it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.consent import trust_settings
from raphael.base.config.params import TrainConfig
from raphael.base.files import written_whole
from raphael.systems import module_of
from raphael.systems.job import Events, Training, TrainingJob, about

if TYPE_CHECKING:
    from raphael.base.tracking.tracker import Tracker
    from raphael.train.loop import World


def train_part(job: TrainingJob, world: World) -> dict[str, Any]:
    """Train as one of `world`'s workers, to the end; resumes from the newest checkpoint. Returns the loop's result."""
    from raphael.train.heldout import Heldout, split
    from raphael.train.loop import Hooks, train
    from raphael.train.repeats import repeated

    trust_settings(job.config)  # a worker on another node has not the stage's environment
    settings, loop, world = job.config.train, job.loop, replace(world, parallel=job.config.train.parallel)
    rank_0 = world.rank == 0
    training: Training = module_of(job.system.name, "training").training(job)
    objective = training.objective
    if settings.lora.rank:
        from raphael.net.lora.low_rank import attach

        attach(objective, objective.get_submodule(job.part.network), settings.lora, settings.seed)
    tracker = tracker_of(job, rank_0)
    events = Events(job.folders.events)
    data, out = split(training.records, settings.num_heldout)
    data, lines = training.arrange(repeated(data, training.records.facts))
    if rank_0:
        if training.flops is not None:
            objective.flops_per_image = training.flops()
        for line in lines:
            events.write({"say": line})
    first: list[Any] = []
    hooks = Hooks(
        on_log=lambda point, images: events.write({"point": point, "images": images}),
        on_sample=lambda images, weights: sample(job, training, tracker, rank_0, (images, weights), first),
        sample_weights=settings.sample_weights if training.grid else (),
        heldout=training.beside(Heldout(objective, out, world, loop.precision), world) if out is not None else None,
        enough=patience(settings),
        progress=events.progress,
        say=lambda line: events.write({"say": line}),
        about=about(job, training.records) if rank_0 else {},
        best_by=judged_by(settings),
    )
    return train(
        objective,
        data,
        loop,
        settings.seed,
        folder=job.folders.checkpoints,
        tracker=tracker,
        world=world,
        hooks=hooks,
    )


def sample(
    job: TrainingJob, training: Training, tracker: Tracker, keep: bool, when: tuple[int, str], first: list[Any]
) -> None:
    """Generate a grid with the weights that the objective has now. when: (images seen, name of the weights).

    first: holds the grid at 0 images, once there is one: every EMA has the weights of the beginning then, and its grid
    is the same.
    """
    images, weights = when
    grid = first[0] if images == 0 and first else training.grid()
    if images == 0:
        first[:] = [grid]
    if not keep:
        return
    folder: Path = job.folders.samples / (weights if weights != "ema" else "")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / f"{images:06d}.png") as temporary:
        grid.save(temporary)
    tracker.image("samples/grid" if weights == "ema" else f"samples/{weights}", grid, images)


def tracker_of(job: TrainingJob, rank_0: bool) -> Tracker:
    """Rank 0's, of the stage's run; the numbers of one of several parts under its name."""
    from raphael.base.tracking.tracker import MlflowTracker, NullTracker

    if not rank_0 or job.journal is None:
        return NullTracker()
    tracker = MlflowTracker(job.tracking_uri, job.run_id, job.journal)
    return _Named(tracker, job.folders.part) if job.folders.part else tracker


class _Named:
    """A tracker whose keys stand behind the name of a part: parts count their images anew."""

    def __init__(self, tracker: Tracker, part: str):
        self.tracker, self.part = tracker, part

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.tracker.log({f"{self.part}/{name}": value for name, value in metrics.items()}, step)

    def image(self, key: str, image: Any, step: int) -> None:
        self.tracker.image(f"{self.part}/{key}", image, step)


def patience(settings: TrainConfig) -> Callable[[list[dict[str, float]]], bool]:
    """Early stopping: whether the held-out loss has used up its patience."""
    from raphael.train.start import Patience

    if not settings.patience:
        return lambda points: False
    return Patience(judged_by(settings), settings.patience)


def judged_by(settings: TrainConfig) -> str:
    """The held-out loss of the EMA weights; of the last ones, where there is no EMA."""
    return f"heldout/{'ema' if settings.loop.ema_decay else 'raw'}/denoise"
