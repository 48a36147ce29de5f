"""`python -m data_pipeline.tools.checking.check FOLDER_OR_FILE`: which images of a folder, of parquet files, of tars or
of COCO would be trained on, which not and why, before anything is trained.

The reasons are those of the stages source, select, download, filter and captions, in their order; an image has the
first that holds. It writes check.json and contact.png, a sheet of some that are used, into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.config.params import Config, load_config
from raphael.base.stage import StageError, one_clear_line, write_json

if TYPE_CHECKING:
    from data_pipeline.local_images.collection import Collection
    from data_pipeline.tools.checking.look import Looked

PROJECT = Path(__file__).resolve().parents[3]
SHEET_IMAGES, SHEET_COLUMNS, TILE_PX = 48, 8, 128
HASHED_AT_A_TIME = 512
NAMED = 5  # images of each reason that are named


@dataclass
class Seen:
    """What is known after all rows: of what is used, and of what is dropped."""

    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    noticed: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)  # of used images
    captions: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width) as stored
    hashes: list[np.ndarray] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)  # small images whose hash is not taken yet
    tiles: list[tuple[Any, str]] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)

    def drop(self, reason: str, name: str) -> None:
        self.dropped[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def hash_waiting(self) -> None:
        from data_pipeline.common.hashes.phash import phashes

        self.hashes.append(phashes(self.waiting))
        self.waiting = []


def settings(params: str | None, place: str, captions: str, sizes: list[list[int]] | None = None) -> Config:
    """The rules to check by: of a params.yaml, else the project's own. sizes: instead of picture.sizes_px."""
    from data_pipeline.local_images.kinds import kind_of
    from raphael.base.images.sizes import least_short_side

    config = load_config(params or PROJECT / "params.yaml")
    source = replace(config.source, kind=kind_of(place), path=place, captions=captions)
    picture, download, limits = config.picture, config.download, config.filter
    if sizes:
        picture = replace(picture, sizes_px=tuple(map(tuple, sizes)))
        short = least_short_side(sizes, limits.max_aspect_ratio)
        download = replace(download, image_size_px=short)
        limits = replace(limits, min_side_px=min(limits.min_side_px, short))  # of the stored image
    return replace(config, source=source, picture=picture, download=download, filter=limits)


