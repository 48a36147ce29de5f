"""Images that lie here as a link list: a folder, COCO, parquet files that hold images, webdataset's tars
(data_pipeline/local_images).

Images stay where they are; rows say http://<download.local_host>/<name in the collection>, and the stage download takes
their bytes by these names. Scores do not exist for local images: the columns are null, and params.coco.yaml says
`filter.missing_score: keep`.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline.common.places import REPEATS, SOURCE
from data_pipeline.local_images.collection import UNREADABLE, Captioned, Collection, Found, address_of
from data_pipeline.local_images.kinds import open_collection
from data_pipeline.source.output import fresh_folder, write_prompts, write_rows
from raphael.base.config.params import Config
from raphael.base.stage import Progress, Stage, StageError

SUITE = "captions"
HELD_OUT, BEYOND = "held out for evaluation", "beyond source.max_rows"


def run(config: Config, stage: Stage) -> None:
    source = config.source
    collection = open_collection(source)
    dropped: Counter[str] = Counter()
    found = collection.find(dropped)
    total = len(found.rows) + dropped.total()
    if not found.rows:
        counted = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise StageError(
            f"{source.path}: no image with a caption found ({counted or '0 images'}); expected {collection.expected}"
        )
    rows, heldout = _part(found, config, dropped)
    prompts = [{"prompt": text, "suite": SUITE, "truth": None, "reference": name} for text, name in heldout]
    work = stage.workdir(source.kind, str(source.path), source.fingerprint, source.max_rows)
    folder = fresh_folder(work)
    with stage.progress(len(rows), "rows") as bar:
        table = _with_sizes(collection, rows, config.download.local_host, bar, dropped)
    collection.close()
    if not table:
        raise StageError(
            f"{source.path}: none of the {len(rows)} images can be read; expected PNG, JPEG, WebP, BMP or GIF files"
        )
    write_rows(folder / "metadata.parquet", table)
    write_prompts(folder, source.kind, prompts)
    stage.publish(folder, SOURCE)
    shutil.rmtree(work)
    facts = {"kind": source.kind, "heldout_prompts": len(prompts), **found.facts}
    stage.report(total, len(table), dict(sorted(dropped.items())), **facts)


def _part(found: Found, config: Config, dropped: Counter[str]) -> tuple[list[Captioned], list[tuple[str, str]]]:
    """(rows, (caption, name) of the prompts): the collection's own prompts, or a tenth of its images at most."""
    rows, most = found.rows, config.source.max_heldout_prompts
    heldout = found.heldout
    if heldout is None:
        names = list(dict.fromkeys(row.name for row in rows))
        number = min(most, len(names) // 10)
        chosen = set(random.Random(f"{config.seed}/folder").sample(names, number))
        first = {row.name: row.caption for row in reversed(rows) if row.name in chosen}
        heldout = [(first[name], name) for name in names if name in chosen]
        dropped[HELD_OUT] += sum(row.name in chosen for row in rows)
        rows = [row for row in rows if row.name not in chosen]
    if config.source.max_rows and len(rows) > config.source.max_rows:
        dropped[BEYOND] = len(rows) - config.source.max_rows
        rows = rows[: config.source.max_rows]
    return rows, heldout[:most]


def _with_sizes(
    collection: Collection, rows: Sequence[Captioned], host: str, bar: Progress, dropped: Counter[str]
) -> list[dict[str, Any]]:
    """Rows of metadata.parquet; width and height come from the images' headers. Unreadable images are dropped."""
    from PIL import Image, UnidentifiedImageError

    sizes: dict[str, tuple[int, int] | None] = {}
    unreadable: set[str] = set()
    table = []
    scores = dict.fromkeys(("similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE"))
    repeated = any(row.repeats > 1 for row in rows)
    for row in rows:
        if row.name not in sizes:
            try:
                sizes[row.name] = collection.size(row.name)
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                sizes[row.name] = None
                unreadable.add(row.name)
        bar.update(1)
        if row.name in unreadable:
            dropped[UNREADABLE] += 1
            continue
        width, height = sizes[row.name] or (None, None)
        entry = {"URL": address_of(host, row.name), "TEXT": row.caption, "WIDTH": width, "HEIGHT": height, **scores}
        table.append({**entry, REPEATS: row.repeats} if repeated else entry)
    return table
