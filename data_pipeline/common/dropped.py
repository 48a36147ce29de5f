"""Why each image was dropped, judged again row by row, and a few of each side as thumbnails."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.caption_rules import clean, drop_reason
from data_pipeline.common.places import CAPTIONS, FILTERED, LINKS, SHARDS
from data_pipeline.common.rules import (
    EVALUATION,
    NEAR,
    OPTED_OUT,
    SAME_BYTES,
    TOO_UNSAFE,
    apply,
    opt_out_rules,
    score_rules,
    size_rules,
)
from data_pipeline.common.schema import CAPTION, HEIGHT, ID, KEY, SHA256, SHARD, STATUS, SUCCESS, WIDTH
from data_pipeline.common.shard_rows import ListScores, computed_scores, shard_tables
from data_pipeline.common.tables import open_parquet
from raphael.base.stage import StageError

if TYPE_CHECKING:
    import numpy as np

    from raphael.base.config.params import Config

DROPPED_SHARDS = 8  # are looked at for it: the first images of each reason, at a cost that does not grow with the data
SHOWN = 6  # images of a reason
SHOWN_KEPT = 18
THUMBNAIL_PX = 112
WITHHELD = (TOO_UNSAFE, OPTED_OUT)  # counted, never shown
ALIKE = "looks like another"
ALIKE_REASONS = (NEAR, EVALUATION)
Sides = dict[str, dict[str, dict[str, Any]]]  # stage -> reason -> {count, cards: [{key, uri, caption}]}


def dropped(config: Config) -> dict[str, dict[str, list[dict[str, str]]]]:
    """{stage: {reason: [{key, uri, caption}]}} of the first shards, by the reasons of the stages' reports."""
    sides = judged(config, DROPPED_SHARDS)
    alike = sides["filter"].pop(ALIKE, None)
    if alike and not config.filter.evaluation_pictures:  # else nobody knows here which of the two they looked like
        sides["filter"][NEAR] = alike
    return {
        stage: {reason: entry["cards"] for reason, entry in reasons.items() if entry["cards"]}
        for stage, reasons in sides.items()
        if stage != "kept"
    }


def judged(config: Config, most_shards: int | None = None) -> Sides:
    """{"filter": .., "captions": .., "kept": {"kept": ..}}: of each reason how many, and the first few images.

    Of the kept ones those shown are spread over all of them. most_shards: only so many are looked at.
    """
    sides: Sides = {"filter": {}, "captions": {}, "kept": {}}
    if not (FILTERED.is_file() and CAPTIONS.is_file() and any(SHARDS.glob("*.parquet"))):
        return sides
    tables = shard_tables(SHARDS)[:most_shards]
    images = _rows(FILTERED, tables[-1])
    _judge_filter(config, tables, {row[KEY] for row in images}, sides["filter"])
    captioned = _rows(CAPTIONS, tables[-1])
    _judge_captions(config, images, {row[KEY] for row in captioned}, sides["captions"])
    step = max(1, len(captioned) // SHOWN_KEPT)
    sides["kept"]["kept"] = {
        "count": len(captioned),
        "cards": [(row[SHARD], row[KEY], row[CAPTION]) for row in captioned[::step][:SHOWN_KEPT]],
    }
    _draw(sides)
    return sides


def _rows(path: Path, last: Path) -> list[dict[str, Any]]:
    """Key, shard and caption of a table's rows up to the shard `last`; rows lie in the order of the shards."""
    rows: list[dict[str, Any]] = []
    for batch in open_parquet(path).iter_batches(columns=[KEY, SHARD, CAPTION]):
        part = batch.to_pylist()
        rows += [row for row in part if row[SHARD] <= last.with_suffix(".tar").name]
        if part and part[-1][SHARD] > last.with_suffix(".tar").name:
            break
    return rows


def _judge_filter(config: Config, tables: list[Path], kept: set[str], into: dict[str, dict[str, Any]]) -> None:
    """The rules of `filter` asked one at a time, so that a row's reason is known."""
    import pyarrow.compute as pc

    from data_pipeline.common.opt_out import OptOut

    scores, opt_out = ListScores(LINKS), OptOut.read(config.filter.opt_out)
    seen: set[str] = set()
    for path in tables:
        table = open_parquet(path).read()
        ids = table[ID].to_numpy()
        columns = scores.of(ids, path) | computed_scores(path, ids)
        columns |= {part: table[part].cast("float64").to_numpy(zero_copy_only=False) for part in (WIDTH, HEIGHT)}
        alive = pc.equal(table[STATUS], SUCCESS).to_numpy(zero_copy_only=False).copy()
        rows = table.select([KEY, CAPTION, SHA256]).to_pylist()
        for rule in [*opt_out_rules(table, opt_out), *score_rules(config.filter), *size_rules(config.picture)]:
            left = apply([rule], columns, alive, {})
            _note(into, rule[0], [rows[place] for place in (alive & ~left).nonzero()[0]], path)
            alive = left
        _after_rules(rows, alive, kept, seen, (into, path))


def _after_rules(rows: list[dict], alive: np.ndarray, kept: set[str], seen: set[str], place: tuple) -> None:
    """Equal bytes, then what is missing all the same: it looked like another image."""
    into, path = place
    for row in (rows[number] for number in alive.nonzero()[0]):
        if row[SHA256] in seen:
            _note(into, SAME_BYTES, [row], path)
        elif row[KEY] not in kept:
            _note(into, ALIKE, [row], path)
        seen.add(row[SHA256])


def _judge_captions(config: Config, images: list[dict], kept: set[str], into: dict[str, dict[str, Any]]) -> None:
    for row in images:
        if row[KEY] not in kept:
            reason = drop_reason(clean(row[CAPTION]), config.captions) or "unknown"
            _note(into, reason, [row], SHARDS / row[SHARD])


def _note(into: dict[str, dict[str, Any]], reason: str, rows: list[dict], path: Path) -> None:
    if not rows:
        return
    entry = into.setdefault(reason, {"count": 0, "cards": []})
    entry["count"] += len(rows)
    room = 0 if reason in WITHHELD else max(0, SHOWN - len(entry["cards"]))
    entry["cards"] += [(path.with_suffix(".tar").name, row[KEY], row[CAPTION]) for row in rows[:room]]


def _draw(sides: Sides) -> None:
    """Turn (shard, key, caption) into {key, uri, caption}; every shard is opened once."""
    from data_pipeline.common.images import Shard

    entries = [entry for reasons in sides.values() for entry in reasons.values()]
    wanted = sorted({(shard, key) for entry in entries for shard, key, _ in entry["cards"]})
    uris: dict[tuple[str, str], str] = {}
    opened = Shard(None)
    try:
        for shard, key in wanted:
            if opened.path != SHARDS / shard:
                opened.close()
                opened = Shard(SHARDS / shard)
            try:
                image = opened.image(key)
            except StageError:  # a broken image has no thumbnail; the count stays
                continue
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            uris[shard, key] = _uri(image)
    finally:
        opened.close()
    for entry in entries:
        cards = [(key, uris.get((shard, key)), text) for shard, key, text in entry["cards"]]
        entry["cards"] = [{"key": key, "uri": uri, "caption": text or ""} for key, uri, text in cards if uri]


def _uri(image: Any) -> str:
    """A small RGB image as a data URI: JPEG, since photographs as PNG take five times as much."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
