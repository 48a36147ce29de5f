"""The card's counts are those of the tables, its reasons those of a naive judgement, its page complete in itself."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common import dropped as dropped_images
from data_pipeline.common import places
from data_pipeline.tools import card
from data_pipeline.tools.card_page import histogram
from raphael.base.config.params import load_config
from raphael.base.records import RecordWriter
from raphael.base.stage import StageError, read_json, write_json
from raphael.evaluate.report.findings import beside
from raphael.evaluate.report.sections import funnel
from tests.truth.image_workspace import add_member, drawn, png, write_params

GOOD = {"similarity": 0.3, "unsafe": 0.1, "watermark": 0.1, "aesthetic": 5.5}
BAD = {3: {"watermark": 0.9}, 4: {"aesthetic": 2.0}, 5: {"watermark": 0.7, "unsafe": 0.9}, 9: {"unsafe": 0.8}}
ALIKE, SAME, NO_WORDS = 6, 7, 8  # 7 has the bytes of 0; 6 was found to look like another


def body(number: int) -> bytes:
    return png(drawn(number if number != SAME else 0)[1])


@pytest.fixture
def workspace(tmp_path: Path, project: Path):
    rows = [
        {
            "key": f"{number:09d}", "id": number, "url": f"http://h{number % 2}.example/{number}.png",
            "caption": "<b>bold</b> words" if number != NO_WORDS else "http://x.example/", "status": "success",
            "width": 80, "height": 64 + number, "sha256": hashlib.sha256(body(number)).hexdigest(),
            "source_sha256": None, "shard": "00000.tar", **GOOD, **BAD.get(number, {}),
        }
        for number in range(10)
    ]  # fmt: skip
    for name in ("source", "selected", "shards", "filtered", "captions", "records"):
        (tmp_path / "data" / name).mkdir(parents=True)
    licence = [{"URL": row["url"], "License": "CC BY" if row["id"] % 3 else None} for row in rows]
    pq.write_table(pa.Table.from_pylist(licence), tmp_path / "data/source/metadata.parquet")
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "data/selected/links.parquet")
    pq.write_table(table.drop_columns(list(GOOD)), tmp_path / "data/shards/00000.parquet")
    with tarfile.open(tmp_path / "data/shards/00000.tar", "w") as tar:
        for row in rows:
            add_member(tar, f"{row['key']}.png", body(row["id"]))
    kept = [row for row in rows if row["id"] not in {*BAD, ALIKE, SAME}]
    pq.write_table(pa.Table.from_pylist(kept), tmp_path / "data/filtered/pictures.parquet")
    kept = [row for row in kept if row["id"] != NO_WORDS]
    pq.write_table(pa.Table.from_pylist(kept), tmp_path / "data/captions/captions.parquet")
    with RecordWriter(tmp_path / "data/records", {"64x64": {}, "64x96": {}}, {}) as writer:
        writer.append([row["key"] for row in kept], {}, "64x96")
    dropped = {"watermarked": 2, "unsafe": 1, "aesthetic too low": 1, "near duplicate": 1, "duplicate picture": 1}
    for name, total, fewer in (
        ("source", 10, {}), ("filter", 10, dropped), ("captions", 4, {"no words": 1}), ("encode", 3, {})
    ):  # fmt: skip
        report = {"stage": name, "total": total, "kept": total - sum(fewer.values()), "dropped": fewer}
        write_json(tmp_path / f"reports/{name}.json", report)
    write_params(tmp_path, project, filter={"min_side_px": 0})
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_every_row_has_the_reason_that_the_filter_gave_and_all_counts_fit(workspace):
    found = card.write(load_config("params.yaml"))
    recounted = {"watermarked": 2, "aesthetic too low": 1, "unsafe": 1, "duplicate picture": 1, "looks like another": 1}
    assert found["recounted"] == {"filter": recounted, "captions": {"no words": 1}, "kept": {"kept": 3}}
    assert found["adds_up"] and not found["differing"] and found["forgotten"]["explained"]
    assert found["licences"] == {"column": "License", "counts": {"CC BY": 6, "not stated": 4}, "kinds": 2}
    assert found["hosts"] == {"h0.example": 3, "h1.example": 1} and found["buckets"] == {"64x64": 0, "64x96": 3}
    marks = found["scores"]["watermark"]
    assert sum(marks["links"]) == 10 and sum(marks["kept"]) == 4 and marks["max"] == 0.5
    assert [marks["links"][0], marks["links"][-1]] == [8, 1] and read_json("reports/data_card.json") == found


def test_the_page_needs_nothing_else_and_shows_both_sides(workspace):
    card.write(load_config("params.yaml"))
    page = Path("reports/data_card.html").read_text()
    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(value for name, value in attributes if name in ("src", "href"))

    Reader().feed(page)
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert sum(source.startswith("data:") for source in sources) == 3 + 5 + 1, "unsafe images are counted only"
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold&lt;/b&gt; words" in page
    assert "looks like another (1)" in page and "unsafe (1)" in page and 'class="alarm"' not in page
    assert beside(Path("reports"), "")["data_card"] and not beside(Path("data"), "")["data_card"]


def test_the_report_gets_some_images_of_each_reason_and_none_that_is_withheld(workspace):
    """What the stage captions leaves: images 3 and 5 were marked, 4 is ugly, 6 looks like another, 7 is 0 again."""
    config = load_config("params.yaml")
    shown = dropped_images.dropped(config)
    keys = {
        stage: {reason: [int(card["key"]) for card in cards] for reason, cards in by.items()}
        for stage, by in shown.items()
    }
    marked = {"watermarked": [3, 5], "aesthetic too low": [4], "near duplicate": [6], "duplicate picture": [7]}
    assert keys == {"filter": marked, "captions": {"no words": [8]}}, "9 is unsafe: counted, never shown"
    write_json(places.DROPPED, shown)
    filtered = next(stage for stage in funnel(Path("reports")) if stage["name"] == "filter")
    assert {item["reason"]: len(item["cards"]) for item in filtered["pictures"]} == {
        reason: len(numbers) for reason, numbers in marked.items()
    }
    assert all(not stage["pictures"] for stage in funnel(Path("reports"), with_images=False))
    unlike = dataclasses.replace(config.filter, evaluation_pictures="references")
    shown = dropped_images.dropped(dataclasses.replace(config, filter=unlike))
    assert "near duplicate" not in shown["filter"], "two reasons are possible then, and nobody knows which"


def test_images_for_the_report_come_from_the_first_shards(workspace, monkeypatch):
    for suffix in (".tar", ".parquet"):
        shutil.copy(f"data/shards/00000{suffix}", f"data/shards/00001{suffix}")
    monkeypatch.setattr(dropped_images, "DROPPED_SHARDS", 1)  # of the second shard the list has no scores
    assert len(dropped_images.dropped(load_config("params.yaml"))["filter"]["watermarked"]) == 2


def test_a_rehearsal_says_so(workspace):
    write_json(Path("reports/download.json"), {**read_json("reports/source.json"), "rehearsal": {"photographs": 282}})
    assert card.write(load_config("params.yaml"))["rehearsal"] == 282
    assert "A rehearsal: 282 photographs" in Path("reports/data_card.html").read_text()


def test_what_does_not_fit_is_said(workspace):
    report = read_json("reports/filter.json")
    write_json(Path("reports/filter.json"), {**report, "dropped": {"watermarked": 5}})
    write_json(Path("reports/encode.json"), {**read_json("reports/encode.json"), "total": 5, "kept": 5})
    found = card.write(load_config("params.yaml"))
    assert found["differing"] == ["filter"] and not found["adds_up"] and not found["forgotten"]["explained"]
    assert Path("reports/data_card.html").read_text().count('class="alarm"') == 3
    request = {"request": "a", "removed": {"data/records/keys.txt": 2}}
    write_json(Path("reports/forget-2026-01-01.json"), {"stage": "forget", "requests": [request]})
    found = card.write(load_config("params.yaml"))
    assert found["forgotten"] == {"requests": 1, "records": 2, "explained": True}


def test_a_folder_without_reports_is_told_what_to_run(tmp_path, project, monkeypatch):
    write_params(tmp_path, project)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="reports: got no report of a stage, .* run dvc repro"):
        card.write(load_config("params.yaml"))


def test_bars_are_as_high_as_their_counts():
    svg = histogram([0, 1, 2], [4, 2], [1, 0], 1.5, "x < y")
    heights = [float(found) for found in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert heights == pytest.approx([154, 38.5, 77, 0], abs=0.06) and 'aria-label="x &lt; y"' in svg
    assert "1 to 2: 2, kept 0" in svg and svg.count("var(--ink)") == 1
