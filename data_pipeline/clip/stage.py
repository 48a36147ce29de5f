"""Train the small CLIP on the kept images and captions, or a T5 on the captions, or check the pretrained text encoder;
write models/clip."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.common.images import ImageSet, TrainingData, collect, drop_collected, shard_inputs
from raphael.base.config.params import NO_TEXT, Config
from raphael.base.stage import Stage, StageError, device_of
from raphael.base.strict import to_dict

if TYPE_CHECKING:
    from raphael.encoders.clip import OpenClip

OUT = Path("models/clip")
RETRIEVAL_GROUP = 64


def run(config: Config, stage: Stage) -> None:
    settings = config.clip
    size = settings.image_size_px
    decisive = {**to_dict(settings), "loop": settings.loop.decisive()}
    work = stage.workdir(*shard_inputs(stage), decisive, config.seed)
    finished = work / "clip"
    shutil.rmtree(finished, ignore_errors=True)
    if settings.pretrained:
        facts = _without(finished) if settings.pretrained == NO_TEXT else _pretrained(config, finished)
        rows = len(_captions(stage))
        stage.publish(finished, OUT)
        stage.report(rows, rows, pretrained=settings.pretrained, trained_on=0, **facts)
        return
    if settings.tower == "t5":
        from data_pipeline.clip.t5 import train_t5

        captions = [row["caption"] for row in _captions(stage)]
        facts = train_t5(config, stage, captions, work)
        stage.publish(finished, OUT)
        stage.report(len(captions), len(captions), pretrained=None, trained_on=len(captions), **facts)
        return
    image_set = collect(stage, work, size, size)
    train_rows, held_rows = image_set.split()
    clip, history = _train(config, stage, image_set, train_rows, work)
    from raphael.encoders.clip import save_clip

    save_clip(clip, finished)
    quality = _retrieval(config, finished, image_set, held_rows)
    stage.publish(finished, OUT)
    drop_collected(work)
    stage.report(
        len(image_set.keys),
        len(image_set.keys),
        pretrained=None,
        trained_on=len(train_rows),
        heldout=len(held_rows),
        parameters=sum(parameter.numel() for parameter in clip.model.parameters()),
        context_length=clip.context_length,
        retrieval=quality,
        history=history,
    )


def _captions(stage: Stage) -> list[dict[str, Any]]:
    from data_pipeline.common.images import CAPTIONS, read_captions

    return read_captions(stage.root / CAPTIONS)


def _train(
    config: Config, stage: Stage, image_set: ImageSet, rows: np.ndarray, work: Path
) -> tuple[OpenClip, list[dict[str, float]]]:
    import torch

    from raphael.encoders.clip import build_clip
    from raphael.objectives.contrastive import TOKEN_IDS, ContrastiveObjective
    from raphael.train.loop import Hooks, World, train

    settings = config.clip
    torch.manual_seed(config.seed)
    try:
        clip = build_clip(settings)
    except ValueError as error:
        raise StageError(str(error)) from None
    tokens = clip.tokenize(image_set.captions).numpy().astype(np.int32)
    data = TrainingData(image_set, rows, **{TOKEN_IDS: tokens})
    objective = ContrastiveObjective(clip.model, clip.mean, clip.std)
    with stage.progress(settings.loop.num_images, "images") as bar:
        hooks = Hooks(progress=lambda images: bar.update(images - bar.bar.n))
        world = World(device=str(device_of(config)))
        folder = work / "checkpoints"
        outcome = train(objective, data, settings.loop, config.seed, folder=folder, world=world, hooks=hooks)
    if settings.loop.ema_decay:
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                parameter.copy_(outcome["ema"].get(name, parameter))
    clip.model.eval()
    return clip, outcome["history"]


def _retrieval(config: Config, folder: Path, image_set: ImageSet, rows: np.ndarray) -> dict[str, float]:
    """In-batch retrieval on held-out pairs, through the very files that are published."""
    from raphael.encoders.image import load_clip
    from raphael.objectives.contrastive import retrieval

    scorer = load_clip(folder).to(device_of(config))
    images = scorer.embed_images(image_set.images[rows])
    texts = scorer.embed_texts([image_set.captions[row] for row in rows])
    found = retrieval(images, texts, RETRIEVAL_GROUP)
    return {name: round(value, 4) for name, value in found.items()}


def _without(folder: Path) -> dict[str, Any]:
    """Nothing to train: a folder that says so, for systems that read no text."""
    from raphael.encoders.pretrained import write_pointer

    write_pointer(folder, NO_TEXT, {})
    return {}


def _pretrained(config: Config, folder: Path) -> dict[str, Any]:
    """Check that the encoder loads and encodes; copy our own kind of folder, point at any other."""
    from raphael.encoders.clip import is_clip_folder, load_clip_folder, save_clip
    from raphael.encoders.pretrained import pinned, write_pointer
    from raphael.encoders.text import load_text_encoder

    spec, device = config.clip.pretrained, device_of(config)
    length = config.clip.context_length if spec.startswith("t5:") else None  # the others have a length of their own
    encoder = load_text_encoder(spec, length).to(device)
    encoding = encoder.encode(encoder.tokenize(["a red circle", ""]).to(device))
    if not bool(encoding.context.isfinite().all()):
        raise StageError(f"clip.pretrained: {spec} gives numbers that are not finite; its weights are damaged")
    if is_clip_folder(spec):
        save_clip(load_clip_folder(spec), folder)
    else:
        write_pointer(folder, pinned(spec, encoder.commit), {"context_length": encoder.context_length})
    return encoder.facts()
