"""Encode every kept picture once, at the size nearest to its shape: the autoencoder's raw moments, the caption's token
ids, the edge map. Writes data/records."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.buckets import Size, nearest_size, size_name
from data_pipeline.pictures import CAPTIONS, SHARDS, fit, read_captions, read_pictures, shard_inputs
from raphael.config import Config
from raphael.preset import Preset
from raphael.records import EDGES, MOMENTS, TOKEN_IDS, Fields, RecordWriter
from raphael.stage import Stage, StageError, file_sha256, main, write_json
from raphael.strict import to_dict

AUTOENCODER, TEXT_ENCODER, OUT = Path("models/autoencoder"), Path("models/clip"), Path("data/records")
CHUNK_BATCHES = 16  # batches between two points from which a killed run goes on
CAPTIONS_FILE = "captions.json"


def run(config: Config, stage: Stage) -> None:
    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder

    for folder, name in ((AUTOENCODER, "autoencoder"), (TEXT_ENCODER, "clip")):
        if not folder.is_dir():
            raise StageError(f"{folder}: no such folder; run the stage {name} first (dvc repro {name})")
    rows = read_captions(CAPTIONS)
    if not rows:
        raise StageError(f"{CAPTIONS}: got no rows, expected at least one picture; look at reports/filter.json")
    preset = config.model.load()
    autoencoder, text = load_autoencoder(AUTOENCODER), load_text_encoder(TEXT_ENCODER)
    _check_fit(config, preset, autoencoder, text)
    sizes = config.picture.sizes_px
    settings = [to_dict(config.encode), to_dict(config.picture), preset.unet.attention_levels]
    inputs = [*shard_inputs(stage), AUTOENCODER.resolve(), TEXT_ENCODER.resolve()]
    work = stage.workdir(*inputs, *edge_weights(config), settings)
    chunk_rows = config.encode.batch_size * CHUNK_BATCHES
    sides = {size: edge_sides(config, preset, size, autoencoder.downsampling) for size in sizes}
    encode_batch = _batch_encoder(config, autoencoder, text, sides)
    starts = range(0, len(rows), chunk_rows)
    with stage.progress(len(rows), "pictures") as bar:
        for start in starts:
            path = work / f"chunk_{start:09d}.npz"
            count = min(chunk_rows, len(rows) - start)
            if not path.is_file():
                _encode_chunk(config, path, start, count, encode_batch)
            bar.update(count)
    facts = _facts(config, autoencoder, text, sides)
    fields = bucket_fields(autoencoder, text, sides)
    finished, counts = _assemble(work, [work / f"chunk_{start:09d}.npz" for start in starts], rows, fields, facts)
    stage.publish(finished, OUT)
    stage.report(len(rows), len(rows), **facts, buckets=counts)


def edge_sides(config: Config, preset: Preset, size: Size, downsampling: int) -> tuple[int, int]:
    """(h, w) of the largest attention map: the latent's side at the first level with attention."""
    levels = preset.unet.attention_levels
    if not levels:
        raise StageError(f"{config.model.preset}: got no attention_levels, expected at least one to have edges for")
    factor = downsampling * 2 ** min(levels)
    return tuple(max(1, side // factor) for side in size)


def edge_weights(config: Config) -> list[Path]:
    """The file of a learned edge detector, an input like the others; none where the detector needs no weights."""
    if not config.encode.edge_weights:
        return []
    path = Path(config.encode.edge_weights).expanduser()
    if not path.is_file():
        raise StageError(f"encode.edge_weights: got {str(path)!r}, which is no file here; expected pidinet's .pth")
    return [path]


def edge_facts(config: Config) -> str:
    """Which detector made the edge maps, and by which weights, for the records' manifest."""
    facts = f"{config.encode.edge_detector} threshold={config.encode.edge_threshold:g} max-pooled"
    return facts + "".join(f" weights={file_sha256(path)[:16]}" for path in edge_weights(config))


def bucket_fields(autoencoder: Any, text: Any, sides: dict[Size, tuple[int, int]]) -> dict[str, Fields]:
    """What the records of each bucket hold, also of one that gets no picture."""
    factor, channels = autoencoder.downsampling, 2 * autoencoder.latent_channels
    return {
        size_name(size): {
            MOMENTS: ("float16", (channels, size[0] // factor, size[1] // factor)),
            TOKEN_IDS: ("int32", (text.context_length,)),
            EDGES: ("uint8", edges),
        }
        for size, edges in sides.items()
    }


def _check_fit(config: Config, preset: Preset, autoencoder: Any, text: Any) -> None:
    """The parts must fit the network that will be trained on them: said now, not an hour later."""
    pairs = (
        ("latent_channels", autoencoder.latent_channels, preset.unet.latent_channels, "the autoencoder"),
        ("context_dim", text.dim, preset.unet.context_dim, "the text encoder"),
    )
    for key, got, expected, part in pairs:
        if got != expected:
            raise StageError(
                f"{part} gives {key} {got}, but the preset {config.model.preset} expects {expected}; "
                f"set unet.{key} in the preset, or choose another (model.preset in {config.file})"
            )
    multiple = autoencoder.downsampling * 2 ** (len(preset.unet.channels) - 1)
    for size in config.picture.sizes_px:
        if any(side % multiple for side in size):
            raise StageError(
                f"picture.sizes_px: got {list(size)}, expected multiples of {multiple} (autoencoder "
                f"{autoencoder.downsampling} x U-Net {multiple // autoencoder.downsampling}); set it in {config.file}"
            )


def _batch_encoder(
    config: Config, autoencoder: Any, text: Any, sides: dict[Size, tuple[int, int]]
) -> Callable[[np.ndarray, list[str]], dict[str, np.ndarray]]:
    """A function from fitted pictures uint8 (B,H,W,3) of one bucket and their captions to the records' fields."""
    import torch

    from raphael.encoders.edges import edge_map
    from raphael.objectives.autoencoding import to_network_range

    told = config.encode.edge_detector, config.encode.edge_threshold, config.encode.edge_weights

    def encode_batch(images: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            moments = autoencoder.encode_moments(to_network_range(torch.from_numpy(images))).numpy()
        return {
            MOMENTS: _half(moments),
            TOKEN_IDS: text.tokenize(captions).numpy().astype(np.int32),
            EDGES: edge_map(images, sides[images.shape[1:3]], *told),
        }

    return encode_batch


def _half(moments: np.ndarray) -> np.ndarray:
    half = moments.astype(np.float16)
    if not np.isfinite(half).all():
        raise StageError(
            f"the autoencoder's moments do not fit float16 (largest {np.abs(moments).max():.3g}); train it again with "
            "a larger autoencoder.kl_weight or a lower learning rate"
        )
    return half


def _encode_chunk(config: Config, path: Path, start: int, count: int, encode_batch: Callable) -> None:
    """Rows start .. start + count into one file, whole or not at all. Batches are the same whenever a run began.

    The file: "bucket" (count,), the index of each row's size, and the fields of each bucket that got any, in their
    rows' order.
    """
    sizes = config.picture.sizes_px
    buckets = np.empty(count, np.int64)
    fitted: dict[int, list[np.ndarray]] = {}
    captions: dict[int, list[str]] = {}
    pictures = read_pictures(SHARDS, CAPTIONS, start)
    for row, (_, caption, picture) in zip(range(count), pictures, strict=False):
        bucket = buckets[row] = nearest_size(picture.height, picture.width, sizes)
        fitted.setdefault(bucket, []).append(fit(picture, *sizes[bucket]))
        captions.setdefault(bucket, []).append(caption)
    pictures.close()
    arrays, size = {"bucket": buckets}, config.encode.batch_size
    for bucket in sorted(fitted):
        images, texts = np.stack(fitted.pop(bucket)), captions[bucket]
        parts = [encode_batch(images[at : at + size], texts[at : at + size]) for at in range(0, len(texts), size)]
        for name in parts[0]:
            arrays[f"{bucket}/{name}"] = np.concatenate([part[name] for part in parts])
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _facts(config: Config, autoencoder: Any, text: Any, sides: dict[Size, tuple[int, int]]) -> dict[str, Any]:
    (empty,) = text.tokenize([""]).tolist()
    return {
        "picture": to_dict(config.picture),
        "autoencoder": autoencoder.facts(),
        "text_encoder": {**text.facts(), "empty_token_ids": empty},
        "edge_detector": edge_facts(config),
        "edge_sides": {size_name(size): list(side) for size, side in sides.items()},
        "captions_sha256": file_sha256(CAPTIONS),
    }


def _assemble(
    work: Path, chunks: list[Path], rows: list[dict], fields: dict[str, Fields], facts: dict[str, Any]
) -> tuple[Path, dict[str, int]]:
    """Join the chunks into the records' folder, still in the work folder; and how many each bucket has."""
    folder, names = work / "records", list(fields)
    shutil.rmtree(folder, ignore_errors=True)
    counts, done = dict.fromkeys(names, 0), 0
    with RecordWriter(folder, fields, facts) as writer:
        for chunk in chunks:
            with np.load(chunk) as arrays:
                buckets = arrays["bucket"]
                for bucket in np.unique(buckets):
                    name, here = names[bucket], np.flatnonzero(buckets == bucket)
                    part = {field: arrays[f"{bucket}/{field}"] for field in fields[name]}
                    writer.append([rows[done + row]["key"] for row in here], part, name)
                    counts[name] += len(here)
            done += len(buckets)
    write_json(folder / CAPTIONS_FILE, {row["key"]: row["caption"] for row in rows})
    return folder, counts


def records_digest(folder: Path) -> str:
    """One sha256 over a folder's files by name, for comparing two runs."""
    lines = [f"{path.name} {file_sha256(path)}" for path in sorted(folder.iterdir())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main("encode", run, __doc__))
