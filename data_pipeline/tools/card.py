"""The data card: `raphael data card` writes reports/data_card.json and reports/data_card.html, complete in itself.

What the data are, how many rows each filter dropped and why, with images of both sides, scores, sizes and licences.
Everything is counted anew from the tables; where a count is not the one that a stage reported the card says so.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.params import load_config
from raphael.base.files import written_whole
from raphael.base.stage import StageError, one_clear_line, read_json, write_json

if TYPE_CHECKING:
    from raphael.base.config.params import Config

REPORTS = Path("reports")
CARD, PAGE = REPORTS / "data_card.json", REPORTS / "data_card.html"
LICENCE_COLUMNS = ("license", "licence", "rights", "license_url", "licence_url", "image_license")
MOST_LISTED = 12
BINS = 40


def gather(config: Config) -> dict[str, Any]:
    """What data_card.json holds; images are the page's alone (data_pipeline/common/dropped.py)."""
    from raphael.evaluate.report.sections import funnel

    stages = funnel(REPORTS, with_images=False)
    if not stages:
        raise StageError(f"{REPORTS}: got no report of a stage, expected at least source.json; run dvc repro")
    records = record_counts()
    return {
        "source": {"kind": config.source.kind, "path": config.source.path},
        "stages": stages,
        "forgotten": forgotten(stages, records),
        "adds_up": not any(stage["broken"] for stage in stages),
        "rehearsal": next((stage["rehearsal"] for stage in stages if stage["rehearsal"]), 0),
        "licences": licences(),
        "hosts": hosts(),
        "scores": scores(config),
        "sizes": sizes(),
        "buckets": records or {},
    }


def forgotten(stages: list[dict[str, Any]], records: dict[str, int] | None) -> dict[str, Any]:
    """Records that owners had removed after the last run: as many as the reports of `raphael data forget` say, or the
    card is out of step with the data ("explained" is false)."""
    reports = [entry for path in sorted(REPORTS.glob("forget-*.json")) for entry in read_json(path)["requests"]]
    removed = sum(entry["removed"].get("data/records/keys.txt", 0) for entry in reports)
    encoded = next((stage["kept"] for stage in stages if stage["name"] == "encode"), None)
    missing = encoded - sum(records.values()) if records is not None and encoded is not None else 0
    return {"requests": len(reports), "records": missing, "explained": 0 <= missing <= removed}


def record_counts() -> dict[str, int] | None:
    """Records of each size, from the manifest; None where there are none that this version reads."""
    from raphael.base.manifest import ManifestError, read_manifest
    from raphael.base.records import FORM

    try:
        about = read_manifest("data/records", FORM)["facts"]
    except ManifestError:
        return None
    return {entry["name"]: entry["count"] for entry in about["buckets"]}


def licences() -> dict[str, Any]:
    """{column, counts} of the list's licence column, or {column: None}: then nobody said."""
    from data_pipeline.common.places import METADATA
    from data_pipeline.common.tables import open_parquet

    if not METADATA.is_file():
        return {"column": None, "counts": {}}
    file = open_parquet(METADATA)
    column = next((name for name in file.schema_arrow.names if name.lower() in LICENCE_COLUMNS), None)
    if column is None:
        return {"column": None, "counts": {}}
    counts: Counter[str] = Counter()
    for batch in file.iter_batches(columns=[column]):
        counts.update("not stated" if value is None else str(value) for value in batch[column].to_pylist())
    return {"column": column, "counts": dict(counts.most_common(MOST_LISTED)), "kinds": len(counts)}


def hosts() -> dict[str, int]:
    """Where kept images come from, the most frequent first."""
    import urllib.parse

    from data_pipeline.common.places import FILTERED
    from data_pipeline.common.schema import URL
    from data_pipeline.common.tables import open_parquet

    counts: Counter[str] = Counter()
    if FILTERED.is_file():
        for batch in open_parquet(FILTERED).iter_batches(columns=[URL]):
            counts.update(urllib.parse.urlsplit(url).hostname or "?" for url in batch[URL].to_pylist())
    return dict(counts.most_common(MOST_LISTED))


