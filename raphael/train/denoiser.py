"""The denoiser's training, put together from the stage's folders: what one worker needs, whoever started it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.config import Config, TrainConfig
from raphael.records import EDGES, MOMENTS, TOKEN_IDS, Records
from raphael.stage import StageError, read_json
from raphael.strict import to_dict

if TYPE_CHECKING:
    from torch import Tensor

    from raphael.objectives.denoising import DenoisingObjective
    from raphael.preset import Preset
    from raphael.sampling import Parts
    from raphael.train.loop import World


@dataclass(frozen=True)
class Folders:
    """Absolute places: what the stage reads, and `work`, where unfinished work lies."""

    records: Path
    autoencoder: Path
    clip: Path
    prompts: Path
    work: Path

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
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.work / "samples"

    @property
    def events(self) -> Path:
        """Lines of JSON by which rank 0 tells the driver how it goes."""
        return self.work / "events.jsonl"


@dataclass(frozen=True)
class Job:
    """Everything a worker is told. Plain values: it crosses process and machine borders."""

    config: Config
    folders: Folders
    tracking_uri: str = ""
    run_id: str | None = None
    journal: Path | None = None  # of the tracker; None: nothing is tracked
    git_revision: str = "unknown"


def build_denoising(config: Config, folders: Folders) -> tuple[DenoisingObjective, Records]:
    """The objective, its U-Net initialised from train.seed, and its data. Raises StageError where parts do not fit."""
    import torch

    from raphael.diffusion.denoiser import TextCondition
    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder
    from raphael.net.unet import UNet
    from raphael.objectives.denoising import DenoisingObjective, LatentScale
    from raphael.train.start import begin_from

    preset = config.model.load()
    records = Records(folders.records)
    autoencoder = load_autoencoder(folders.autoencoder)
    text_encoder = load_text_encoder(folders.clip).eval().requires_grad_(False)
    check_fit(config, records, text_encoder.dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        unet = UNet(preset.unet).to(memory_format=torch.channels_last)  # convolutions on a CPU: 8 % faster
    if config.train.init_from:
        begin_from(unet, config.train, preset)

    def encode(token_ids: Tensor) -> TextCondition:
        # a function, so that the frozen encoder is no part of what is trained and saved
        encoding = text_encoder.to(token_ids.device).encode(token_ids)
        return TextCondition(encoding.context, encoding.mask)

    empty = text_encoder.tokenize([""])[0]
    scale = LatentScale(autoencoder.scaling_factor, autoencoder.shift)
    objective = DenoisingObjective(unet, encode, empty, preset.diffusion, config.train, scale)
    return objective, records


def training_flops(preset: Preset, records: Records) -> float:
    """Floating-point operations of a training step of one image, the mean over records: three forwards of the U-Net.

    Space-MoE is counted at full cover, edge heads and text encoder are not.
    """
    from raphael.generate.anatomy import unet_flops

    factor = 2 ** (len(preset.vae.channels) - 1)  # the preset's own, which unet_flops divides by
    counted = [bucket for bucket in records.buckets if bucket.count]
    total = sum(
        bucket.count * unet_flops(preset, tuple(factor * side for side in bucket.fields[MOMENTS][1][1:]))
        for bucket in counted
    )
    return 3.0 * total / len(records)


def check_fit(config: Config, records: Records, context_dim: int) -> None:
    """Whether records, encoders and preset belong together. Raises StageError, one line."""
    unet, where = config.model.load().unet, f"preset {config.model.preset}"
    if not len(records):
        raise StageError(
            f"{records.folder}: got no records, expected at least one; see reports/encode.json and those before it"
        )
    for name in (MOMENTS, TOKEN_IDS, EDGES):
        if name not in records.fields:
            raise StageError(
                f"{records.folder}: got fields {', '.join(records.fields)}, expected {name}; run the stage encode"
            )
    picture = to_dict(config.picture)
    if records.facts.get("picture") != picture:
        raise StageError(
            f"{records.folder}: got pictures of {records.facts.get('picture')}, expected {picture}; run encode again"
        )
    for what, got, key, expected in (
        ("latents have channels", records.fields[MOMENTS][1][0] // 2, "latent_channels", unet.latent_channels),
        ("text vectors have width", context_dim, "context_dim", unet.context_dim),
        ("texts have tokens", records.fields[TOKEN_IDS][1][0], "context_length", unet.context_length),
    ):
        if got != expected:
            raise StageError(
                f"{where}: unet.{key}: got {expected}, but the {what} {got}; set it in the preset to {got}"
            )


def train_denoiser(job: Job, world: World) -> dict[str, Any]:
    """Train as one of `world`'s workers, to the end, going on from the newest checkpoint. Returns the loop's result."""
    from raphael.tracking import MlflowTracker, NullTracker
    from raphael.train.heldout import Heldout, split
    from raphael.train.loop import Hooks, train

    settings, world = job.config.train, replace(world, parallel=job.config.train.parallel)
    chief = world.rank == 0
    objective, records = build_denoising(job.config, job.folders)
    tracked = chief and job.journal is not None
    tracker = MlflowTracker(job.tracking_uri, job.run_id, job.journal) if tracked else NullTracker()
    events = Events(job.folders.events)

    def draw(images: int, weights: str) -> None:
        grid = draw_grid(job, objective)
        if not chief:
            return
        folder = job.folders.samples / (weights if weights != "ema" else "")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{images:06d}.png"
        grid.save(temporary)
        os.replace(temporary, folder / f"{images:06d}.png")
        tracker.image("samples/grid" if weights == "ema" else f"samples/{weights}", grid, images)

    data, out = split(records, settings.num_heldout)
    if chief:
        objective.flops_per_image = training_flops(job.config.model.load(), records)
    hooks = Hooks(
        on_log=lambda point, images: events.write({"point": point, "images": images}),
        on_sample=draw,
        sample_weights=settings.sample_weights,
        heldout=Heldout(objective, out, world, settings.loop.precision) if out is not None else None,
        enough=patience(settings),
        progress=events.progress,
        say=lambda line: events.write({"say": line}),
        about=about(job, records) if chief else {},
        best_by=judged_by(settings),
    )
    return train(
        objective,
        data,
        settings.loop,
        settings.seed,
        folder=job.folders.checkpoints,
        tracker=tracker,
        world=world,
        hooks=hooks,
    )


def patience(settings: TrainConfig) -> Callable[[list[dict[str, float]]], bool]:
    """When the held-out loss had its chances."""
    from raphael.train.start import Patience

    if not settings.patience:
        return lambda points: False
    return Patience(judged_by(settings), settings.patience)


def judged_by(settings: TrainConfig) -> str:
    """The held-out loss of the averaged weights; of the last ones, where there is no average."""
    return f"heldout/{'ema' if settings.loop.ema_decay else 'raw'}/denoise"


def about(job: Job, records: Records) -> dict[str, Any]:
    """What a checkpoint says of its making."""
    config = job.config
    return {
        "git_revision": job.git_revision,
        "records_sha256": records.sha256,
        "config": {
            "picture": to_dict(config.picture),
            "preset": to_dict(config.model.load()),
            "train": to_dict(config.train),
        },
    }


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


def sample_prompts(config: Config, prompts_file: Path) -> list[str]:
    """The fixed prompts of the grids: config's own, or held-out ones, of each suite in turn."""
    if config.train.sample_prompts:
        return list(config.train.sample_prompts)
    suites: dict[str, list[str]] = {}
    for entry in read_json(prompts_file)["prompts"]:
        suites.setdefault(entry["suite"], []).append(entry["prompt"])
    longest = max(map(len, suites.values()), default=0)
    turns = [prompts[i] for i in range(longest) for prompts in suites.values() if i < len(prompts)]
    if not turns:
        raise StageError(
            f"{prompts_file}: got no prompts, expected at least one; run the stage source, or set train.sample_prompts"
        )
    return list(dict.fromkeys(turns))[: config.train.num_sample_prompts]


