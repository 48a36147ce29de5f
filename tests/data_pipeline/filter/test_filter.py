"""Images are kept by their scores, sizes and bytes; each dropped one has one reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common import schema
from data_pipeline.common.rules import apply, score_rules
from data_pipeline.download.shards import table_schema
from data_pipeline.encode.buckets import nearest_size
from data_pipeline.filter import stage as filter_stage
from data_pipeline.select.stage import LINKS, link_schema
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError

GOOD = {"similarity": 0.3, "unsafe": 0.1, "watermark": 0.1, "aesthetic": 5.5, "width": 64, "height": 64}


@pytest.fixture
def config(project):
    return load_config(project / "params.yaml")


@pytest.fixture
def workspace(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)

    def run(rows: list[dict], shard_rows: int = 4, **changes):
        write(rows, shard_rows)
        changed = dataclasses.replace(config, filter=dataclasses.replace(config.filter, **changes))
        filter_stage.run(changed, Stage("filter", tmp_path))
        report = json.loads((tmp_path / "reports/filter.json").read_text())
        return pq.read_table(filter_stage.FILTERED), report

    return run


def write(rows: list[dict], shard_rows: int) -> None:
    """links.parquet and shards as the download leaves them. A row with "failed" has no image; ids are spread out."""
    LINKS.parent.mkdir(parents=True, exist_ok=True)
    filter_stage.SHARDS.mkdir(parents=True, exist_ok=True)
    links, shards = [], []
    for number, change in enumerate(rows):
        row = {**GOOD, **change}
        link = {"id": 3 * number, "url": f"http://a.example/{number}", "caption": f"caption {number}"}
        links.append({**link, **{score: row[score] for score in schema.SCORES}, "width": 9999, "height": 9999})
        stored = {**link, "key": f"{number:09d}", "status": "failed", "reason": "http 404"}
        if not row.get("failed"):
            digest = hashlib.sha256(str(row.get("bytes", number)).encode()).hexdigest()
            sizes = {"width": row["width"], "height": row["height"]}
            stored |= {"status": "success", "reason": None, "sha256": digest, **sizes}
        shards.append(stored)
    pq.write_table(pa.Table.from_pylist(links, link_schema()), LINKS, row_group_size=3)
    for shard, start in enumerate(range(0, len(shards), shard_rows)):
        path = filter_stage.SHARDS / f"{shard:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(shards[start : start + shard_rows], table_schema()), path)
        path.with_suffix(".tar").touch()


ROWS = [
    {}, {"failed": True}, {"aesthetic": 4.69}, {"aesthetic": 4.7}, {"watermark": 0.5}, {"watermark": 0.499},
    {"unsafe": 0.5}, {"similarity": -0.01}, {"width": 47}, {"width": 200}, {"width": 160}, {"similarity": None},
    {"unsafe": None}, {"watermark": None}, {"aesthetic": None}, {"bytes": "twin", "aesthetic": 1.0},
    {"bytes": "twin"}, {"bytes": "twin"},
    {"failed": True}, {"bytes": "twin", "unsafe": 1.0},
]  # fmt: skip


def test_each_reason_takes_its_images_and_the_counts_add_up(workspace):
    images, report = workspace(ROWS)
    assert report["dropped"] == {
        "no similarity score": 1, "no unsafe score": 1, "no watermark score": 1, "no aesthetic score": 1,
        "aesthetic too low": 2, "watermarked": 1, "unsafe": 2, "caption unlike picture": 1, "too small": 1,
        "too long and narrow": 1, "duplicate picture": 1,
    }  # fmt: skip
    assert report["total"] == 18 == report["kept"] + sum(report["dropped"].values())
    assert [value // 3 for value in images["id"].to_pylist()] == [0, 3, 5, 10, 16]
    assert images.schema.names == list(schema.IMAGE_COLUMNS)
    assert images["key"].to_pylist() == sorted(images["key"].to_pylist())
    assert images["shard"].to_pylist()[-1] == "00004.tar"
    assert images["width"].to_pylist()[3] == 160  # of the stored image, not the list's


def test_the_size_of_the_shards_changes_only_the_shards_names(workspace):
    first, report = workspace(ROWS, shard_rows=7)
    for path in Path("data/shards").iterdir():
        path.unlink()
    second, again = workspace(ROWS, shard_rows=100)
    assert report == again and first.drop(["shard"]).equals(second.drop(["shard"]))


def test_images_whose_owners_said_no_are_dropped_by_hash_and_address(workspace, tmp_path):
    digest = hashlib.sha256(b"twin").hexdigest()
    (tmp_path / "no.txt").write_text(f"sha256:{digest}\nhttp://a.example/0\n")
    images, report = workspace([{}, {}, {"bytes": "twin"}], opt_out=str(tmp_path / "no.txt"))
    assert report["dropped"] == {"opted out": 2} and images["id"].to_pylist() == [3]


def test_null_scores_are_kept_where_the_policy_says_so(workspace):
    images, report = workspace(ROWS, missing_score="keep", missing_unsafe="keep")
    assert not any(reason.startswith("no ") for reason in report["dropped"])
    assert images["aesthetic"].null_count == 1


def test_an_image_without_an_unsafe_score_is_kept_by_a_word_of_its_own_alone(workspace):
    rows = [{}, {"unsafe": None}, {"aesthetic": None}, {"unsafe": 0.9}]
    images, report = workspace(rows, missing_score="keep")
    assert report["dropped"]["no unsafe score"] == 1 and "no aesthetic score" not in report["dropped"]
    assert images["id"].to_pylist() == [0, 6] and report["dropped"]["unsafe"] == 1
    images, report = workspace(rows, missing_score="keep", missing_unsafe="keep")
    assert len(images) == 3 and "no unsafe score" not in report["dropped"] and report["dropped"]["unsafe"] == 1
    images, report = workspace(rows, missing_score="drop", missing_unsafe="keep")
    assert report["dropped"]["no aesthetic score"] == 1 and "no unsafe score" not in report["dropped"]


def test_the_rules_agree_with_one_row_at_a_time(config):
    """The truth: a plain function of one row, over 2,000 random rows with nulls."""
    rng = np.random.default_rng(0)
    scales = {"similarity": (-0.2, 0.5), "unsafe": (0, 1), "watermark": (0, 1), "aesthetic": (3, 7)}
    columns = {name: rng.uniform(*scale, 2000) for name, scale in scales.items()}
    columns |= {"width": rng.integers(20, 200, 2000).astype(float), "height": rng.integers(20, 200, 2000).astype(float)}
    for name in scales:
        columns[name][rng.random(2000) < 0.05] = np.nan
    settings = config.filter

    def reason(row: dict) -> str:
        for score in schema.SCORES:
            if np.isnan(row[score]):
                return f"no {score} score"
        if row["aesthetic"] < settings.min_aesthetic:
            return "aesthetic too low"
        if row["watermark"] >= settings.max_watermark:
            return "watermarked"
        if row["unsafe"] >= settings.max_unsafe:
            return "unsafe"
        if row["similarity"] < settings.min_similarity:
            return "caption unlike picture"
        short, long = sorted((row["width"], row["height"]))
        if short < settings.min_side_px:
            return "too small"
        return "too long and narrow" if long / short > settings.max_aspect_ratio else "kept"

    expected = [reason({name: values[number] for name, values in columns.items()}) for number in range(2000)]
    dropped: dict[str, int] = {}
    alive = apply(score_rules(settings), columns, np.ones(2000, bool), dropped)
    assert {name: expected.count(name) for name in dropped} == dropped
    assert [name == "kept" for name in expected] == alive.tolist()


def test_shards_of_another_list_and_missing_shards_are_one_clear_line(workspace, tmp_path, config):
    with pytest.raises(StageError, match="no image of 1 is left"):
        workspace([{"aesthetic": 1.0}])
    links = pq.read_table(LINKS)
    write(ROWS, 4)
    pq.write_table(links, LINKS)
    with pytest.raises(StageError, match="its rows are not those of"):
        filter_stage.run(config, Stage("filter", tmp_path))
    Path("data/shards/00001.tar").unlink()
    with pytest.raises(StageError, match="shard 00001 is not whole"):
        filter_stage.shard_tables(filter_stage.SHARDS)
    with pytest.raises(StageError, match="no shard; run the stage download"):
        filter_stage.shard_tables(tmp_path / "absent")


def test_an_image_that_would_have_to_grow_is_left_out_unless_someone_says_otherwise(workspace, config, tmp_path):
    sizes = ((64, 64), (48, 96), (96, 48))
    shapes = [(64, 64), (63, 64), (48, 96), (96, 47), (64, 96), (60, 90), (200, 63), (96, 48)]  # width, height
    rows = [{"width": width, "height": height} for width, height in shapes]

    def kept(too_small: str) -> list[int]:
        write(rows, 4)
        picture = dataclasses.replace(config.picture, sizes_px=sizes, too_small=too_small)
        limits = dataclasses.replace(config.filter, min_side_px=0, max_aspect_ratio=10.0)
        filter_stage.run(dataclasses.replace(config, picture=picture, filter=limits), Stage("filter", tmp_path))
        return [row["id"] // 3 for row in pq.read_table(filter_stage.FILTERED).to_pylist()]

    def covers(width: int, height: int) -> bool:
        """As `fit` scales: by the larger of the two quotients, to the size nearest in shape."""
        tall, wide = sizes[nearest_size(height, width, sizes)]
        return max(wide / width, tall / height) <= 1

    assert kept("drop") == [place for place, shape in enumerate(shapes) if covers(*shape)] == [0, 2, 4, 6, 7]
    assert json.loads((tmp_path / "reports/filter.json").read_text())["dropped"] == {"smaller than its size": 3}
    assert kept("upscale") == kept("pad") == list(range(len(shapes)))


def test_where_all_are_too_small_the_two_settings_that_disagree_are_named(workspace, config, tmp_path):
    write([{"width": 96, "height": 96}], 4)
    picture = dataclasses.replace(config.picture, sizes_px=((256, 256),))
    with pytest.raises(StageError, match="download.image_size_px 96 .*picture.sizes_px begins with 256 x 256.*upscale"):
        filter_stage.run(dataclasses.replace(config, picture=picture), Stage("filter", tmp_path))
