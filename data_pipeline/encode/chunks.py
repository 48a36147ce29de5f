"""Consecutive rows encoded into one file: a task of data_pipeline/engine, and the worker that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.common.caption_rows import CaptionRow
from data_pipeline.common.images import ShardReader, fit
from data_pipeline.encode.buckets import nearest_size
from data_pipeline.encode.fields import AUTOENCODER, TEXT_ENCODER, Pictures, Tools, named
from raphael.base.config.params import Config
from raphael.base.files import written_whole
from raphael.base.images.fit import told_sizes
from raphael.base.records import SIZES, TEXT

if TYPE_CHECKING:
    from PIL import Image

MODELS = {AUTOENCODER: Path("models/autoencoder"), TEXT_ENCODER: Path("models/clip")}


@dataclass(frozen=True)
class Chunk:
    """Rows in the order of their keys. labels: int32 (count,), of records that hold labels."""

    done: Path
    rows: tuple[CaptionRow, ...]
    labels: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.rows)


class ChunkEncoder:
    """A worker: models loaded once, and the shard that was read last kept open, since chunks follow each other."""

    def __init__(self, tools: Tools, shards: Path):
        self.tools, self.shards = tools, ShardReader(shards)

    def __call__(self, chunk: Chunk) -> Path:
        encode_chunk(chunk, map(self.shards.image, chunk.rows), self.tools, self.shards.original)
        return chunk.done


def load_tools(config: Config, device: str) -> Tools:
    """The models that the fields need, from models/."""
    import torch

    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder

    needed = needs(config)
    text = load_text_encoder(MODELS[TEXT_ENCODER]) if TEXT_ENCODER in needed else None
    if TEXT in named(config):  # token ids alone need no device
        text = text.to(device)
    return Tools(
        config,
        config.model.load(),
        torch.device(device),
        load_autoencoder(MODELS[AUTOENCODER]).to(device) if AUTOENCODER in needed else None,
        text,
    )


def chunk_encoder(config: Config, device: str, shards: Path) -> ChunkEncoder:
    return ChunkEncoder(load_tools(config, device), shards)


def needs(config: Config) -> set[str]:
    """What of Tools the fields ask for."""
    return {need for encoder in named(config).values() for need in encoder.needs}


def encode_chunk(
    chunk: Chunk,
    images: Iterator[Image.Image],
    tools: Tools,
    original: Callable[[CaptionRow], tuple[int, int]],
) -> None:
    """Into chunk.done, atomically. Batches are the same whenever a run began, and wherever. original: (height, width)
    of a row's image as it was found; asked right after its image, and where records hold sizes alone.

    The file: "bucket" (count,), the index of each row's size, and the fields of each bucket that got any, in their
    rows' order.
    """
    sizes, size = tools.config.picture.sizes_px, tools.config.encode.batch_size
    pad = tools.config.picture.too_small == "pad"
    buckets = np.empty(chunk.count, np.int64)
    fitted: dict[int, list[np.ndarray]] = {}
    captions: dict[int, list[str]] = {}
    told: dict[int, list[list[int]]] = {}
    for place, (row, image) in enumerate(zip(chunk.rows, images, strict=True)):
        bucket = buckets[place] = nearest_size(image.height, image.width, sizes)
        fitted.setdefault(bucket, []).append(fit(image, *sizes[bucket], tools.config.autoencoder.is_pixels, pad))
        captions.setdefault(bucket, []).append(row.caption)
        if SIZES in tools.config.encode.fields:
            stored = image.height, image.width
            told.setdefault(bucket, []).append(told_sizes(original(row), stored, tuple(sizes[bucket]), pad))
    arrays = {"bucket": buckets}
    for bucket in sorted(fitted):
        labels = None if chunk.labels is None else chunk.labels[buckets == bucket]
        numbers = np.array(told[bucket], np.int32) if told else None
        whole = Pictures(np.stack(fitted.pop(bucket)), captions[bucket], labels, numbers)
        batches = [whole[at : at + size] for at in range(0, len(whole.captions), size)]
        for name, encoder in named(tools.config).items():
            arrays[f"{bucket}/{name}"] = np.concatenate([encoder.values(tools, batch) for batch in batches])
    with written_whole(chunk.done) as temporary:
        np.savez(temporary, **arrays)
