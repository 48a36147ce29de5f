"""Imagen's trainings, put together from the stage's folders: the base's and the upsampler's, each by the one loop."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import Config
from raphael.base.images.growth import COLUMNS, fixed_prompts
from raphael.base.records import PIXELS, TEXT, Records
from raphael.base.stage import StageError, read_json
from raphael.base.strict import to_dict
from raphael.systems.imagen.system import BASE, UPSAMPLER
from raphael.systems.job import Folders, Training, TrainingJob, decisive

if TYPE_CHECKING:
    from torch import nn

    from raphael.objectives.plain import PlainDenoising


def training(job: TrainingJob) -> Training:
    records, part = open_records(job.config, job.folders), job.part.name
    objective = build(job.config, part)
    draw = {BASE: sample_grid, UPSAMPLER: enlarged_grid}[part]
    return Training(objective, records, grid=functools.partial(draw, job, objective))


def open_records(config: Config, folders: Folders) -> Records:
    """The data. Raises StageError where it does not fit the settings."""
    records, unet = Records(folders.records), config.model.load().base.unet
    if not len(records):
        raise StageError(f"{records.folder}: got no records, expected at least one; see reports/encode.json")
    records.require([PIXELS, TEXT, "text_mask"], config.file)
    picture, expected = to_dict(config.picture), (unet.context_length, unet.context_dim)
    if records.facts.get("picture") != picture:
        raise StageError(
            f"{records.folder}: got images of {records.facts.get('picture')}, expected {picture}; run encode again"
        )
    if (got := records.fields[TEXT][1]) != expected:
        raise StageError(
            f"{records.folder}: got captions of (tokens, width) {got}, expected {expected}: model.settings."
            "base.unet.context_length and context_dim; set them and the upsampler's to what the text encoder gives"
        )
    return records


def networks(config: Config, part: str) -> nn.Module:
    """The network of a part, its weights drawn from train.seed, whatever the other part is."""
    import torch

    from raphael.net.efficient.unet import EfficientUNet
    from raphael.net.plain import PlainBlock
    from raphael.net.unet import UNet

    settings = config.model.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        if part == BASE:
            network: nn.Module = UNet(settings.base.unet, PlainBlock)
        else:
            network = EfficientUNet(settings.upsampler.unet, PlainBlock)
    return network.to(memory_format=torch.channels_last)


def build(config: Config, part: str) -> PlainDenoising:
    """The objective of a part with its network. Raises StageError for a training that begins from a model."""
    from raphael.diffusion.noise import noise_of
    from raphael.diffusion.prediction import prediction_of
    from raphael.objectives.plain import Enlarging, PlainDenoising
    from raphael.systems.texts import told

    if config.train.init_from:
        raise StageError(
            f"train.init_from: got {config.train.init_from!r} with model.system imagen, expected none: its parts begin "
            "from nothing"
        )
    settings, how = config.model.load(), config.training()
    own = settings.base if part == BASE else settings.upsampler
    given = networks(config, part), noise_of(own.diffusion), prediction_of(own.diffusion), told, how.text_drop
    factor = settings.upsampler.factor
    if part == BASE:
        return PlainDenoising(*given, how.base_shift, shrink=factor)
    return Enlarging(*given, how.upsampler_shift, factor=factor, highest=how.augmentation)


def step_flops(config: Config) -> float:
    """Floating-point operations of a training step of one image, the mean over the parts by their shares: three
    forwards of the network."""
    import torch

    from raphael.net.condition import Condition
    from raphael.summary.model import count_flops
    from raphael.systems.imagen.system import SYSTEM

    settings, (height, width) = config.model.load(), config.picture.sizes_px[0]
    base, factor, total = settings.base.unet, settings.upsampler.factor, 0.0
    sides = {BASE: (height // factor, width // factor), UPSAMPLER: (height, width)}
    for part in SYSTEM.parts:
        with torch.device("meta"):
            network, x = networks(config, part.name).to("meta").eval(), torch.empty(1, 3, *sides[part.name])
            more = {"picture": x, "level": torch.empty(1)} if part.name == UPSAMPLER else {}
            condition = Condition(torch.empty(1, base.context_length, base.context_dim), **more)
            total += 3.0 * part.share * count_flops(functools.partial(network, x, torch.empty(1), condition))
    return total


def identity(config: Config, folders: Folders) -> list[Any]:
    own = {"settings": to_dict(config.model.load()), "training": to_dict(config.training())}
    return [{"system": "imagen", **own, "train": decisive(config)}]


def described(config: Config, folders: Folders) -> dict[str, Any]:
    settings = config.model.load()
    return {
        "system": "imagen",
        **to_dict(settings),
        "diffusion": to_dict(settings.base.diffusion),
        "picture": to_dict(config.picture),
        "seed": config.train.seed,
    }


def sample_grid(job: TrainingJob, objective: PlainDenoising) -> Any:
    """A PIL grid of the fixed prompts by the base alone, with the weights that it has now."""
    from raphael.base.images.grid import image_grid
    from raphael.diffusion.sampling import Parts, generate_images, sampling_of
    from raphael.encoders.text import load_text_encoder
    from raphael.systems.texts import encoded

    config, factor = job.config, job.config.model.load().upsampler.factor
    train, listed = config.train, read_json(job.folders.prompts)["prompts"]
    prompts = fixed_prompts(train.sample_prompts, train.num_sample_prompts, listed)
    device = next(objective.unet.parameters()).device
    encoder = load_text_encoder(job.folders.clip).to(device)
    height, width = config.picture.sizes_px[0]
    parts = Parts(
        objective.unet,
        objective.schedule,
        objective.prediction,
        lambda texts: encoded(encoder, texts, device),
        lambda images: images,
        (3, height // factor, width // factor),
    )
    seeds = [(train.seed, index) for index in range(len(prompts))]
    how = sampling_of(config.generate).of_one_network()
    return image_grid(list(generate_images(parts, prompts, seeds, how)), columns=COLUMNS, captions=prompts)


def enlarged_grid(job: TrainingJob, objective: PlainDenoising) -> Any:
    """A PIL grid of the first records, shrunk and enlarged again by the upsampler, with the weights that it has now."""
    import numpy as np
    import torch

    from raphael.base.images.grid import image_grid
    from raphael.diffusion.cascade import Upsampler, shrunk
    from raphael.diffusion.image_noise import ImageNoise
    from raphael.diffusion.sampling import Order, as_bytes, sampling_of
    from raphael.net.condition import Condition
    from raphael.systems.texts import told

    config, records = job.config, Records(job.folders.records)
    bucket = next(bucket for bucket in records.buckets if bucket.count)
    rows = bucket.start + np.arange(min(config.train.num_sample_prompts, bucket.count))
    device, factor = next(objective.unet.parameters()).device, config.model.load().upsampler.factor
    batch = {name: torch.from_numpy(array).to(device) for name, array in records.batch(rows).items()}
    low, text = shrunk(batch[PIXELS].float() / 127.5 - 1, factor), told(batch, None)
    null = Condition(text.tokens[:1], torch.zeros_like(text.mask[:1]))
    noise = ImageNoise([(config.train.seed, int(row)) for row in rows], tuple(low.shape[1:]), device)
    upsampler = Upsampler(objective.unet, objective.schedule, objective.prediction, factor)
    images = as_bytes(upsampler(low, Order(text, null, noise, sampling_of(config.generate))))
    return image_grid(list(images), columns=COLUMNS, captions=[records.keys[row] for row in rows])
