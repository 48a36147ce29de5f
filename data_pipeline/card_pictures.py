"""Why each picture was dropped, judged again row by row, and a few of each side as thumbnails."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.captions import CAPTIONS, PICTURES, drop_reason
from data_pipeline.schema import CAPTION, HEIGHT, ID, KEY, SHA256, SHARD, STATUS, SUCCESS, WIDTH
from data_pipeline.select import LINKS, open_parquet
from data_pipeline.shard_rows import SHARDS, ListScores, computed_scores, shard_tables
from raphael.stage import StageError

if TYPE_CHECKING:
    import numpy as np

    from raphael.config import Config

DROPPED = Path("reports/dropped.json")  # written by the stage captions, shown by the report
DROPPED_SHARDS = (
    8  # are looked at for it: the first pictures of each reason, at a cost that does not grow with the data
)
SHOWN = 6  # pictures of a reason
SHOWN_KEPT = 18
THUMBNAIL_PX = 112
WITHHELD = ("unsafe", "opted out")  # counted, never shown
ALIKE = "looks like another"
ALIKE_REASONS = ("near duplicate", "like an evaluation picture")
Sides = dict[str, dict[str, dict[str, Any]]]  # stage -> reason -> {count, cards: [{key, uri, caption}]}


def dropped(config: Config) -> dict[str, dict[str, list[dict[str, str]]]]:
    """{stage: {reason: [{key, uri, caption}]}} of the first shards, by the reasons of the stages' reports."""
    sides = judged(config, DROPPED_SHARDS)
    alike = sides["filter"].pop(ALIKE, None)
    if alike and not config.filter.evaluation_pictures:  # else nobody knows here which of the two they looked like
        sides["filter"]["near duplicate"] = alike
    return {
        stage: {reason: entry["cards"] for reason, entry in sides[stage].items() if entry["cards"]}
        for stage in ("filter", "captions")
    }


def judged(config: Config, most_shards: int | None = None) -> Sides:
    """{"filter": .., "captions": .., "kept": {"kept": ..}}: of each reason how many, and the first few pictures.

    Of the kept ones those shown are spread over all of them. most_shards: only so many are looked at.
    """
    sides: Sides = {"filter": {}, "captions": {}, "kept": {}}
    if not (PICTURES.is_file() and CAPTIONS.is_file() and any(SHARDS.glob("*.parquet"))):
        return sides
    tables = shard_tables(SHARDS)[:most_shards]
    pictures = _rows(PICTURES, tables[-1])
    _judge_filter(config, tables, {row[KEY] for row in pictures}, sides["filter"])
    captioned = _rows(CAPTIONS, tables[-1])
    _judge_captions(config, pictures, {row[KEY] for row in captioned}, sides["captions"])
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

    from data_pipeline.filter import _opt_out_rules
    from data_pipeline.opt_out import OptOut
    from data_pipeline.rules import apply, score_rules

    scores, opt_out = ListScores(LINKS), OptOut.read(config.filter.opt_out)
    seen: set[str] = set()
    for path in tables:
        table = open_parquet(path).read()
        ids = table[ID].to_numpy()
        columns = scores.of(ids, path) | computed_scores(path, ids)
        columns |= {part: table[part].cast("float64").to_numpy(zero_copy_only=False) for part in (WIDTH, HEIGHT)}
        alive = pc.equal(table[STATUS], SUCCESS).to_numpy(zero_copy_only=False).copy()
        rows = table.select([KEY, CAPTION, SHA256]).to_pylist()
        for rule in _opt_out_rules(table, opt_out) + score_rules(config.filter):
            left = apply([rule], columns, alive, {})
            _note(into, rule[0], [rows[place] for place in (alive & ~left).nonzero()[0]], path)
            alive = left
        _after_rules(rows, alive, kept, seen, (into, path))


def _after_rules(rows: list[dict], alive: np.ndarray, kept: set[str], seen: set[str], place: tuple) -> None:
    """Equal bytes, then what is missing all the same: it looked like another picture."""
    into, path = place
    for row in (rows[number] for number in alive.nonzero()[0]):
        if row[SHA256] in seen:
            _note(into, "duplicate picture", [row], path)
        elif row[KEY] not in kept:
            _note(into, ALIKE, [row], path)
        seen.add(row[SHA256])


def _judge_captions(config: Config, pictures: list[dict], kept: set[str], into: dict[str, dict[str, Any]]) -> None:
    from data_pipeline.caption_rules import clean

    for row in pictures:
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
    from data_pipeline.pictures import Shard

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
                picture = opened.picture(key)
            except StageError:  # a broken picture has no thumbnail; the count stays
                continue
            picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            uris[shard, key] = _uri(picture)
    finally:
        opened.close()
    for entry in entries:
        cards = [(key, uris.get((shard, key)), text) for shard, key, text in entry["cards"]]
        entry["cards"] = [{"key": key, "uri": uri, "caption": text or ""} for key, uri, text in cards if uri]


def _uri(picture: Any) -> str:
    """A small RGB picture as a data URI: JPEG, since photographs as PNG take five times as much."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
