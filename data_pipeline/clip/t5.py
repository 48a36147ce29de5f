"""The tower t5: a tokenizer and a T5 taught on the captions alone, by span corruption. Its images are captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.config.params import Config
from raphael.base.stage import Stage, StageError, device_of

if TYPE_CHECKING:
    from torch import nn

TOKENIZER, FINISHED = "tokenizer", "clip"  # folders in the work folder


@dataclass(frozen=True)
class Captions:
    """What the training loop reads."""

    token_ids: np.ndarray  # int32 (n, N)

    def __len__(self) -> int:
        return len(self.token_ids)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"token_ids": np.take(self.token_ids, np.asarray(indices), axis=0)}


def train_t5(config: Config, stage: Stage, captions: list[str], work: Path) -> dict[str, Any]:
    """Write the encoder with its tokenizer and a pointer to itself into work/clip. Returns what the report says.

    A run that was killed resumes with the tokenizer that it had, from the newest checkpoint.
    """
    import torch

    from raphael.encoders.pretrained import HERE, write_pointer
    from raphael.encoders.t5.build import build_t5, save_encoder
    from raphael.encoders.t5.tokenizer import FILES, SENTINELS, load_tokenizer, train_tokenizer
    from raphael.objectives.span_corruption import SpanCorruption

    settings, folder = config.clip, work / TOKENIZER
    if not all((folder / name).is_file() for name in FILES):
        train_tokenizer(captions, settings.t5.vocabulary, work / f".{TOKENIZER}")
        (work / f".{TOKENIZER}").rename(folder)
    tokenizer = load_tokenizer(folder)
    length = settings.context_length
    ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True)["input_ids"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        t5 = build_t5(settings.t5, len(tokenizer))
    sentinels = tokenizer.convert_tokens_to_ids(list(SENTINELS))
    objective = SpanCorruption(
        t5, sentinels, tokenizer.eos_token_id, tokenizer.pad_token_id, settings.t5.corrupted_share,
        settings.t5.mean_span,
    )  # fmt: skip
    history = _train(config, stage, objective, Captions(np.array(ids, np.int32)), work)
    finished = work / FINISHED
    save_encoder(t5, finished)
    for name in FILES:
        (finished / name).write_bytes((folder / name).read_bytes())
    write_pointer(finished, f"t5:{HERE}", {"context_length": length})
    cut = sum(tokenizer.pad_token_id not in row and row[-1] == tokenizer.eos_token_id for row in ids)
    encoder = _checked(finished)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    facts = {"vocabulary": len(tokenizer), "captions_that_fill_the_context": cut, "parameters": parameters}
    return {**encoder.facts(), **facts, "history": history}


def _train(config: Config, stage: Stage, objective: nn.Module, data: Captions, work: Path) -> list[dict[str, float]]:
    import torch

    from raphael.train.loop import Hooks, World, train

    loop = config.clip.loop
    with stage.progress(loop.num_images, "captions") as bar:
        hooks = Hooks(progress=lambda images: bar.update(images - bar.bar.n))
        world = World(device=str(device_of(config)))
        outcome = train(objective, data, loop, config.seed, folder=work / "checkpoints", world=world, hooks=hooks)
    if loop.ema_decay:
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                parameter.copy_(outcome["ema"].get(name, parameter))
    objective.cpu().eval()
    return outcome["history"]


def _checked(folder: Path) -> Any:
    """The encoder, through the very files that are published. Raises StageError where it gives no numbers."""
    from raphael.encoders.text import load_text_encoder

    encoder = load_text_encoder(folder)
    if not bool(encoder.encode(encoder.tokenize(["a red circle", ""])).context.isfinite().all()):
        raise StageError(
            "clip.t5: the trained encoder gives numbers that are not finite; lower clip.loop.learning_rate"
        )
    return encoder
