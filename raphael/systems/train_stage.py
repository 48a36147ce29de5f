"""The stage `train`: encoded images -> models/raphael, a folder that generates by itself.

Training is done by Ray Train workers (train.num_workers) or in this process (0). Kill it at any moment: the same
command resumes from the newest checkpoint, in the same MLflow run, and ends in the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raphael.base import devices
from raphael.base.config.params import Config
from raphael.base.config.preset import NO_PRESET
from raphael.base.config.systems import find_system
from raphael.base.cores.threads import available
from raphael.base.stage import Stage, StageError, read_json, write_json
from raphael.base.strict import ConfigError
from raphael.systems import module_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from raphael.base.stage import Progress
    from raphael.systems.export import Trained
    from raphael.systems.job import Folders, TrainingJob

REPORTED_DIGITS = 6  # of losses, in the report: what a person compares


def run(config: Config, stage: Stage) -> None:
    from raphael.base.tracking import tracker as tracking
    from raphael.base.tracking.registry import register_model
    from raphael.systems.export import finished, write_export

    asked, config = config.train.num_workers, with_workers(config)
    if asked == "auto":
        print(f"train: num_workers auto: {config.train.num_workers or 'this process, no'} workers", flush=True)
    stage.timings["workers"] = config.train.num_workers
    check_machine(config)  # and that its settings of the device agree
    folders = open_folders(config, stage)
    job = start_run(config, stage, folders)
    tracker = tracking.MlflowTracker(job.tracking_uri, job.run_id, job.journal)
    with tracking.closing(tracker):
        stage.timings["images_per_s"] = train_parts(job, stage)
        trained = finished(config, folders)
        sha256, parameters = write_export(config, folders, trained)
        published = stage.publish(folders.work / "export", "models/raphael")
        tracking.remember_run(stage.root, sha256, job.tracking_uri, job.run_id)
        for curves in sorted(published.glob("**/curves.json")):
            tracker.artifact(curves, None if curves.parent == published else curves.parent.name)
        images = sum(meta["images_seen"] for _, meta in trained.values())
        facts = {"images_seen": images, "preset": config.model.preset, "parameters": parameters}
        version = register_model(tracker, config.tracking.experiment, published, sha256, facts)
    write_report(config, stage, trained, parameters)
    if version is not None:
        print(
            f"train: version {version} of {config.tracking.experiment} in MLflow's registry "
            f"({tracking.public(job.tracking_uri)})"
        )


def train_parts(job: TrainingJob, stage: Stage) -> list[float]:
    """The system's parts, one after another: one that is done already says so at once. Returns the rates at each point
    logged by this process, in images per second."""
    from raphael.systems.export import folders_of

    found = []
    for part in job.system.trained(job.config):
        folders = folders_of(job.folders, job.config, part.name)
        revisions = revisions_of(stage, folders, job.git_revision)
        each = replace(job, folders=folders, revisions=revisions)
        with stage.progress(each.loop.num_images, f"images of {part.name}" if folders.part else "images") as bar:
            work(each, Watcher(each, bar))
        found += rates(folders)
    return found


def open_folders(config: Config, stage: Stage) -> Folders:
    """Check that the inputs are there and find this training's own work folder."""
    from raphael.base.manifest import read_manifest
    from raphael.base.records import CAPTIONS, FORM, Records
    from raphael.systems.job import Folders

    system, places = find_system(config.model.system), Folders.of(stage.root, stage.root)
    for path in (places.records, *(places.root / name for name in system.inputs)):
        if not path.exists():
            raise StageError(
                f"{path.relative_to(stage.root)}: absent; run the stages before this one "
                "(dvc repro train, or make demo)"
            )
    stage.expect_whole(places.records / CAPTIONS)
    Records(places.records).require(system.needs(config), config.file)
    identity = module_of(system.name, "training").identity(config, places)
    records = read_manifest(places.records, FORM)["sha256"]
    workdir = stage.workdir(*identity, records, *(places.root / name for name in system.carries.values()))
    return Folders.of(stage.root, workdir)


def with_workers(config: Config) -> Config:
    """With a number for `train.num_workers: auto`. Raises ConfigError on a cluster: its room is not known."""
    import torch

    from raphael.train.start import workers_for

    if config.train.num_workers != "auto":
        return config
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "train.num_workers: got auto with RAY_ADDRESS set, expected a number of workers for the cluster"
        )
    gpus = torch.cuda.device_count() if config.train.use_gpu or devices.resolve(config.device).type != "cpu" else 0
    count = workers_for(config.train, available(), gpus)
    return replace(config, train=replace(config.train, num_workers=count))


