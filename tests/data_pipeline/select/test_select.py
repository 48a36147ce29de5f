"""Every row of a list is kept or dropped by exactly one reason, in a stated order."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.common import schema
from data_pipeline.select import stage as select
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError

GOOD = {
    "URL": "http://a.example/{}.jpg", "TEXT": "a red circle", "WIDTH": 640, "HEIGHT": 480,
    "similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.1, "AESTHETIC_SCORE": 5.5,
}  # fmt: skip


@pytest.fixture
def workspace(tmp_path, monkeypatch, project):
    """run(rows, select={...}, filter={...}) -> (links, report) in a workspace of its own."""
    monkeypatch.chdir(tmp_path)
    config = load_config(project / "params.yaml")

    def run(rows: list[dict], **changes):
        select.METADATA.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), select.METADATA, row_group_size=7)
        changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
        select.run(dataclasses.replace(config, **changed), Stage("select", tmp_path))
        return pq.read_table(select.LINKS), json.loads((tmp_path / "reports/select.json").read_text())

    return run


def rows(*changes: dict) -> list[dict]:
    """One good row per change, the first with a score below the threshold (a list without any is refused)."""
    listed = [{**GOOD, "AESTHETIC_SCORE": 4.0}, *({**GOOD, **change} for change in changes)]
    return [{**row, "URL": row["URL"] and row["URL"].format(number)} for number, row in enumerate(listed)]


def test_each_reason_takes_its_rows_and_the_counts_add_up(workspace):
    listed = rows(
        {},
        {"URL": None}, {"URL": ""}, {"URL": "  "},
        {"URL": "file:///etc/hostname"}, {"URL": "x"}, {"URL": "http://"}, {"URL": "http://user@a.example/"},
        {"TEXT": None}, {"TEXT": ""}, {"TEXT": "  \n"},
        {"TEXT": "ab"},
        {"TEXT": "long " * 1000},
        {"URL": None, "TEXT": None},  # the first rule takes it
        {"URL": "http://a.example/1.jpg"},
        {"URL": "HTTPS://b.example/ü?q#f", "WIDTH": None, "similarity": None},
    )  # fmt: skip
    links, report = workspace(listed)
    assert report["dropped"] == {
        "no url": 4, "bad url": 4, "no caption": 3, "caption too short": 1, "caption too long": 1, "duplicate url": 1,
    }  # fmt: skip
    assert report["total"] == len(listed) == report["kept"] + sum(report["dropped"].values())
    assert links[schema.ID].to_pylist() == [0, 1, len(listed) - 1]
    assert links.schema.names == list(schema.LINK_COLUMNS)
    last = links.to_pylist()[-1]
    assert last["width"] is None and last["similarity"] is None and last["aesthetic"] == 5.5
    assert report["missing_columns"] == ["language", "md5"]
    assert report["score_ranges"]["aesthetic"] == [4.0, 5.5] and report["null_scores"]["similarity"] == 1


def test_the_size_of_the_batches_changes_nothing(workspace):
    listed = rows(*({"URL": f"http://a.example/{number % 13}"} for number in range(50)))
    first, report = workspace(listed)
    second, again = workspace(listed, select={"chunk_rows": 3})
    assert first.equals(second) and report == again and report["kept"] == 14


def test_score_rules_are_asked_only_where_wanted_and_a_duplicate_of_a_dropped_row_is_none(workspace):
    listed = rows(
        {"pwatermark": 0.5}, {"punsafe": 0.9}, {"similarity": -0.1}, {"WIDTH": 10}, {"WIDTH": 3000},
        {"similarity": None}, {"AESTHETIC_SCORE": 4.6999, "URL": "http://a.example/same"},
        {"URL": "http://a.example/same"}, {"AESTHETIC_SCORE": 4.7},
    )  # fmt: skip
    links, report = workspace(listed, select={"score_rules": True})
    assert report["dropped"] == {
        "no similarity score": 1, "aesthetic too low": 2, "watermarked": 1, "unsafe": 1, "caption unlike picture": 1,
        "too small": 1, "too long and narrow": 1,
    }  # fmt: skip
    assert links[schema.ID].to_pylist() == [8, 9]
    assert workspace(listed)[1]["dropped"] == {"duplicate url": 1}


def test_captions_that_share_an_image_are_counted_by_their_own_reason(workspace):
    """COCO's five captions of an image: the first is kept, and the others are no silent duplicates."""
    shared = [{"URL": "http://a.example/same", "TEXT": text} for text in ("a cat", "one cat", "a cat", "the cat")]
    links, report = workspace(rows(*shared))
    assert report["dropped"] == {"duplicate url": 1, "another caption of a kept url": 2}
    assert links["caption"].to_pylist()[1:] == ["a cat"]