def draw_grid(job: Job, objective: DenoisingObjective) -> Any:
    """A PIL grid of the fixed prompts, each picture from its own fixed seed, with the weights the objective has now."""
    from raphael.sampling import draw_images, image_grid, sampling_of

    config = job.config
    prompts = sample_prompts(config, job.folders.prompts)
    settings = sampling_of(config.generate)
    seeds = [(config.train.seed, index) for index in range(len(prompts))]
    images = draw_images(drawing_parts(job, objective), prompts, seeds, settings)
    return image_grid(list(images), columns=4, captions=prompts)


def drawing_parts(job: Job, objective: DenoisingObjective) -> Parts:
    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder
    from raphael.sampling import Parts

    device = next(objective.unet.parameters()).device
    autoencoder = load_autoencoder(job.folders.autoencoder).eval().to(device)
    tokenize: Callable[[list[str]], Tensor] = load_text_encoder(job.folders.clip).tokenize
    side = (
        job.config.picture.height_px // autoencoder.downsampling,
        job.config.picture.width_px // autoencoder.downsampling,
    )
    return Parts(
        unet=objective.unet,
        schedule=objective.schedule,
        prediction=objective.prediction,
        encode=lambda texts: objective.encode_text(tokenize(texts).to(device)),
        decode=autoencoder.decode,
        latent_shape=(autoencoder.latent_channels, *side),
    )
