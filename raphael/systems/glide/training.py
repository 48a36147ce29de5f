"""GLIDE's trainings, put together from the stage's folders: the base's, the two that train it on, the upsampler's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import Config
from raphael.base.images.growth import COLUMNS, fixed_prompts
from raphael.base.records import PIXELS, TOKEN_IDS, Records
from raphael.base.stage import StageError, read_json
from raphael.base.strict import to_dict
from raphael.systems.glide.system import BASE, INPAINT, SAMPLING, SEEING, SYSTEM, UPSAMPLER
from raphael.systems.job import Folders, Training, TrainingJob, decisive

if TYPE_CHECKING:
    from torch import Tensor

    from raphael.net.captions.captioned import Captioned
    from raphael.net.condition import Condition
    from raphael.objectives.plain import PlainDenoising

READ = 4096  # records at a time, where all captions are looked at
Weights = Mapping[str, Any]


def training(job: TrainingJob) -> Training:
    records, part = open_records(job.config, job.folders), job.part.name
    trained = {name: job.trained(name)[0] for name in job.part.needs}
    objective = build(job.config, job.folders, records, part, trained)
    draw = enlarged_grid if part == UPSAMPLER else sample_grid
    return Training(objective, records, grid=functools.partial(draw, job, objective))


def open_records(config: Config, folders: Folders) -> Records:
    """The data. Raises StageError where it does not fit the settings."""
    records, length = Records(folders.records), config.model.load().base.unet.context_length
    if not len(records):
        raise StageError(f"{records.folder}: got no records, expected at least one; see reports/encode.json")
    records.require([PIXELS, TOKEN_IDS], config.file)
    picture, tokens = to_dict(config.picture), records.fields[TOKEN_IDS][1]
    if records.facts.get("picture") != picture:
        raise StageError(
            f"{records.folder}: got images of {records.facts.get('picture')}, expected {picture}; run encode again"
        )
    if tokens != (length,):
        raise StageError(
            f"{records.folder}: got captions of {tokens[0]} tokens, expected {length}, model.settings.base.unet."
            "context_length; run encode again"
        )
    return records


@functools.lru_cache(maxsize=4)
def known_ids(records: Records) -> tuple[int, ...]:
    """The token ids of all captions, rising."""
    import numpy as np

    found: set[int] = set()
    for bucket in records.buckets:
        for start in range(bucket.start, bucket.start + bucket.count, READ):
            rows = np.arange(start, min(start + READ, bucket.start + bucket.count))
            found.update(np.unique(records.batch(rows)[TOKEN_IDS]).tolist())
    return tuple(sorted(found))


def network(config: Config, part: str, known: tuple[int, ...] | None = None) -> Captioned:
    """The network of a part, its weights drawn from train.seed, whatever the other parts are. known: of the
    training's captions, where the settings name no vocabulary."""
    import torch

    from raphael.net.captions.captioned import Captioned
    from raphael.net.plain import PlainBlock

    own, ids = own_settings(config, part, known), None
    if known is not None and not getattr(config.model.load(), own_name(part)).text.vocabulary:
        ids = torch.tensor(known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        made = Captioned(replace(own.unet, **(SEEING if part == INPAINT else {})), own.text, PlainBlock, ids)
    return made.to(memory_format=torch.channels_last)


def own_name(part: str) -> str:
    return UPSAMPLER if part == UPSAMPLER else BASE


def own_settings(config: Config, part: str, known: tuple[int, ...] | None) -> Any:
    """BaseSettings or UpsamplerSettings of a part, with the vocabulary that it has."""
    own = getattr(config.model.load(), own_name(part))
    if not own.text.vocabulary and known is not None:
        own = replace(own, text=replace(own.text, vocabulary=len(known) + 1))
    return own


def build(
    config: Config, folders: Folders, records: Records, part: str, trained: Mapping[str, Weights]
) -> PlainDenoising:
    """The objective of a part with its network. trained: the groups of the parts that it begins from.

    Raises StageError for a training that begins from a model.
    """
    from raphael.diffusion.noise import noise_of
    from raphael.diffusion.prediction import prediction_of
    from raphael.encoders.text import load_text_encoder
    from raphael.objectives.plain import Enlarging, PlainDenoising

    if config.train.init_from:
        raise StageError(
            f"train.init_from: got {config.train.init_from!r} with model.system glide, expected none: its base begins "
            "from nothing"
        )
    settings, how, known = config.model.load(), config.training(), known_ids(records)
    own, made = own_settings(config, part, known), network(config, part, known)
    for groups in trained.values():
        begin_from(made, groups)
    told = teller(load_text_encoder(folders.clip).mask_of)
    given, factor = (made, noise_of(own.diffusion), prediction_of(own.diffusion), told), settings.upsampler.factor
    if part == UPSAMPLER:
        highest = how.augmentation if own.unet.level_embedding else None
        return Enlarging(*given, how.upsampler_drop, how.upsampler_shift, factor=factor, highest=highest)
    drop = 0.0 if part == BASE else how.empty_captions
    return PlainDenoising(*given, drop, how.base_shift, shrink=factor)


def teller(mask_of: Callable[[Tensor], Tensor]) -> Callable[[Mapping[str, Tensor], Tensor | None], Condition]:
    """What the network is told of a batch of records; of a dropped caption (B,) that there is none: no token at all.
    mask_of: of token ids, True on real tokens, as the tokenizer has it."""
    from raphael.net.captions.captioned import of_ids

    def told(batch: Mapping[str, Tensor], dropped: Tensor | None) -> Condition:
        ids = batch[TOKEN_IDS].long()
        mask = mask_of(ids)
        return of_ids(ids, mask if dropped is None else mask & ~dropped[:, None])

    return told


def begin_from(made: Captioned, groups: Weights) -> None:
    """Fill a network with the weights of the part before it, EMA where there is one; an input that it gains keeps its
    zeros."""
    from raphael.net.inputs import widened
    from raphael.systems.export import weights_of

    tensors = {**weights_of(groups["model"], "unet"), **weights_of(groups.get("ema", groups["model"]), "unet")}
    made.text.load_state_dict(weights_of(tensors, "text"))
    made.unet.load_state_dict(widened(made.unet, weights_of(tensors, "unet")))


def step_flops(config: Config) -> float:
    """Floating-point operations of a training step of one image, the mean over the parts by their shares: three
    forwards of the network."""
    import torch

    from raphael.net.captions.captioned import of_ids
    from raphael.summary.model import count_flops

    settings, (height, width) = config.model.load(), config.picture.sizes_px[0]
    length, factor, total = settings.base.unet.context_length, settings.upsampler.factor, 0.0
    for part in SYSTEM.parts:
        side = 1 if part.name == UPSAMPLER else factor
        with torch.device("meta"):
            made = network(config, part.name, (0,)).to("meta").eval()
            x = torch.empty(1, 3, height // side, width // side)
            condition = of_ids(torch.empty(1, length).long(), torch.ones(1, length, dtype=torch.bool))
            if part.name == UPSAMPLER:
                level = torch.empty(1) if settings.upsampler.unet.level_embedding else None
                condition = replace(condition, picture=x, level=level)
            total += 3.0 * part.share * count_flops(functools.partial(made, x, torch.empty(1), condition))
    return total


def identity(config: Config, folders: Folders) -> list[Any]:
    how = to_dict(config.training())
    how.pop("extra")  # which parts there are besides changes no weight of the others
    return [{"system": "glide", "settings": to_dict(config.model.load()), "training": how, "train": decisive(config)}]


def described(config: Config, folders: Folders) -> dict[str, Any]:
    known = known_ids(Records(folders.records))
    own = {name: to_dict(own_settings(config, name, known)) for name in (BASE, UPSAMPLER)}
    return {
        "system": "glide",
        **own,
        "diffusion": own[BASE]["diffusion"],
        "picture": to_dict(config.picture),
        "sampling": {**SAMPLING, **({} if own[UPSAMPLER]["unet"].get("level_embedding") else {"augmentation": 0.0})},
        "seed": config.train.seed,
    }


def sample_grid(job: TrainingJob, objective: PlainDenoising) -> Any:
    """A PIL grid of the fixed prompts by the base network alone, with the weights that it has now; unguided, as long
    as it has seen no empty caption."""
    from raphael.base.images.grid import image_grid
    from raphael.diffusion.sampling import Parts, generate_images, sampling_of
    from raphael.encoders.text import load_text_encoder
    from raphael.systems.glide.pipeline import asked

    config, factor = job.config, job.config.model.load().upsampler.factor
    train, listed = config.train, read_json(job.folders.prompts)["prompts"]
    prompts = fixed_prompts(train.sample_prompts, train.num_sample_prompts, listed)
    device, encoder = next(objective.unet.parameters()).device, load_text_encoder(job.folders.clip)
    height, width = config.picture.sizes_px[0]
    parts = Parts(
        objective.unet,
        objective.schedule,
        objective.prediction,
        lambda texts: asked(encoder, texts).to(device),
        lambda images: images,
        (3, height // factor, width // factor),
    )
    seeds = [(train.seed, index) for index in range(len(prompts))]
    how = sampling_of(config.generate).of_one_network()
    how = replace(how, guidance_scale=1.0) if job.part.name == BASE else how
    return image_grid(list(generate_images(parts, prompts, seeds, how)), columns=COLUMNS, captions=prompts)


def enlarged_grid(job: TrainingJob, objective: PlainDenoising) -> Any:
    """A PIL grid of the first records, shrunk and enlarged again by the upsampler, with the weights that it has now."""
    import numpy as np
    import torch

    from raphael.base.images.grid import image_grid
    from raphael.diffusion.cascade import Upsampler, shrunk
    from raphael.diffusion.image_noise import ImageNoise
    from raphael.diffusion.sampling import Order, as_bytes, sampling_of

    config, records = job.config, Records(job.folders.records)
    bucket = next(bucket for bucket in records.buckets if bucket.count)
    rows = bucket.start + np.arange(min(config.train.num_sample_prompts, bucket.count))
    device, factor = next(objective.unet.parameters()).device, config.model.load().upsampler.factor
    batch = {name: torch.from_numpy(array).to(device) for name, array in records.batch(rows).items()}
    low, text = shrunk(batch[PIXELS].float() / 127.5 - 1, factor), objective.told(batch, None)
    null = objective.told(batch, torch.ones(len(rows), dtype=torch.bool, device=device)).rows([0])
    noise = ImageNoise([(config.train.seed, int(row)) for row in rows], tuple(low.shape[1:]), device)
    upsampler = Upsampler(objective.unet, objective.schedule, objective.prediction, factor)
    images = as_bytes(upsampler(low, Order(text, null, noise, sampling_of(config.generate))))
    return image_grid(list(images), columns=COLUMNS, captions=[records.keys[row] for row in rows])
