"""What a training of a system is told, and what it tells: the seam between the stage `train` and a system's package.

A system's training.py has

    training(job) -> Training             of the part that the job names
    identity(config, folders) -> [...]    what of settings and data can change the weights; with the rest changed, work
                                          resumes where it was
    described(config, folders) -> {...}   what meta.json of the trained model says of it, "system" among it
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import Config, LoopConfig, TrainConfig
from raphael.base.config.systems import Part, System, find_system
from raphael.base.probe_set import PROBE
from raphael.base.strict import to_dict

if TYPE_CHECKING:
    from torch import nn

    from raphael.base.records import Records
    from raphael.train.heldout import Heldout
    from raphael.train.loop import World

SCALED = ("num_images", "warmup_images", "ema_start_images", "decay_images")  # by a part's share


@dataclass(frozen=True)
class Folders:
    """Absolute places: what the stage reads, and `work`, where unfinished work lies. part: of a system with several;
    each has its own folders in `work`."""

    records: Path
    autoencoder: Path
    clip: Path
    prompts: Path
    work: Path
    part: str = ""

    @classmethod
    def of(cls, root: Path, work: Path) -> Folders:
        root = Path(root).resolve()
        return cls(
            root / "data/records",
            root / "models/autoencoder",
            root / "models/clip",
            root / "data/source/prompts.json",
            work,
        )

    @property
    def root(self) -> Path:
        """The workspace."""
        return self.records.parents[1]

    @property
    def probe(self) -> Path:
        """The probe's scenes, which are there where scenes were drawn."""
        return self.prompts.with_name(PROBE)

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints" / self.part

    @property
    def samples(self) -> Path:
        return self.work / "samples" / self.part

    @property
    def events(self) -> Path:
        """Lines of JSON by which rank 0 tells the driver how it goes."""
        return self.work / "events.jsonl"


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker is told. Plain values: it crosses process and machine borders."""

    config: Config
    folders: Folders
    tracking_uri: str = ""
    run_id: str | None = None
    journal: Path | None = None  # of the tracker; None: nothing is tracked
    revisions: list[dict[str, Any]] = field(default_factory=list)  # that made the weights so far, this run's last
    git_revision: str = "unknown"

    @property
    def system(self) -> System:
        return find_system(self.config.model.system)

    @property
    def part(self) -> Part:
        return self.system.part(self.folders.part) if self.folders.part else self.system.parts[0]

    @property
    def loop(self) -> LoopConfig:
        """The part's own share of train.loop."""
        return loop_of(self.config.train.loop, self.part.share)

    def trained(self, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(groups, meta) of a part that this one needs, from its last checkpoint."""
        from raphael.base.checkpoint.home import CheckpointHome

        assert part in self.part.needs, f"{self.part.name} does not name {part} in its needs"
        return CheckpointHome(replace(self.folders, part=part).checkpoints).newest()


def loop_of(loop: LoopConfig, share: float) -> LoopConfig:
    """The loop of a part: its images are that share of all, in whole batches, and what is counted in them with it."""
    if share == 1.0:
        return loop

    def of(images: int) -> int:
        return round(images * share / loop.batch_size) * loop.batch_size

    scaled = {name: of(getattr(loop, name)) for name in SCALED}
    return replace(loop, **{**scaled, "num_images": max(loop.batch_size, scaled["num_images"])})


@dataclass(frozen=True)
class Training:
    """One part of a system, ready for the one loop; made in every worker.

    objective: what is minimised (raphael/train/loop.py). records: the data.
    arrange(data): the records to train on in the part's own order, with lines for a person. grid(): a PIL image of what
    it generates now, or None: nothing is sampled. flops(): of a training step of one image. beside(heldout, world): the
    held-out losses with what is measured beside them.
    """

    objective: nn.Module
    records: Records
    arrange: Callable[[Any], tuple[Any, list[str]]] = lambda data: (data, [])
    grid: Callable[[], Any] | None = None
    flops: Callable[[], float] | None = None
    beside: Callable[[Heldout, World], Any] = lambda heldout, world: heldout


class Events:
    """Rank 0's line to the driver: a file, because it needs nobody to listen and outlives both ends."""

    def __init__(self, path: Path):
        self.path = path
        self.written_s = 0.0

    def write(self, event: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def progress(self, images: int) -> None:
        if time.monotonic() - self.written_s >= 0.5:
            self.written_s = time.monotonic()
            self.write({"images": images})


def decisive(config: Config) -> dict[str, Any]:
    """What of the section `train` can change the weights of any system: the loop, its seed, and what it keeps out."""
    train = config.train
    settings = {name: getattr(train, name) for name in ("seed", "num_heldout", "patience", "init_sha256")}
    lora = {"lora": to_dict(train.lora)} if train.lora.rank else {}
    return {**settings, **lora, "loop": {**train.loop.decisive(), **pace(train)}}


def pace(train: TrainConfig) -> dict[str, Any]:
    """What of the pace of measuring can change weights: where a training may end early, that of the held-out loss."""
    return {"heldout_every_images": train.loop.heldout_every_images} if train.patience else {}


def about(job: TrainingJob, records: Records) -> dict[str, Any]:
    """What a checkpoint says of its making."""
    config = job.config
    return {
        "git_revision": job.revisions[-1]["git_revision"] if job.revisions else "unknown",
        "revisions": job.revisions,
        "records_sha256": records.sha256,
        "config": {
            "picture": to_dict(config.picture),
            "preset": to_dict(config.model.load()),
            "train": to_dict(config.train),
        },
    }
