"""The same few images in every form that people have: sidecars, metadata, parquet, tars."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from truth.image_workspace import add_member, drawn, png


def bodies(count: int, width: int = 80, height: int = 72) -> list[tuple[str, str, bytes]]:
    """(name, caption, PNG) of images that differ."""
    found = []
    for number in range(count):
        caption, image = drawn(number, width, height)
        found.append((f"image_{number:02d}", f"{caption}, number {number}", png(image)))
    return found


def sidecars(root: Path, count: int = 6, suffix: str = ".txt") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, caption, body in bodies(count):
        (root / f"{name}.png").write_bytes(body)
        (root / f"{name}{suffix}").write_text(caption + "\n")
    return root


def with_metadata(root: Path, count: int = 6, form: str = "jsonl", **columns: str) -> Path:
    """columns: names instead of text."""
    text = columns.get("text", "text")
    (root / "train").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, caption, body in bodies(count):
        (root / "train" / f"{name}.png").write_bytes(body)
        rows.append({"file_name": f"{name}.png", text: caption})
    file = root / "train" / f"metadata.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        lines = [f"file_name,{text}", *(f'{row["file_name"]},"{row[text]}"' for row in rows)]
        file.write_text("\ufeff" + "\r\n".join(lines) + "\r\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return root


def in_parquet(file: Path, count: int = 6, plain: bool = False, **names: str) -> Path:
    """plain: bytes as they are, not {bytes, path}."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image, text = names.get("image", "image"), names.get("text", "text")
    rows = [
        {image: body if plain else {"bytes": body, "path": f"{name}.png"}, text: caption}
        for name, caption, body in bodies(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    return file


def in_tar(file: Path, count: int = 6, captions: str = "txt") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, caption, body in bodies(count):
            add_member(tar, f"{name}.png", body)
            told = caption if captions == "txt" else json.dumps({"caption": caption, "width": 80})
            add_member(tar, f"{name}.{captions}", told.encode())
    return file


def settings(project: Path, kind: str, place: Path, **changes: object):
    """The project's settings for a local kind, its sizes 64 x 64."""
    from dataclasses import replace

    from raphael.base.config.params import load_config

    config = load_config(project / "params.yaml")
    source = replace(config.source, kind=kind, path=str(place), **changes)
    kept = replace(config.filter, missing_score="keep", missing_unsafe="keep")
    return replace(config, source=source, filter=kept)


def found(config) -> tuple[dict[str, str], dict[str, int], dict[str, object]]:
    """(caption of each name, reasons, facts) of a collection."""
    from data_pipeline.local_images.kinds import open_collection

    collection, dropped = open_collection(config.source), Counter()
    listed = collection.find(dropped)
    return {row.name: row.caption for row in listed.rows}, {k: v for k, v in dropped.items() if v}, listed.facts
