"""The denoiser's training, put together from the stage's folders."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import Config
from raphael.base.images.growth import COLUMNS, fixed_prompts
from raphael.base.records import TOKEN_IDS, Records, latent_shape
from raphael.base.stage import StageError, read_json
from raphael.base.strict import to_dict
from raphael.systems.job import Folders, Training, TrainingJob
from raphael.systems.job import decisive as of_the_loop

if TYPE_CHECKING:
    from torch import Tensor

    from raphael.base.config.preset import Preset
    from raphael.diffusion.sampling import Parts
    from raphael.net.condition import Condition
    from raphael.objectives.denoising import DenoisingObjective
    from raphael.train.heldout import Heldout
    from raphael.train.loop import World
    from raphael.train.probing import Probed

SMALLEST_SHARE = (
    16  # of a preset's least size: an area of so many times less, two halvings of the side, is another task
)


def training(job: TrainingJob) -> Training:
    """The one part of a RAPHAEL."""
    objective, records = build_denoising(job.config, job.folders)

    def arrange(data: Any) -> tuple[Any, list[str]]:
        from raphael.train.phases import Phased, in_phases

        ordered = in_phases(data, job.config.training().phases, job.folders.records)
        return ordered, list(ordered.describe()) if isinstance(ordered, Phased) else []

    return Training(
        objective,
        records,
        arrange=arrange,
        grid=lambda: sample_grid(job, objective),
        flops=lambda: training_flops(job.config.model.load(), records),
        beside=lambda heldout, world: probed(job, objective, heldout, world),
    )


def identity(config: Config, folders: Folders) -> list[Any]:
    """What of the settings can change the weights."""
    preset = config.model.load()
    return [decisive(config), {"unet": to_dict(preset.unet), "diffusion": to_dict(preset.diffusion)}]


def decisive(config: Config) -> dict[str, Any]:
    """What of `train` can change its weights; with the rest changed, work resumes where it was.

    The rest: how the work is spread (the update is the same up to rounding), what is sampled meanwhile, and how
    often something is logged, saved, measured or sampled; but where a training may end early, the pace of its
    measuring counts.
    """
    own = to_dict(config.training())
    del own["num_probe"]
    if not own["phases"]:  # trainings that began before there were any stay where they are
        del own["phases"]
    return {**of_the_loop(config), **own}  # side by side: trainings that began when they stood so in `train`, too


def described(config: Config, folders: Folders) -> dict[str, Any]:
    """What the trained model's meta.json says of it. It names no system: those before there were several did not."""
    preset = config.model.load()
    return {
        "unet": to_dict(preset.unet),
        "diffusion": to_dict(preset.diffusion),
        "picture": to_dict(config.picture),
        "mean_over": preset.unet.mean_over,
        "preset": config.model.preset,
        "seed": config.train.seed,
    }


