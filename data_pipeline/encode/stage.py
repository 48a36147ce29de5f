"""Encode every kept image once, at the size nearest to its shape, into the fields that `encode.fields` names: the
autoencoder's raw moments, the caption's token ids, the edge map, or others (data_pipeline/encode/fields.py). Writes
data/records. Chunks of rows are the tasks that `pipeline` spreads (data_pipeline/engine)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.common.caption_rows import CaptionRows
from data_pipeline.common.images import CAPTIONS, SHARDS, shard_inputs
from data_pipeline.common.places import METADATA, REPEATS
from data_pipeline.encode.chunks import MODELS, Chunk, ChunkEncoder, chunk_encoder, load_tools, needs
from data_pipeline.encode.fields import LABELS, Tools, bucket_fields, edge_weights, named
from data_pipeline.encode.labels import read_labels
from data_pipeline.encode.repeats import has_repeats, read_repeats
from data_pipeline.engine.partitions import KeptPieces, partitions
from data_pipeline.engine.run import device_of as engine_device
from data_pipeline.engine.run import finish, is_here
from data_pipeline.engine.work import Work
from raphael.base.config.params import Config
from raphael.base.manifest import read_manifest
from raphael.base.record_files.stored import RECORDS, Shipping
from raphael.base.records import CAPTIONS as CAPTIONS_FILE
from raphael.base.records import FORM, Fields, RecordWriter
from raphael.base.stage import Stage, StageError, file_sha256
from raphael.base.strict import to_dict

if TYPE_CHECKING:
    import torch

OUT = Path("data/records")
CHUNK_BATCHES = 16  # batches between two points from which a killed run resumes


def device_of(config: Config) -> torch.device:
    """What images are encoded on. Raises ConfigError."""
    return engine_device(config, "encode")


def run(config: Config, stage: Stage) -> None:
    needed = needs(config)
    models = [folder for name, folder in MODELS.items() if name in needed]
    for folder in models:
        if not folder.is_dir():
            raise StageError(f"{folder}: no such folder; run the stage {folder.name} first (dvc repro {folder.name})")
    stage.expect_whole(CAPTIONS, *models)
    rows = CaptionRows(CAPTIONS)
    if not len(rows):
        raise StageError(f"{CAPTIONS}: got no rows, expected at least one image; look at reports/filter.json")
    tools = load_tools(config, str(device_of(config)) if is_here(config.pipeline) else "cpu")
    if LABELS in needed:
        tools = replace(tools, labels=read_labels(config.encode, rows))
    _check_fit(tools)
    settings = [config.encode.decisive(), to_dict(config.picture), tools.unet and tools.unet.attention_levels]
    inputs = [*shard_inputs(stage), *(folder.resolve() for folder in models)]
    inputs += [METADATA] if config.encode.label_column or has_repeats() else []
    work = stage.workdir(*inputs, *edge_weights(config), settings)
    facts, fields = {**_facts(tools), **read_repeats(rows)}, bucket_fields(tools)
    with partitions(config.pipeline, work, stage, stream=True) as pieces:
        chunks, engine = _encode(stage, pieces, rows, tools)
        ship = Shipping(config.pipeline.storage, work / RECORDS) if config.pipeline.storage else None
        finished, counts = _assemble(work / RECORDS, pieces.each(chunks), rows, fields, facts, ship)
        known = read_manifest(finished, FORM)["facts"]["xxh3_128"]
        stage.publish(finished, OUT, known)
        pieces.remove()  # the chunks are a second copy of the records
    shutil.rmtree(work)
    shown = {name: value for name, value in facts.items() if name != REPEATS}  # a key for each image
    stage.report(len(rows), len(rows), **engine, **shown, buckets=counts)


def _check_fit(tools: Tools) -> None:
    """The parts must fit the network that will be trained on them: said now, not an hour later."""
    config, unet = tools.config, tools.unet
    if unet is None:  # of another kind: its training says what does not fit
        return
    channels = 3 if tools.autoencoder is None else tools.autoencoder.latent_channels
    pairs = [("latent_channels", channels, unet.latent_channels, "the autoencoder")]
    if tools.text is not None:
        pairs.append(("context_dim", tools.text.dim, unet.context_dim, "the text encoder"))
    if unet.size_px:
        pairs.append(("size_px", tools.downsampling, unet.size_px, "the autoencoder"))
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


def _encode(stage: Stage, pieces: KeptPieces, rows: CaptionRows, tools: Tools) -> tuple[list[Path], dict[str, str]]:
    """All rows in chunks, one file each; those of an earlier run stay. Returns the files in the rows' order, and what
    the report says of the engine."""
    config, size = tools.config, tools.config.encode.batch_size * CHUNK_BATCHES
    chunks = [pieces.folder / f"chunk_{start:09d}.npz" for start in range(0, len(rows), size)]

    def tasks() -> Iterator[Chunk]:
        in_order = iter(rows)
        for number, path in enumerate(chunks):
            labels = tools.labels.values[number * size : (number + 1) * size] if tools.labels is not None else None
            yield Chunk(path, tuple(islice(in_order, size)), labels)

    shards, device = SHARDS.resolve(), str(device_of(config))
    encoding = Work(
        stage.name,
        stage.root,
        chunk_encoder,
        (config, device, shards),
        device,
        here=lambda: ChunkEncoder(tools, shards),  # whose models are loaded
    )
    with stage.progress(len(rows), "images") as bar:
        engine = finish(config.pipeline, encoding, tasks(), pieces, stage, bar)
    return chunks, engine


def _facts(tools: Tools) -> dict[str, Any]:
    facts: dict[str, Any] = {"picture": to_dict(tools.config.picture)}
    for encoder in named(tools.config).values():
        facts |= encoder.facts(tools)
    return {**facts, "captions_sha256": file_sha256(CAPTIONS)}


def _assemble(
    folder: Path,
    chunks: Iterator[Path],
    rows: CaptionRows,
    fields: dict[str, Fields],
    facts: dict[str, Any],
    ship: Shipping | None,
) -> tuple[Path, dict[str, int]]:
    """Join the chunks into the records' folder, still in the work folder; and how many each bucket has. ship: takes its
    files to a store as they are finished."""
    names = list(fields)
    shutil.rmtree(folder, ignore_errors=True)
    counts, in_order = dict.fromkeys(names, 0), iter(rows)
    with RecordWriter(folder, fields, facts, unique=True, ship=ship) as writer:  # CaptionRows compares the keys
        for chunk in chunks:
            with np.load(chunk) as arrays:
                buckets = arrays["bucket"]
                keys = [row.key for row in islice(in_order, len(buckets))]
                for bucket in np.unique(buckets):
                    name, here = names[bucket], np.flatnonzero(buckets == bucket)
                    part = {field: arrays[f"{bucket}/{field}"] for field in fields[name]}
                    writer.append([keys[place] for place in here], part, name)
                    counts[name] += len(here)
    if ship is not None:
        ship.publish(FORM)
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