def scores(config: Config) -> dict[str, Any]:
    """Of each score: edges of 40 equal steps, how many links and how many kept images lie between them, how many
    links have none, and the threshold."""
    import numpy as np

    from data_pipeline.common.places import FILTERED, LINKS
    from data_pipeline.common.rules import limits
    from data_pipeline.common.schema import SCORES
    from data_pipeline.common.tables import open_parquet

    known_limits, found = limits(config.filter), {}
    for name in SCORES:
        everything, kept = _computed(name), np.empty(0)
        if everything is None and LINKS.is_file():
            everything = open_parquet(LINKS).read(columns=[name])[name].to_numpy()
        if FILTERED.is_file():
            kept = open_parquet(FILTERED).read(columns=[name])[name].to_numpy()
        if everything is None or not np.isfinite(everything).any():
            continue
        known = everything[np.isfinite(everything)]
        edges = np.linspace(known.min(), max(known.max(), known.min() + 1e-6), BINS + 1)
        limit = known_limits[name]
        found[name] = {
            "edges": edges.tolist(),
            "links": np.histogram(known, edges)[0].tolist(),
            "kept": np.histogram(kept[np.isfinite(kept)], edges)[0].tolist(),
            "none": int(len(everything) - len(known)),
            limit.kind: limit.value,
        }
    return found


def _computed(name: str) -> Any:
    """A score that the stage `score` computed, float64 (n,); None where it is the list's."""
    import numpy as np

    from data_pipeline.common.places import SCORED, SCORES_FACTS
    from data_pipeline.common.tables import open_parquet

    if not (SCORED / SCORES_FACTS).is_file() or name not in read_json(SCORED / SCORES_FACTS)["computed"]:
        return None
    tables = sorted(SCORED.glob("*.parquet"))
    return np.concatenate([open_parquet(path).read(columns=[name])[name].to_numpy() for path in tables])


def sizes() -> dict[str, Any]:
    """Of the kept images, as stored: edges and counts of the short side and of width over height."""
    import numpy as np

    from data_pipeline.common.places import FILTERED
    from data_pipeline.common.schema import HEIGHT, WIDTH
    from data_pipeline.common.tables import open_parquet

    if not FILTERED.is_file():
        return {}
    table = open_parquet(FILTERED).read(columns=[WIDTH, HEIGHT])
    if not len(table):  # all of them forgotten
        return {}
    width, height = (table[name].to_numpy().astype(np.float64) for name in (WIDTH, HEIGHT))
    found = {}
    for name, values in (("short_side_px", np.minimum(width, height)), ("width_over_height", width / height)):
        edges = np.linspace(values.min(), max(values.max(), values.min() * 1.01), BINS // 2 + 1)
        found[name] = {"edges": edges.tolist(), "kept": np.histogram(values, edges)[0].tolist()}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="card", description=__doc__.split("\n\n")[0])
    parser.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with one_clear_line("card") as outcome:
        config = load_config(arguments.params)
        os.chdir(Path(arguments.params).resolve().parent)
        write(config)
        print(f"{PAGE} (numbers: {CARD})")
    return outcome.status


def write(config: Config) -> dict[str, Any]:
    """Both files; returns what the JSON holds."""
    from data_pipeline.common.dropped import judged
    from data_pipeline.tools.card_page import render

    card = gather(config)
    sides = judged(config)
    card["recounted"] = {stage: {reason: found["count"] for reason, found in by.items()} for stage, by in sides.items()}
    told = {stage["name"]: {row["reason"]: row["count"] for row in stage["dropped"]} for stage in card["stages"]}
    card["differing"] = [
        stage for stage in sides if stage in told and sides[stage] and not _same(told[stage], card["recounted"][stage])
    ]
    write_json(CARD, card)
    with written_whole(PAGE) as temporary:
        temporary.write_text(render(card, sides), encoding="utf-8")
    return card


def _same(told: dict[str, int], counted: dict[str, int]) -> bool:
    """Whether the reasons' counts are equal; images that look alike are counted as one reason anew."""
    from data_pipeline.common.dropped import ALIKE, ALIKE_REASONS

    merged: Counter[str] = Counter()
    for reason, count in told.items():
        merged[ALIKE if reason in ALIKE_REASONS else reason] += count
    return dict(merged) == {reason: count for reason, count in counted.items() if reason != "kept"}


if __name__ == "__main__":
    raise SystemExit(main())
