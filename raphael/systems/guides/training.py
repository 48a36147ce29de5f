"""A guide's training beside a trained model: the same records, the same noise, what is diffused as the model has it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raphael.base.checkpoint.folder import write_checkpoint
from raphael.base.config.guide import GuideConfig
from raphael.base.precision import autocast
from raphael.base.randomness import SampleRng
from raphael.base.records import LABEL, MOMENTS, PIXELS, TOKEN_IDS, Records, latent_shape
from raphael.base.stage import StageError, write_json
from raphael.base.strict import load, read_yaml, to_dict
from raphael.net.noised.half import HalfUNet
from raphael.objectives.noised import NoisedClassifier, NoisedClip
from raphael.systems.export import weights_of
from raphael.systems.pipeline import Pipeline
from raphael.train.heldout import split
from raphael.train.loop import Hooks, World, train
from raphael.train.repeats import repeated

VERSION = 1  # of the code: raise it where an edit changes what comes out; it is part of a training's name
MEASURED = (0.2, 0.5, 0.8)  # shares of the timesteps at which the accuracy is told
GROUP = 64  # samples judged together: of so many captions a CLIP finds the image's own
NETWORK = "network"  # of the objective


@dataclass(frozen=True)
class GuideJob:
    """What to train, beside which model, on what. params: the file that made the records, for messages."""

    kind: str
    pipeline: Pipeline
    records: Records
    settings: GuideConfig
    params: str = "params.yaml"
    device: torch.device | str = "cpu"

    def identity(self) -> list[Any]:
        """What can change the weights."""
        settings = self.settings
        decisive = {**to_dict(settings), "loop": settings.loop.decisive()}
        return [VERSION, self.kind, self.pipeline.identity, self.records.sha256, decisive]


def settings_of(kind: str, pixels: bool, changes: dict[str, Any] | None = None) -> GuideConfig:
    """Of <kind>.yaml, over it dotted keys. Raises ConfigError. pixels: whether the model diffuses these."""
    file = Path(__file__).with_name(f"{kind}.yaml")
    data = read_yaml(file)
    data["network"].setdefault("patch_px", 2 if pixels else 1)  # a quarter of the time
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        inside = data
        for section in sections:
            inside = inside.setdefault(section, {}) if isinstance(inside, dict) else {}
        inside[name] = value
    return load(GuideConfig, data, f"{file.name} and --set" if changes else file.name)


def build(job: GuideJob) -> NoisedClassifier | NoisedClip:
    """The objective, its network initialised from the seed. Raises StageError where model and records do not fit."""
    pipeline, records, settings = job.pipeline, job.records, job.settings
    check_fit(job)
    channels, *sides = latent_shape(records.fields)
    shrink = pipeline.downsampling if PIXELS in records.fields else 1
    if job.kind == "classifier":
        embedding = len(records.facts[LABEL]["classes"])
    else:
        embedding = pipeline.embed_texts([""]).shape[1]
    last = settings.network.patch_px * 2 ** (len(settings.network.channels) - 1)
    side = max(1, max(sides) // shrink // last)
    sizes = {"latent_channels": channels, "embedding_dim": embedding, "pool_side": side}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = HalfUNet(replace(settings.network, **sizes)).to(memory_format=torch.channels_last)
    common = {"scale": pipeline.latent_scale, "shift": settings.timestep_shift, "shrink": shrink}
    if job.kind == "classifier":
        objective: Any = NoisedClassifier(network, pipeline.schedule, **common)
    else:
        encoder = pipeline.text_encoder
        objective = NoisedClip(
            network, pipeline.schedule, lambda ids: encoder.to(ids.device).encode(ids).pooled, **common
        )
    objective.settings = {"identity": job.identity()[:3]}  # a checkpoint of another model's guide is refused
    return objective


def check_fit(job: GuideJob) -> None:
    """Raises StageError, one line."""
    pipeline, records = job.pipeline, job.records
    if not len(records):
        raise StageError(f"{records.folder}: got no records, expected at least two; see reports/encode.json")
    if job.kind == "clip" and pipeline.text_space == Pipeline.text_space:
        raise StageError(
            f"--guide: got clip for a model of the system {pipeline.system}, which has no text encoder of its own; "
            "expected classifier"
        )
    records.require([(MOMENTS, PIXELS), LABEL if job.kind == "classifier" else TOKEN_IDS], job.params)
    picture, mine = records.facts.get("picture", {}), pipeline.meta["picture"]
    if picture.get("sizes_px") != mine.get("sizes_px", picture.get("sizes_px")):
        raise StageError(
            f"{records.folder}: got images of {picture.get('sizes_px')} px, expected the model's, {mine['sizes_px']}: "
            "name a model that was trained on such, or run encode again"
        )
    channels, got = pipeline.parts().latent_shape[0], latent_shape(records.fields)[0]
    factor = records.facts.get("autoencoder", {}).get("scaling_factor", pipeline.latent_scale[0])
    if (channels, pipeline.latent_scale[0]) != (got, factor):
        raise StageError(
            f"{records.folder}: got latents of {got} channels and factor {factor:.6g}, expected the model's, "
            f"{channels} and {pipeline.latent_scale[0]:.6g}: they are another autoencoder's; make them with this "
            "model's (autoencoder.pretrained, then run encode)"
        )


def train_guide(job: GuideJob, work: Path, hooks: Hooks = Hooks(), tracker: Any = None) -> Path:  # noqa: B008 (frozen)
    """Train to the end, resuming from the newest checkpoint in `work`; returns `work`/guide, a folder that
    `load_guide` reads. Bit for bit the same however often it was killed."""
    objective = build(job)
    data, out = split(job.records, job.settings.num_heldout)
    data = repeated(data, job.records.facts)
    outcome = train(
        objective,
        data,
        job.settings.loop,
        job.settings.seed,
        folder=work / "checkpoints",
        tracker=tracker,
        world=World(device=str(job.device)),
        hooks=hooks,
    )
    raw = objective.state_dict()
    ema = {**raw, **outcome["ema"]}
    kinds = {"raw": weights_of(raw, NETWORK), "ema": weights_of(ema, NETWORK)}
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.copy_(ema[name])
    about = described(job, objective)
    about |= {"images_seen": outcome["images"], "heldout": {} if out is None else measured(objective, out, job)}
    folder = work / "guide"
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, kinds, about)
    write_json(folder / "curves.json", outcome["history"])
    return folder


def described(job: GuideJob, objective: NoisedClassifier | NoisedClip) -> dict[str, Any]:
    """meta.json (guide.py says what stands there)."""
    pipeline, config = job.pipeline, objective.network.config
    about = {
        "guide": job.kind,
        "system": pipeline.system,
        "model": pipeline.identity,
        "space": pipeline.space,
        "network": to_dict(config),
        "diffusion": to_dict(pipeline.diffusion),
        "picture": {"sizes_px": [list(size) for size in job.records.facts["picture"]["sizes_px"]]},
        "seed": job.settings.seed,
        "records_sha256": job.records.sha256,
    }
    if job.kind == "classifier":
        return {**about, "classes": list(job.records.facts[LABEL]["classes"])}
    return {**about, "text": pipeline.text_space, "scale": float(objective.log_scale.detach().exp().clamp(max=100.0))}


@torch.no_grad()
def measured(objective: NoisedClassifier | NoisedClip, data: Any, job: GuideJob) -> dict[str, dict[str, float]]:
    """{timestep: {"accuracy", "hits", "n"}} on records that were kept out, each with noise of its own that is the same
    at every asking. Of a CLIP: of 64 captions the image's own is the nearest (the last group may have fewer)."""
    was, found = objective.training, {}
    objective.eval()
    first, groups = 0, []
    for count in data.bucket_counts:
        rows = np.arange(first, first + count)
        groups += [rows[start : start + GROUP] for start in range(0, count, GROUP)]
        first += count
    for share in MEASURED:
        hits = known = 0.0
        for rows in groups:
            batch = {name: torch.from_numpy(array).to(job.device) for name, array in data.batch(rows).items()}
            with autocast(job.settings.loop.precision, job.device):
                right, counted = objective.hits(batch, SampleRng(job.settings.seed, 0, rows), share)
            hits, known = hits + float((right * counted).sum()), known + float(counted.sum())
        t = float(objective.noise.timesteps(torch.tensor([share]))[0])
        accuracy = round(hits / known, 6) if known else None
        found[f"{t:g}"] = {"accuracy": accuracy, "hits": int(hits), "n": int(known)}
    objective.train(was)
    return found