def build_denoising(config: Config, folders: Folders) -> tuple[DenoisingObjective, Records]:
    """The objective, its U-Net initialised from train.seed, and its data. Raises StageError where parts do not fit."""
    import torch

    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder
    from raphael.net.condition import Condition
    from raphael.net.moe.unet import RaphaelUNet
    from raphael.objectives.denoising import DenoisingObjective, LatentScale
    from raphael.train.start import begin_from

    preset = config.model.load()
    records = Records(folders.records)
    autoencoder = load_autoencoder(folders.autoencoder)
    text_encoder = load_text_encoder(folders.clip).eval().requires_grad_(False)
    check_fit(config, records, text_encoder.dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        unet = RaphaelUNet(preset.unet).to(memory_format=torch.channels_last)  # convolutions on a CPU: 8 % faster
    if config.train.init_from:
        begin_from(unet, config.train, preset)

    def encode(token_ids: Tensor) -> Condition:
        # a function, so that the frozen encoder is no part of what is trained and saved
        encoding = text_encoder.to(token_ids.device).encode(token_ids)
        return Condition(encoding.context, encoding.mask)

    empty = text_encoder.tokenize([""])[0]
    scale = LatentScale(autoencoder.scaling_factor, autoencoder.shift)
    objective = DenoisingObjective(unet, encode, empty, preset.diffusion, config.training(), scale)
    objective.settings["seed"] = config.train.seed  # a checkpoint of another one is refused
    return objective, records


def training_flops(preset: Preset, records: Records) -> float:
    """Floating-point operations of a training step of one image, the mean over records: three forwards of the U-Net.

    Space-MoE is counted at full cover, edge heads and text encoder are not.
    """
    from raphael.summary.model import unet_flops

    factor = 2 ** (len(preset.vae.channels) - 1)  # the preset's own, which unet_flops divides by
    counted = [bucket for bucket in records.buckets if bucket.count]
    total = sum(
        bucket.count * unet_flops(preset, tuple(factor * side for side in latent_shape(bucket.fields)[1:]))
        for bucket in counted
    )
    return 3.0 * total / len(records)


def step_flops(config: Config) -> float:
    """The same for an image of the first size, known from the settings."""
    from raphael.summary.model import unet_flops

    return 3.0 * unet_flops(config.model.load(), (config.picture.height_px, config.picture.width_px))


def check_fit(config: Config, records: Records, context_dim: int) -> None:
    """Whether records, encoders and preset belong together. Raises StageError, one line."""
    from raphael.objectives.denoising import needed_fields

    unet, where = config.model.load().unet, f"preset {config.model.preset}"
    if not len(records):
        raise StageError(
            f"{records.folder}: got no records, expected at least one; see reports/encode.json and those before it"
        )
    records.require(needed_fields(unet), config.file)
    picture = to_dict(config.picture)
    if records.facts.get("picture") != picture:
        raise StageError(
            f"{records.folder}: got images of {records.facts.get('picture')}, expected {picture}; run encode again"
        )
    _check_sizes(config, records)
    for what, got, key, expected in (
        ("latents have channels", latent_shape(records.fields)[0], "latent_channels", unet.latent_channels),
        ("text vectors have width", context_dim, "context_dim", unet.context_dim),
        ("texts have tokens", records.fields[TOKEN_IDS][1][0], "context_length", unet.context_length),
    ):
        if got != expected:
            raise StageError(
                f"{where}: unet.{key}: got {expected}, but the {what} {got}; set it in the preset to {got}"
                + (f", or model.settings: {{unet: {{{key}: {got}}}}}" if key == "latent_channels" else "")
            )


def _check_sizes(config: Config, records: Records) -> None:
    """Raises StageError where all records are far smaller than what the preset is meant for: a demo's images by a large
    network's settings. One size or two below, as a training begins, is no reason."""
    meant = config.model.load().sizes_px
    sizes = zip(config.picture.sizes_px, records.bucket_counts, strict=False)
    held = [size for size, count in sizes if count]
    largest, least = max(map(math.prod, held), default=0), min(map(math.prod, meant))
    if held and largest * SMALLEST_SHARE < least:
        said = ", ".join("x".join(map(str, size)) for size in held)
        raise StageError(
            f"{records.folder}: got images of {said}, expected some of about the sizes that the preset "
            f"{config.model.preset} is meant for, {'x'.join(map(str, meant[0]))} and its like; set picture.sizes_px in "
            f"{config.file} and run filter and encode, on images that large, or choose a smaller preset"
        )


def probed(job: TrainingJob, objective: DenoisingObjective, heldout: Heldout, world: World) -> Heldout | Probed:
    """The held-out losses, with the probe beside them where the settings ask for it and its scenes are there."""
    import torch

    from raphael.base.probe_set import read_probe_set
    from raphael.encoders.autoencoder import encode_images, load_autoencoder
    from raphael.encoders.text import load_text_encoder
    from raphael.train.probing import Probed

    count = job.config.training().num_probe
    if not count or not job.folders.probe.is_file():
        return heldout
    asked, picture = read_probe_set(job.folders.probe).take(count), job.config.picture
    with torch.random.fork_rng(devices=[]):  # a module's initial weights are drawn, then replaced
        autoencoder = load_autoencoder(job.folders.autoencoder).to(world.device)
        tokenize = load_text_encoder(job.folders.clip).tokenize
    latents = encode_images(autoencoder, asked.images[asked.rows], (picture.height_px, picture.width_px))

    def encode(texts: list[str]) -> Condition:
        return objective.encode_text(tokenize(texts).to(world.device))

    return Probed(heldout, objective, asked, latents, encode, world, job.config.train.loop.precision)


def sample_prompts(config: Config, prompts_file: Path) -> list[str]:
    """The fixed prompts of the grids: config's own, or held-out ones, of each suite in turn."""
    train, own = config.train, config.train.sample_prompts
    turns = fixed_prompts(own, train.num_sample_prompts, () if own else read_json(prompts_file)["prompts"])
    if not turns:
        raise StageError(
            f"{prompts_file}: got no prompts, expected at least one; run the stage source, or set train.sample_prompts"
        )
    return turns


def sample_grid(job: TrainingJob, objective: DenoisingObjective) -> Any:
    """A PIL grid of the fixed prompts, each image from its own fixed seed, with the weights the objective has now."""
    from raphael.base.images.grid import image_grid
    from raphael.diffusion.sampling import generate_images, sampling_of

    config = job.config
    prompts = sample_prompts(config, job.folders.prompts)
    settings = sampling_of(config.generate)
    seeds = [(config.train.seed, index) for index in range(len(prompts))]
    images = generate_images(sampling_parts(job, objective), prompts, seeds, settings)
    return image_grid(list(images), columns=COLUMNS, captions=prompts)


def sampling_parts(job: TrainingJob, objective: DenoisingObjective) -> Parts:
    from raphael.diffusion.sampling import Parts
    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder

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