def device_of(config: Config) -> torch.device:
    """What the training computes on. Raises ConfigError where `device` and `train.use_gpu` say two things.

    Ray's workers have a GPU each or none, which use_gpu says; `device` must not deny it. Without workers `device`
    decides, and use_gpu: true only insists on a GPU. On a cluster the GPUs are the workers', so this machine is not
    asked for one.
    """
    import torch

    train = with_workers(config).train
    if train.use_gpu and config.device == "cpu":
        raise ConfigError("device: got cpu with train.use_gpu true, expected auto or cuda, or train.use_gpu: false")
    if train.use_gpu:
        return torch.device(devices.GPU)
    if train.num_workers == 0:
        return devices.resolve(config.device)
    if config.device == "cuda":
        raise ConfigError(
            f"device: got cuda with train.use_gpu false and num_workers {train.num_workers}, expected use_gpu: true, "
            "which gives each worker a GPU, or num_workers: 0, which trains in this process; or device: auto"
        )
    return torch.device("cpu")


def check_machine(config: Config) -> None:
    """Raises StageError where the settings ask for GPUs that are not there: Ray would wait for them for ever."""
    import torch

    device_of(config)
    wanted, found = max(1, config.train.num_workers), torch.cuda.device_count()
    if config.train.use_gpu and found < wanted and not os.environ.get("RAY_ADDRESS"):
        raise StageError(
            f"train.use_gpu: got true with {wanted} worker{'s' if wanted > 1 else ''}, but torch {torch.__version__} "
            f"sees {found} GPUs here, expected one a worker; set train.use_gpu to false, or lower train.num_workers"
        )


def start_run(config: Config, stage: Stage, folders: Folders) -> TrainingJob:
    """The MLflow run: the one this training has begun already, or a new one."""
    from raphael.base.manifest import read_manifest
    from raphael.base.records import FORM
    from raphael.base.tracking import tracker as tracking
    from raphael.systems.job import TrainingJob

    uri, file = tracking.resolve_uri(config, stage.root), folders.work / "run.json"
    known = _known_run(file)
    run_id = known.get("run_id") if known.get("uri") == tracking.public(uri) else None
    if run_id is None or not tracking.reopen_run(uri, run_id, stage.root):
        system, preset = config.model.system, config.model.preset
        name = f"{system if preset == NO_PRESET else preset}-{folders.work.name[:8]}"
        run_id = tracking.create_run(config, stage.root, name)
        write_json(file, {"uri": tracking.public(uri), "run_id": run_id})
        tracker = tracking.MlflowTracker(uri, run_id, tracking.journal_of(stage.root, run_id))
        tracker.dataset("records", read_manifest(folders.records, FORM)["sha256"], "data/records", "training")
        for name, digest in tracking.dvc_hashes(stage.root).items():
            tracker.dataset(name, digest, name, "lineage")
        if config.train.init_from:
            tracker.dataset("base", config.train.init_sha256, config.train.init_from, "lineage")
        if config.source.is_local and config.source.fingerprint:
            tracker.dataset("images", config.source.fingerprint, config.source.path, "lineage")
    revision = tracking.git_revision(stage.root)
    return TrainingJob(config, folders, uri, run_id, tracking.journal_of(stage.root, run_id), git_revision=revision)


def _known_run(file: Path) -> dict[str, Any]:
    """What the work folder says of its run; a file that a power cut left empty is one line, and a new run begins."""
    try:
        return read_json(file) if file.exists() else {}
    except StageError as error:
        print(f"train: {error.args[0].split(';')[0]}: a new MLflow run goes on with this training", flush=True)
        return {}


def revisions_of(stage: Stage, folders: Folders, revision: str) -> list[dict[str, Any]]:
    """By which code this training was begun and continued, in order, this run's last: for each the images seen by then,
    git's revision, the stage's version and the digest of its code. A run with the code of the one before adds nothing.
    """
    from raphael.base.checkpoint.folder import Stored
    from raphael.base.checkpoint.home import CheckpointHome

    before, images = [], 0
    if checkpoints := CheckpointHome(folders.checkpoints).all():
        meta = Stored(checkpoints[-1]).meta
        before, images = meta.get("about", {}).get("revisions", []), meta["images_seen"]
    code = stage.code
    mine = {"git_revision": revision, "version": code and code.version, "code": code and code.digest}
    if before and mine.items() <= before[-1].items():
        return before
    return [*before, {"from_images": images, **mine}]