def check(config: Config, bar: Any = None) -> tuple[dict[str, Any], Any]:
    """(what check.json holds, the contact sheet or None). Raises StageError where there is nothing to look at."""
    from data_pipeline.gateway.bodies import BodyLimits
    from data_pipeline.local_images.kinds import open_collection

    download, seen = config.download, Seen()
    limits = BodyLimits(download.max_bytes, download.max_pixels, download.max_decoded_bytes)
    collection = open_collection(config.source)
    found = collection.find(seen.dropped)
    total = len(found.rows) + seen.dropped.total()
    if not total:
        raise StageError(f"{config.source.path}: no image in it; expected {collection.expected}")
    step = max(1, len(found.rows) // SHEET_IMAGES)
    _go_through(config, found.rows, (collection, limits, step, bar), seen)
    collection.close()
    seen.hash_waiting()
    images = len(dict.fromkeys(row.name for row in found.rows))
    return _told(config, seen, found, {"total": total, "images": images}), _sheet(seen)


def _go_through(config: Config, rows: list, told: tuple[Collection, Any, int, Any], seen: Seen) -> None:
    from data_pipeline.local_images.collection import UNREADABLE
    from data_pipeline.tools.checking.look import look

    collection, limits, step, bar = told
    name, looked, taken = "", None, {}
    for number, row in enumerate(rows):
        if row.name != name:
            name, taken = row.name, {}
            looked = look(collection.body(name), limits, config.source.kind != "pictures")
            seen.noticed.update(looked.noticed)
        if bar is not None:
            bar.update(1)
        reason = looked.reason if looked.reason == UNREADABLE else _caption_reason(row.caption, config, taken)
        if reason := reason or _image_reason(looked, config, seen):
            seen.drop(reason, row.name)
            continue
        if reason := _cleaned(row.caption, config):
            seen.drop(reason, row.name)
            continue
        _use(row, looked, number % step == 0, config, seen)


def _caption_reason(caption: str, config: Config, taken: dict[str, None]) -> str:
    """Of `select`: by the caption alone, and by what the image's other captions are."""
    select, chars = config.select, len(caption.strip())
    if chars < select.min_caption_chars:
        return "caption too short"
    if chars > select.max_caption_chars:
        return "caption too long"
    if taken and select.unique_urls:
        return "duplicate url" if caption in taken else "another caption of a kept url"
    taken[caption] = None
    return ""


def _image_reason(looked: Looked, config: Config, seen: Seen) -> str:
    """Of `download` and `filter`."""
    from data_pipeline.common.rules import SAME_BYTES, score_rules, size_rules
    from data_pipeline.common.schema import HEIGHT, WIDTH

    if looked.reason:
        return looked.reason
    height, width = stored_size(looked, config)
    columns = {HEIGHT: np.array([float(height)]), WIDTH: np.array([float(width)])}
    no_scores = replace(config.filter, missing_score="keep", missing_unsafe="keep")
    scores = dict.fromkeys(("similarity", "unsafe", "watermark", "aesthetic"), np.array([np.nan]))
    for reason, marks in [*score_rules(no_scores), *size_rules(config.picture)]:
        if marks({**scores, **columns})[0]:
            return reason
    if looked.sha256 in seen.digests:
        return SAME_BYTES
    seen.digests.add(looked.sha256)
    return ""


def _cleaned(caption: str, config: Config) -> str:
    from data_pipeline.common.caption_rules import clean, drop_reason

    return drop_reason(clean(caption), config.captions) or ""


def stored_size(looked: Looked, config: Config) -> tuple[int, int]:
    """(height, width) as `download` stores it: the short side brought down to download.image_size_px."""
    scale = min(1.0, config.download.image_size_px / min(looked.height, looked.width))
    return round(looked.height * scale), round(looked.width * scale)


def _use(row: Any, looked: Looked, is_shown: bool, config: Config, seen: Seen) -> None:
    from data_pipeline.common.caption_rules import clean

    caption = clean(row.caption).text
    seen.names.append(row.name)
    seen.captions.append(caption)
    seen.sizes.append(stored_size(looked, config))
    seen.waiting.append(looked.small)
    if len(seen.waiting) >= HASHED_AT_A_TIME:
        seen.hash_waiting()
    if is_shown and len(seen.tiles) < SHEET_IMAGES:
        seen.tiles.append((looked.small, caption))


def _told(config: Config, seen: Seen, found: Any, counts: dict[str, int]) -> dict[str, Any]:
    from data_pipeline.tools.checking.summary import alike, buckets, caption_facts

    dropped = {reason: count for reason, count in sorted(seen.dropped.items()) if count}
    used = len(seen.names)
    assert counts["total"] == used + sum(dropped.values())
    return {
        "kind": config.source.kind,
        "path": str(config.source.path),
        **counts,
        "used": used,
        "dropped": dropped,
        "examples": {reason: names for reason, names in sorted(seen.examples.items())},
        "handled": dict(sorted(seen.noticed.items())),
        **found.facts,
        "captions_of_used": caption_facts(seen.captions),
        "duplicates": alike(seen.names, np.concatenate(seen.hashes)),
        "sizes_px": [list(size) for size in config.picture.sizes_px],
        "too_small": config.picture.too_small,
        "buckets": buckets(seen.sizes, config.picture.sizes_px),
    }


def _sheet(seen: Seen) -> Any:
    from PIL import Image

    from raphael.base.images.grid import image_grid

    if not seen.tiles:
        return None
    tiles = []
    for small, _ in seen.tiles:
        tile = Image.new("RGB", (TILE_PX, TILE_PX), "white")
        tile.paste(small, ((TILE_PX - small.width) // 2, (TILE_PX - small.height) // 2))
        tiles.append(tile)
    return image_grid(tiles, SHEET_COLUMNS, [caption for _, caption in seen.tiles])


def write(found: dict[str, Any], sheet: Any, out: Path) -> str:
    """check.json and contact.png into a folder; -> what they say, for a person."""
    from data_pipeline.tools.checking.summary import text

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "check.json", found)
    if sheet is not None:
        sheet.save(out / "contact.png")
    return text(found, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check", description=__doc__.split("\n\n")[1])
    parser.add_argument("place", help="a folder, a parquet file or a tar; images lie in it")
    parser.add_argument("--params", help="a params.yaml whose limits hold (default: the project's)")
    parser.add_argument("--captions", default="auto", choices=("auto", "sidecar", "metadata", "file_name"))
    parser.add_argument("--size", action="append", default=[], metavar="HxW", help="a size to train at; repeatable")
    parser.add_argument("--out", type=Path, default=Path("reports/check"), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print what check.json holds, nothing else")
    given = parser.parse_args(argv)
    with one_clear_line("check") as outcome:
        from tqdm import tqdm

        config = settings(given.params, given.place, given.captions, [_size(value) for value in given.size])
        with tqdm(desc="check", unit=" images", disable=given.json or not sys.stderr.isatty()) as bar:
            found, sheet = check(config, bar)
        told = write(found, sheet, given.out)
        print(json.dumps(found, ensure_ascii=False) if given.json else told)
        if not found["used"]:
            raise StageError(f"{given.place}: not one of {found['total']} is used; the reasons are above")
    return outcome.status


def _size(value: str) -> list[int]:
    try:
        height, width = map(int, value.lower().split("x"))
    except ValueError:
        raise StageError(f"--size: got {value!r}, expected height x width in px, such as 512x768") from None
    return [height, width]


if __name__ == "__main__":
    raise SystemExit(main())
