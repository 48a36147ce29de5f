"""Encode every kept image once, at the size nearest to its shape, into the fields that `encode.fields` names: the
autoencoder's raw moments, the caption's token ids, the edge map, or others (data_pipeline/encode/fields.py). Writes
data/records."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.common.caption_rows import CaptionRow, CaptionRows
from data_pipeline.common.images import CAPTIONS, SHARDS, fit, read_images, shard_inputs
from data_pipeline.common.places import METADATA, REPEATS
from data_pipeline.encode.buckets import nearest_size
from data_pipeline.encode.fields import (
    AUTOENCODER,
    LABELS,
    TEXT_ENCODER,
    Pictures,
    Tools,
    bucket_fields,
    edge_weights,
    named,
)
from data_pipeline.encode.labels import read_labels
from data_pipeline.encode.repeats import has_repeats, read_repeats
from raphael.base.config.params import Config
from raphael.base.files import written_whole
from raphael.base.integrity.pieces import Pieces
from raphael.base.manifest import read_manifest
from raphael.base.records import CAPTIONS as CAPTIONS_FILE
from raphael.base.records import FORM, TEXT, Fields, RecordWriter
from raphael.base.stage import Stage, StageError, device_of, file_sha256
from raphael.base.strict import to_dict

if TYPE_CHECKING:
    from PIL import Image

OUT = Path("data/records")
MODELS = {AUTOENCODER: Path("models/autoencoder"), TEXT_ENCODER: Path("models/clip")}
CHUNK_BATCHES = 16  # batches between two points from which a killed run resumes


def run(config: Config, stage: Stage) -> None:
    needed = {need for encoder in named(config).values() for need in encoder.needs}
    models = [folder for name, folder in MODELS.items() if name in needed]
    for folder in models:
        if not folder.is_dir():
            raise StageError(f"{folder}: no such folder; run the stage {folder.name} first (dvc repro {folder.name})")
    stage.expect_whole(CAPTIONS, *models)
    rows = CaptionRows(CAPTIONS)
    if not len(rows):
        raise StageError(f"{CAPTIONS}: got no rows, expected at least one image; look at reports/filter.json")
    tools = _load(config, needed, rows)
    _check_fit(tools)
    settings = [config.encode.decisive(), to_dict(config.picture), tools.unet and tools.unet.attention_levels]
    inputs = [*shard_inputs(stage), *(folder.resolve() for folder in models)]
    inputs += [METADATA] if config.encode.label_column or has_repeats() else []
    work = stage.workdir(*inputs, *edge_weights(config), settings)
    facts, fields = {**_facts(tools), **read_repeats(rows)}, bucket_fields(tools)
    chunks = _encode(stage, work, rows, tools)
    finished, counts = _assemble(work, chunks, rows, fields, facts)
    known = read_manifest(finished, FORM)["facts"]["xxh3_128"]
    stage.publish(finished, OUT, known)
    shutil.rmtree(work)  # the chunks are a second copy of the records
    shown = {name: value for name, value in facts.items() if name != REPEATS}  # a key for each image
    stage.report(len(rows), len(rows), **shown, buckets=counts)


def _load(config: Config, needed: set[str], rows: CaptionRows) -> Tools:
    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder

    device = device_of(config)
    text = load_text_encoder(MODELS[TEXT_ENCODER]) if TEXT_ENCODER in needed else None
    if TEXT in named(config):  # token ids alone need no device
        text = text.to(device)
    return Tools(
        config,
        config.model.load(),
        device,
        load_autoencoder(MODELS[AUTOENCODER]).to(device) if AUTOENCODER in needed else None,
        text,
        read_labels(config.encode, rows) if LABELS in needed else None,
    )


def _check_fit(tools: Tools) -> None:
    """The parts must fit the network that will be trained on them: said now, not an hour later."""
    config, unet = tools.config, tools.unet
    if unet is None:  # of another kind: its training says what does not fit
        return
    channels = 3 if tools.autoencoder is None else tools.autoencoder.latent_channels
    pairs = [("latent_channels", channels, unet.latent_channels, "the autoencoder")]
    if tools.text is not None:
        pairs.append(("context_dim", tools.text.dim, unet.context_dim, "the text encoder"))
    for key, got, expected, part in pairs:
        if got != expected:
            raise StageError(
                f"{part} gives {key} {got}, but the preset {config.model.preset} expects {expected}; "
                f"set unet.{key} in the preset, or choose another (model.preset in {config.file})"
            )
    multiple = tools.downsampling * unet.multiple
    for size in config.picture.sizes_px:
        if any(side % multiple for side in size):
            raise StageError(
                f"picture.sizes_px: got {list(size)}, expected multiples of {multiple} (autoencoder "
                f"{tools.downsampling} x U-Net {multiple // tools.downsampling}); set it in {config.file}"
            )


def _encode(stage: Stage, work: Path, rows: CaptionRows, tools: Tools) -> list[Path]:
    """All rows in chunks, one file each; those of an earlier run stay. One pass through rows and shards."""
    size = tools.config.encode.batch_size * CHUNK_BATCHES
    chunks = [work / f"chunk_{start:09d}.npz" for start in range(0, len(rows), size)]
    pieces = Pieces(work, stage.name)
    missing = [not pieces.has(path) for path in chunks]
    with stage.progress(len(rows), "images") as bar:
        images = read_images(SHARDS, rows, lambda number: missing[number // size])
        for number, path in enumerate(chunks):
            start, count = number * size, min(size, len(rows) - number * size)
            if missing[number]:
                _encode_chunk(path, islice(images, count), np.arange(start, start + count), tools)
                pieces.add(path)
            bar.update(count)
        images.close()
    return chunks


def _encode_chunk(
    path: Path, images: Iterator[tuple[CaptionRow, Image.Image]], numbers: np.ndarray, tools: Tools
) -> None:
    """The rows of those numbers into one file, atomically. Batches are the same whenever a run began.

    The file: "bucket" (count,), the index of each row's size, and the fields of each bucket that got any, in their
    rows' order.
    """
    sizes, size = tools.config.picture.sizes_px, tools.config.encode.batch_size
    pad = tools.config.picture.too_small == "pad"
    buckets = np.empty(len(numbers), np.int64)
    fitted: dict[int, list[np.ndarray]] = {}
    captions: dict[int, list[str]] = {}
    for place, (row, image) in enumerate(images):
        bucket = buckets[place] = nearest_size(image.height, image.width, sizes)
        fitted.setdefault(bucket, []).append(fit(image, *sizes[bucket], tools.config.autoencoder.is_pixels, pad))
        captions.setdefault(bucket, []).append(row.caption)
    arrays = {"bucket": buckets}
    for bucket in sorted(fitted):
        whole = Pictures(np.stack(fitted.pop(bucket)), captions[bucket], numbers[buckets == bucket])
        batches = [whole[at : at + size] for at in range(0, len(whole.captions), size)]
        for name, encoder in named(tools.config).items():
            arrays[f"{bucket}/{name}"] = np.concatenate([encoder.values(tools, batch) for batch in batches])
    with written_whole(path) as temporary:
        np.savez(temporary, **arrays)


def _facts(tools: Tools) -> dict[str, Any]:
    facts: dict[str, Any] = {"picture": to_dict(tools.config.picture)}
    for encoder in named(tools.config).values():
        facts |= encoder.facts(tools)
    return {**facts, "captions_sha256": file_sha256(CAPTIONS)}


def _assemble(
    work: Path, chunks: list[Path], rows: CaptionRows, fields: dict[str, Fields], facts: dict[str, Any]
) -> tuple[Path, dict[str, int]]:
    """Join the chunks into the records' folder, still in the work folder; and how many each bucket has."""
    folder, names = work / "records", list(fields)
    shutil.rmtree(folder, ignore_errors=True)
    counts, in_order = dict.fromkeys(names, 0), iter(rows)
    with RecordWriter(folder, fields, facts, unique=True) as writer:  # CaptionRows compares the keys
        for chunk in chunks:
            with np.load(chunk) as arrays:
                buckets = arrays["bucket"]
                keys = [row.key for row in islice(in_order, len(buckets))]
                for bucket in np.unique(buckets):
                    name, here = names[bucket], np.flatnonzero(buckets == bucket)
                    part = {field: arrays[f"{bucket}/{field}"] for field in fields[name]}
                    writer.append([keys[place] for place in here], part, name)
                    counts[name] += len(here)
    _write_captions(folder / CAPTIONS_FILE, rows)
    return folder, counts


def _write_captions(path: Path, rows: CaptionRows) -> None:
    """{key: caption} as `write_json` writes it, a row at a time: of many rows one mapping does not fit in memory."""
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            key, caption = (json.dumps(text, ensure_ascii=False) for text in (row.key, row.caption))
            file.write(f"{',' if number else '{'}\n  {key}: {caption}")
        file.write("\n}\n")


def records_digest(folder: Path) -> str:
    """One sha256 over a folder's files by name, for comparing two runs."""
    lines = [f"{path.name} {file_sha256(path)}" for path in sorted(folder.iterdir())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