def test_owners_who_said_no_are_left_out_before_any_request(workspace, tmp_path):
    (tmp_path / "no.txt").write_text("b.example\nmd5:" + "0a" * 16 + "\n")
    listed = rows({"URL": "https://img.b.example/1"}, {}, {})
    for number, row in enumerate(listed):
        row["md5"] = "0A" * 16 if number == 2 else None
    links, report = workspace(listed, filter={"opt_out": str(tmp_path / "no.txt")})
    assert report["dropped"] == {"opted out": 2} and links["id"].to_pylist() == [0, 3]
    assert report["opt_out"] == {"urls": 0, "domains": 1, "md5": 1, "sha256": 0}


def test_numbers_written_as_texts_are_numbers(workspace):
    """COYO's preview rows come as JSON with every value a text."""
    texts = [{name: str(value) for name, value in row.items()} for row in rows({})]
    links, _ = workspace(texts)
    assert links["width"].to_pylist() == [640, 640] and links["aesthetic"].to_pylist() == [4.0, 5.5]


def test_languages_are_chosen_by_the_lists_own_column(workspace):
    listed = [{**row, "LANGUAGE": code} for row, code in zip(rows({}, {}, {}), ("en", "de", None, "en"), strict=True)]
    assert workspace(listed, select={"languages": ("en",)})[1]["dropped"] == {"other language": 2}
    with pytest.raises(StageError, match="no column for the language"):
        workspace(rows({}), select={"languages": ("en",)})


def test_a_list_with_v1_scores_is_refused(workspace):
    renamed = [{**row, "aesthetic": row["AESTHETIC_SCORE"]} for row in rows({})]
    for row in renamed:
        del row["AESTHETIC_SCORE"]
    with pytest.raises(StageError, match="column aesthetic holds LAION's V1 score"):
        workspace(renamed)


def test_a_threshold_that_would_drop_nothing_is_refused(workspace):
    with pytest.raises(StageError, match="the lowest AESTHETIC_SCORE is 5.5, above filter.min_aesthetic 4.7"):
        workspace(rows({})[1:])
    assert not select.LINKS.exists()


def test_scores_that_are_missing_altogether_are_refused_unless_kept(workspace):
    listed = [{name: row[name] for name in ("URL", "TEXT")} for row in rows({}, {})]
    with pytest.raises(StageError, match="no row has a similarity score and filter.missing_score is drop"):
        workspace(listed)
    with pytest.raises(StageError, match="no row has a unsafe score and filter.missing_unsafe is drop.*is harmless"):
        workspace(listed, filter={"missing_score": "keep"})
    links, report = workspace(listed, filter={"missing_score": "keep", "missing_unsafe": "keep"})
    assert len(links) == 3 and set(report["missing_columns"]) >= {"aesthetic", "width"}


def test_bad_input_is_one_clear_line(workspace, tmp_path):
    with pytest.raises(StageError, match="expected one for the caption"):
        workspace([{"URL": "http://a.example/"}])
    with pytest.raises(StageError, match="column WIDTH: got .*, expected numbers"):
        workspace([{**row, "WIDTH": "wide"} for row in rows({})])
    with pytest.raises(StageError, match="no row of 1 is left"):
        workspace([{**GOOD, "URL": "", "AESTHETIC_SCORE": 4.0}])
    select.METADATA.write_bytes(b"PAR1 no parquet at all")
    with pytest.raises(StageError, match="not a readable parquet"):
        select.open_parquet(select.METADATA)
    with pytest.raises(StageError, match="no such file; run the stage"):
        select.open_parquet(tmp_path / "absent")


KEPT = {"missing_score": "keep", "missing_unsafe": "keep"}


def test_real_laion_rows_stream_through(workspace, shared_data):
    table = pq.read_table(shared_data / "laion" / "laion_url_text_5000.parquet", columns=["URL", "TEXT"])
    links, report = workspace(table.to_pylist(), filter=KEPT, select={"chunk_rows": 700})
    assert report["total"] == 5000 and report["kept"] > 4900
    assert len(set(links["url"].to_pylist())) == len(links)
