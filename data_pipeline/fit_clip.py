"""Train the small CLIP on the kept pictures and captions, or check the pretrained text encoder; write models/clip."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.pictures import PictureSet, TrainingData, collect, shard_inputs
from raphael.config import Config
from raphael.stage import Stage, StageError, main
from raphael.strict import to_dict

if TYPE_CHECKING:
    from raphael.encoders.clip import OpenClip

OUT = Path("models/clip")
RETRIEVAL_GROUP = 64


def run(config: Config, stage: Stage) -> None:
    settings = config.clip
    size = settings.image_size_px
    work = stage.workdir(*shard_inputs(stage), to_dict(settings), config.seed)
    finished = work / "clip"
    shutil.rmtree(finished, ignore_errors=True)
    if settings.pretrained:
        facts = _pretrained(settings.pretrained, settings.context_length, finished)
        rows = len(_captions(stage))
        stage.publish(finished, OUT)
        stage.report(rows, rows, pretrained=settings.pretrained, trained_on=0, **facts)
        return
    pictures = collect(stage, work, size, size)
    train_rows, held_rows = pictures.split()
    clip, history = _train(config, stage, pictures, train_rows, work)
    from raphael.encoders.clip import save_clip

    save_clip(clip, finished)
    quality = _retrieval(finished, pictures, held_rows)
    stage.publish(finished, OUT)
    stage.report(
        len(pictures.keys),
        len(pictures.keys),
        pretrained=None,
        trained_on=len(train_rows),
        heldout=len(held_rows),
        parameters=sum(parameter.numel() for parameter in clip.model.parameters()),
        context_length=clip.context_length,
        retrieval=quality,
        history=history,
    )


def _captions(stage: Stage) -> list[dict[str, Any]]:
    from data_pipeline.pictures import CAPTIONS, read_captions

    return read_captions(stage.root / CAPTIONS)


def _train(
    config: Config, stage: Stage, pictures: PictureSet, rows: np.ndarray, work: Path
) -> tuple[OpenClip, list[dict[str, float]]]:
    import torch

    from raphael.encoders.clip import build_clip
    from raphael.objectives.contrastive import TOKEN_IDS, ContrastiveObjective
    from raphael.train.loop import Hooks, train

    settings = config.clip
    torch.manual_seed(config.seed)
    try:
        clip = build_clip(settings)
    except ValueError as error:
        raise StageError(str(error)) from None
    tokens = clip.tokenize(pictures.captions).numpy().astype(np.int32)
    data = TrainingData(pictures, rows, **{TOKEN_IDS: tokens})
    objective = ContrastiveObjective(clip.model, clip.mean, clip.std)
    with stage.progress(settings.loop.num_images, "images") as bar:
        hooks = Hooks(progress=lambda images: bar.update(images - bar.bar.n))
        outcome = train(objective, data, settings.loop, config.seed, folder=work / "checkpoints", hooks=hooks)
    if settings.loop.ema_decay:
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                parameter.copy_(outcome["ema"].get(name, parameter))
    clip.model.eval()
    return clip, outcome["history"]


def _retrieval(folder: Path, pictures: PictureSet, rows: np.ndarray) -> dict[str, float]:
    """In-batch retrieval on held-out pairs, through the very files that are published."""
    from raphael.encoders.image import load_clip
    from raphael.objectives.contrastive import retrieval

    scorer = load_clip(folder)
    images = scorer.embed_images(pictures.images[rows])
    texts = scorer.embed_texts([pictures.captions[row] for row in rows])
    found = retrieval(images, texts, RETRIEVAL_GROUP)
    return {name: round(value, 4) for name, value in found.items()}


def _pretrained(spec: str, context_length: int, folder: Path) -> dict[str, Any]:
    """Check that the encoder loads and encodes; copy our own kind of folder, point at any other."""
    from raphael.encoders.clip import is_clip_folder, load_clip_folder, save_clip
    from raphael.encoders.pretrained import write_pointer
    from raphael.encoders.text import load_text_encoder

    length = context_length if spec.startswith("t5:") else None  # the others have a length of their own
    encoder = load_text_encoder(spec, length)
    encoding = encoder.encode(encoder.tokenize(["a red circle", ""]))
    if not bool(encoding.context.isfinite().all()):
        raise StageError(f"clip.pretrained: {spec} gives numbers that are not finite; its weights are damaged")
    if is_clip_folder(spec):
        save_clip(load_clip_folder(spec), folder)
    else:
        write_pointer(folder, spec, {"context_length": encoder.context_length})
    return encoder.facts()


if __name__ == "__main__":
    raise SystemExit(main("clip", run, __doc__))
