"""The stage `train`: encoded pictures -> models/raphael, a folder that draws by itself.

Training is done by Ray Train workers (train.num_workers) or in this process (0). Kill it at any moment: the same
command goes on from the newest checkpoint, in the same MLflow run, and ends in the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from raphael.config import Config
from raphael.stage import Stage, StageError, main, read_json, write_json
from raphael.strict import to_dict

if TYPE_CHECKING:
    from raphael.stage import Progress
    from raphael.train.denoiser import Folders, Job

REPORTED_DIGITS = 6  # of losses, in the report: what a person compares


def run(config: Config, stage: Stage) -> None:
    from raphael import tracking
    from raphael.checkpoint_home import CheckpointHome
    from raphael.registry import register_model

    check_machine(config)
    folders = open_folders(config, stage)
    job = start_run(config, stage, folders)
    tracker = tracking.MlflowTracker(job.tracking_uri, job.run_id, job.journal)
    with tracking.closing(tracker):
        with stage.progress(config.train.loop.num_images, "images") as bar:
            work(job, Watcher(job, bar))
        groups, meta = CheckpointHome(folders.checkpoints).newest()
        export = write_export(config, stage, folders, groups, meta)
        sha256, parameters = export
        published = stage.publish(folders.work / "export", "models/raphael")
        tracking.remember_run(stage.root, sha256, job.tracking_uri, job.run_id)
        tracker.artifact(published / "curves.json")
        facts = {"images_seen": meta["images_seen"], "preset": config.model.preset, "parameters": parameters}
        version = register_model(tracker, config.tracking.experiment, published, sha256, facts)
    stage.timings["images_per_s"] = rates(folders)
    write_report(stage, meta, parameters)
    if version is not None:
        print(
            f"train: version {version} of {config.tracking.experiment} in MLflow's registry "
            f"({tracking.public(job.tracking_uri)})"
        )


def open_folders(config: Config, stage: Stage) -> Folders:
    """Check that the inputs are there and find this training's own work folder."""
    from raphael.manifest import read_manifest
    from raphael.records import FORM
    from raphael.train.denoiser import Folders

    places = Folders.of(stage.root, stage.root)
    for path in (places.records, places.autoencoder, places.clip, places.prompts):
        if not path.exists():
            raise StageError(
                f"{path.relative_to(stage.root)}: absent; run the stages before this one "
                "(dvc repro train, or make demo)"
            )
    settings = {"picture": to_dict(config.picture), "train": decisive(config)}
    settings |= {"preset": to_dict(config.model.load()), "drawing": to_dict(config.generate)}
    records = read_manifest(places.records, FORM)["sha256"]
    workdir = stage.workdir(settings, records, places.autoencoder, places.clip, places.prompts)
    return Folders.of(stage.root, workdir)


def decisive(config: Config) -> dict[str, Any]:
    """What of `train` makes another training; with the rest changed, work goes on where it was.

    The rest: how the work is spread (the update is the same up to rounding), and how often something is logged, saved
    or drawn. num_images belongs to it where the rate is constant: then going on is what one longer run does.
    """
    from raphael.train.state import FREE

    settings = to_dict(config.train)
    for name in ("parallel", "num_workers", "use_gpu", "init_from"):  # where it lies; init_sha256 says what it is
        del settings[name]
    keep = () if config.train.loop.schedule == "constant" else ("num_images",)
    settings["loop"] = {name: value for name, value in settings["loop"].items() if name not in FREE or name in keep}
    return settings


def check_machine(config: Config) -> None:
    """Raises StageError where the settings ask for GPUs that are not there: Ray would wait for them for ever."""
    import torch

    wanted, found = max(1, config.train.num_workers), torch.cuda.device_count()
    if config.train.use_gpu and found < wanted and not os.environ.get("RAY_ADDRESS"):
        raise StageError(
            f"train.use_gpu: got true with {wanted} worker{'s' if wanted > 1 else ''}, but torch {torch.__version__} "
            f"sees {found} GPUs here, expected one a worker; set train.use_gpu to false, or lower train.num_workers"
        )


def start_run(config: Config, stage: Stage, folders: Folders) -> Job:
    """The MLflow run: the one this training has begun already, or a new one."""
    from raphael import tracking
    from raphael.manifest import read_manifest
    from raphael.records import FORM
    from raphael.train.denoiser import Job

    uri, file = tracking.resolve_uri(config, stage.root), folders.work / "run.json"
    known = read_json(file) if file.exists() else {}
    run_id = known.get("run_id") if known.get("uri") == tracking.public(uri) else None
    if run_id is None or not tracking.reopen_run(uri, run_id, stage.root):
        name = f"{config.model.preset}-{folders.work.name[:8]}"
        run_id = tracking.create_run(config, stage.root, name)
        write_json(file, {"uri": tracking.public(uri), "run_id": run_id})
        tracker = tracking.MlflowTracker(uri, run_id, tracking.journal_of(stage.root, run_id))
        tracker.dataset("records", read_manifest(folders.records, FORM)["sha256"], "data/records", "training")
        for name, digest in tracking.dvc_hashes(stage.root).items():
            tracker.dataset(name, digest, name, "lineage")
    revision = tracking.git_revision(stage.root)
    return Job(config, folders, uri, run_id, tracking.journal_of(stage.root, run_id), revision)


