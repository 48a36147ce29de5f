"""DDPM's training, put together from the stage's folders."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import Config
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.images.growth import COLUMNS, fixed_prompts
from raphael.base.records import LABEL, PIXELS, Records
from raphael.base.stage import StageError
from raphael.base.strict import to_dict
from raphael.systems.ddpm.labels import classes_of
from raphael.systems.ddpm.system import prompts
from raphael.systems.job import Folders, Training, TrainingJob, decisive

if TYPE_CHECKING:
    from raphael.objectives.plain import PlainDenoising


def training(job: TrainingJob) -> Training:
    objective, records = build(job.config, job.folders)
    return Training(objective, records, grid=functools.partial(sample_grid, job, objective))


def build(config: Config, folders: Folders) -> tuple[PlainDenoising, Records]:
    """The objective, its U-Net initialised from train.seed, and its data. Raises StageError where parts do not fit."""
    import torch

    from raphael.diffusion.noise import noise_of
    from raphael.diffusion.prediction import prediction_of
    from raphael.net.plain import PlainBlock
    from raphael.net.unet import UNet
    from raphael.objectives.plain import PlainDenoising
    from raphael.systems.ddpm.labels import arranged, told
    from raphael.train.start import begin_from

    settings, records = config.model.load(), Records(folders.records)
    if not len(records):
        raise StageError(f"{records.folder}: got no records, expected at least one; see reports/encode.json")
    records.require([PIXELS, *([LABEL] if LABEL in config.encode.fields else [])], config.file)
    picture = to_dict(config.picture)
    if records.facts.get("picture") != picture:
        raise StageError(
            f"{records.folder}: got images of {records.facts.get('picture')}, expected {picture}; run encode again"
        )
    classes = classes_of(records.facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        unet = UNet(with_classes(settings.unet, len(classes)), PlainBlock).to(memory_format=torch.channels_last)
    if config.train.init_from:
        begin_from(unet, config.train, settings, "ddpm", functools.partial(arranged, classes))
    diffusion, say, how = settings.diffusion, functools.partial(told, len(classes)), config.training()
    noise, prediction = noise_of(diffusion), prediction_of(diffusion)
    return PlainDenoising(unet, noise, prediction, say, how.label_drop, how.timestep_shift), records


def with_classes(unet: PlainUNetConfig, num_classes: int) -> PlainUNetConfig:
    return replace(unet, vector_dim=num_classes)


def step_flops(config: Config) -> float:
    """Floating-point operations of a training step of one image: three forwards of the U-Net."""
    import torch

    from raphael.net.condition import Condition
    from raphael.net.plain import PlainBlock
    from raphael.net.unet import UNet
    from raphael.summary.model import count_flops

    settings, (height, width) = config.model.load().unet, config.picture.sizes_px[0]
    with torch.device("meta"):
        unet, x = UNet(settings, PlainBlock).eval(), torch.empty(1, settings.latent_channels, height, width)
        return 3.0 * count_flops(lambda: unet(x, torch.empty(1), Condition()))


def identity(config: Config, folders: Folders) -> list[Any]:
    # in one mapping, as the trainings have it that began when both stood in model.settings
    settings = {**to_dict(config.model.load()), **to_dict(config.training())}
    return [{"system": "ddpm", "settings": settings, "train": decisive(config)}]


def described(config: Config, folders: Folders) -> dict[str, Any]:
    classes = classes_of(Records(folders.records).facts)
    settings = config.model.load()
    return {
        "system": "ddpm",
        "unet": to_dict(with_classes(settings.unet, len(classes))),
        "diffusion": to_dict(settings.diffusion),
        "classes": list(classes),
        "picture": to_dict(config.picture),
        "seed": config.train.seed,
    }


def sample_grid(job: TrainingJob, objective: PlainDenoising) -> Any:
    """A PIL grid of the classes, each image from its own fixed seed, with the weights the objective has now."""
    from raphael.base.images.grid import image_grid
    from raphael.diffusion.sampling import Parts, generate_images, sampling_of
    from raphael.systems.ddpm.labels import named

    config, classes = job.config, classes_of(Records(job.folders.records).facts)
    train, entries = config.train, prompts({"classes": classes}, {})["prompts"]
    asked = fixed_prompts(train.sample_prompts, train.num_sample_prompts, entries)
    height, width = config.picture.sizes_px[0]
    device = next(objective.unet.parameters()).device
    parts = Parts(
        objective.unet,
        objective.schedule,
        objective.prediction,
        lambda names: named(classes, names, device),
        lambda images: images,
        (objective.unet.config.latent_channels, height, width),
    )
    seeds = [(train.seed, index) for index in range(len(asked))]
    images = generate_images(parts, asked, seeds, sampling_of(config.generate))
    return image_grid(list(images), columns=COLUMNS, captions=asked)