def work(job: TrainingJob, watcher: Watcher) -> None:
    """Train to the end, in this process or by Ray workers."""
    job.folders.events.unlink(missing_ok=True)
    job.folders.events.touch()
    try:
        _work(job, watcher)
    finally:
        watcher()  # what was said last: where a stopped training resumes, say


def _work(job: TrainingJob, watcher: Watcher) -> None:
    from raphael.systems.worker import train_part

    train = job.config.train
    if train.num_workers == 0:
        from raphael.train.loop import World

        with watcher.in_background():
            train_part(job, World(device=str(device_of(job.config))))
    else:
        from raphael.train.distributed.ray_trainer import Cluster, fit

        part = f"{job.folders.part}-" if job.folders.part else ""
        name = f"train-{part}{job.folders.work.name}-{train.num_workers}"  # holds the hash of settings and data
        cluster = Cluster(
            train.num_workers,
            train.use_gpu,
            name,
            job.folders.work / "ray",
            max_failures=train.parallel.max_failures,
            timeout_s=train.parallel.collective_timeout_s,
            min_workers=train.parallel.min_workers,
            placement_timeout_s=train.parallel.placement_timeout_s,
            batch_size=train.loop.batch_size,
            checkpoints=job.folders.checkpoints,
        )
        fit(train_part, job, cluster, watcher, lambda line: watcher.print(f"train: {line}"))


class Watcher:
    """Follows rank 0's events file: moves the bar and prints a line for every point logged. Call it now and then."""

    def __init__(self, job: TrainingJob, bar: Progress):
        self.path, self.bar, self.offset, self.images = job.folders.events, bar, 0, 0
        self.total, self.started_s, self.first = job.loop.num_images, time.monotonic(), None
        self.part = job.part
        self.name = f"train: {job.folders.part}" if job.folders.part else "train"

    def __call__(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half-written
        self.offset += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            if "say" in event:
                self.print(f"{self.name}: {event['say']}")
            if "images" in event:
                self.move(event["images"])
            if "point" in event:
                self.print(self.describe(event["images"], event["point"]))

    def move(self, images: int) -> None:
        if self.first is None:
            self.first, self.started_s = images, time.monotonic()
            self.bar.bar.initial = images  # the rate counts what this process did
        self.bar.update(min(images, self.total) - self.bar.bar.n)

    def describe(self, images: int, point: dict[str, float]) -> str:
        losses = [name for name in self.part.losses if f"train/{name}" in point]
        shown = "  ".join(f"{name} {point[f'train/{name}']:.4f}" for name in losses)
        rate, left_s = point["train/images_per_s"], point["train/time_left_s"]
        left = f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
        return f"{self.name}: {images:,}/{self.total:,} images  {shown}  {rate:.1f} images/s  {left}"

    def print(self, line: str) -> None:
        self.bar.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def in_background(self) -> _Background:
        return _Background(self)


class _Background:
    """Call the watcher twice a second from a thread, while the main thread trains."""

    def __init__(self, watcher: Watcher):
        import threading

        self.watcher, self.done = watcher, threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        while not self.done.wait(0.5):
            self.watcher()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def write_report(config: Config, stage: Stage, trained: Trained, parameters: int) -> None:
    system, parts = find_system(config.model.system), {}
    for name, (_, meta) in trained.items():
        last = {key: round(value, REPORTED_DIGITS) for key, value in meta["history"][-1].items() if key != "images"}
        parts[name] = system.reported(last)
    images = {name: meta["images_seen"] for name, (_, meta) in trained.items()}
    facts = {"parts": {name: {"images": images[name], **parts[name]} for name in parts}}
    facts, total = facts if len(parts) > 1 else next(iter(parts.values())), sum(images.values())
    stage.report(total, total, unit="images seen", parameters=parameters, **facts)


def rates(folders: Folders) -> list[float]:
    """Images per second at each point logged by this process' training."""
    events = [json.loads(line) for line in folders.events.read_text(encoding="utf-8").splitlines()]
    return [round(event["point"]["train/images_per_s"], 2) for event in events if "point" in event]