def work(job: Job, watcher: Watcher) -> None:
    """Train to the end, in this process or by Ray workers."""
    job.folders.events.unlink(missing_ok=True)
    job.folders.events.touch()
    try:
        _work(job, watcher)
    finally:
        watcher()  # what was said last: where a stopped training goes on, say


def _work(job: Job, watcher: Watcher) -> None:
    from raphael.train.denoiser import train_denoiser

    train = job.config.train
    if train.num_workers == 0:
        from raphael.train.loop import World

        with watcher.in_background():
            train_denoiser(job, World(device="cuda" if train.use_gpu else "cpu"))
    else:
        from raphael.train.ray_trainer import Cluster, fit

        name = f"train-{job.folders.work.name}-{train.num_workers}"  # holds the hash of settings and data
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
        fit(train_denoiser, job, cluster, watcher, lambda line: watcher.print(f"train: {line}"))


class Watcher:
    """Follows rank 0's events file: moves the bar and prints a line for every point logged. Call it now and then."""

    def __init__(self, job: Job, bar: Progress):
        self.path, self.bar, self.offset, self.images = job.folders.events, bar, 0, 0
        self.total, self.started_s, self.first = job.config.train.loop.num_images, time.monotonic(), None

    def __call__(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half-written
        self.offset += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            if "say" in event:
                self.print(f"train: {event['say']}")
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
        losses = [name for name in ("loss", "denoise", "edge", "balance") if f"train/{name}" in point]
        shown = "  ".join(f"{name} {point[f'train/{name}']:.4f}" for name in losses)
        rate, left_s = point["train/images_per_s"], point["train/time_left_s"]
        left = f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
        return f"train: {images:,}/{self.total:,} images  {shown}  {rate:.1f} images/s  {left}"

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


def write_export(
    config: Config, stage: Stage, folders: Folders, groups: dict[str, Any], meta: dict[str, Any]
) -> tuple[str, int]:
    """Put the pipeline folder together in work/.../export. Returns (sha256 of its manifest, number of parameters)."""
    from raphael.checkpoint import checkpoint_sha256, write_checkpoint
    from raphael.manifest import read_manifest
    from raphael.records import FORM
    from raphael.tracking import git_revision

    raw = unet_weights(groups["model"])
    averaged = {**raw, **unet_weights(groups["ema"])}
    preset = config.model.load()
    about = {
        "unet": to_dict(preset.unet),
        "diffusion": to_dict(preset.diffusion),
        "picture": to_dict(config.picture),
        "mean_over": preset.unet.mean_over,
        "preset": config.model.preset,
        "seed": config.train.seed,
        "git_revision": git_revision(stage.root),
        "records_sha256": read_manifest(folders.records, FORM)["sha256"],
        "images_seen": meta["images_seen"],
    }
    if config.train.init_from:
        about["init_sha256"] = config.train.init_sha256
    export = folders.work / "export"
    further = {name: {**raw, **unet_weights(groups[name])} for name in config.train.loop.averages if name != "ema"}
    write_checkpoint(export, {"ema": averaged, **further, "raw": raw}, about)
    shutil.copytree(folders.autoencoder, export / "autoencoder")
    shutil.copytree(folders.clip, export / "text_encoder")
    write_json(export / "curves.json", meta["history"])
    if "heldout" in meta:
        write_json(export / "heldout.json", meta["heldout"])
    (export / "samples").mkdir()
    for path in sorted(folders.samples.rglob("[0-9]*.png")):
        target = export / "samples" / path.relative_to(folders.samples)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(path, target)
    return checkpoint_sha256(export), sum(tensor.numel() for tensor in raw.values())


def unet_weights(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if name.startswith("unet.")}


def write_report(stage: Stage, meta: dict[str, Any], parameters: int) -> None:
    last = {name: round(value, REPORTED_DIGITS) for name, value in meta["history"][-1].items()}
    loads = {name: value for name, value in last.items() if "_load/" in name or "/cover/" in name}
    losses = {name: value for name, value in last.items() if name not in loads and name != "images"}
    images = meta["images_seen"]
    stage.report(images, images, unit="images seen", parameters=parameters, final=losses, experts=loads)


def rates(folders: Folders) -> list[float]:
    """Images per second at each point logged by this process' training."""
    events = [json.loads(line) for line in folders.events.read_text(encoding="utf-8").splitlines()]
    return [round(event["point"]["train/images_per_s"], 2) for event in events if "point" in event]


if __name__ == "__main__":
    raise SystemExit(main("train", run, __doc__))
