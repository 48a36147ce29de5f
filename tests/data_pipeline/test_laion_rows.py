"""Real rows of LAION and COYO run through the data stages against a rehearsed web; no row is lost without a reason.

The truth is the web's own table of what each address meets (data_pipeline/download/serve_rehearsal.py, tested by
itself).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from truth.faulty_runs import change, content, finish, run
from truth.image_workspace import merge

from data_pipeline.download.serve_rehearsal import FATES, fate_of
from data_pipeline.gateway.addresses import Refusal, parse
from raphael.base.config.params import load_config
from raphael.base.stage import read_json
from raphael.encoders.clip import build_clip, save_clip

ROWS = 1000
SETTINGS = {
    "source": {"kind": "parquet", "max_rows": ROWS, "max_heldout_prompts": 20},
    "download": {
        "local_host": "", "shard_rows": 250, "encode_format": "jpg", "encode_quality": 95, "timeout_s": 2.0,
        "deadline_s": 4.0, "retries": 1,
    },
    "filter": {"missing_score": "keep", "missing_unsafe": "keep"},
}  # fmt: skip


def write_settings(project: Path, root: Path, rows: Path, photographs: Path, **sections: dict) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    for changes in (SETTINGS, sections):
        for section, values in changes.items():
            merge(params[section], values)
    params["source"]["path"] = str(rows)
    params["download"]["rehearsal"] = str(photographs)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def laion(project, shared_data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("laion")
    write_settings(project, root, shared_data / "laion/laion_url_text_5000.parquet", shared_data / "coco")
    for stage in ("source", "select", "download", "score", "filter", "captions"):
        finish(project, stage, root)
    return root


def expected(url: str) -> str:
    """What the download has to say: the guard's word on the url's form, or what the web has in store for it."""
    try:
        target = parse(url)
    except Refusal as refusal:
        return refusal.reason
    return FATES[fate_of(target.host, target.path)].outcome


@pytest.mark.slow
def test_every_real_row_ends_as_an_image_or_with_the_reason_that_the_web_gave(laion):
    source, select, load, kept, clean = (
        read_json(laion / f"reports/{stage}.json") for stage in ("source", "select", "download", "filter", "captions")
    )
    assert source["total"] == ROWS and source["dropped"] == {"held out for evaluation": ROWS - source["kept"]}
    for before, after in zip((source, select, load, kept), (select, load, kept, clean), strict=True):
        assert before["kept"] == after["total"] == after["kept"] + sum(after["dropped"].values())
    links = pq.read_table(laion / "data/selected/links.parquet").to_pylist()
    stored = [
        row for path in sorted((laion / "data/shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert [row["id"] for row in stored] == [row["id"] for row in links]
    for row in stored:
        assert (row["reason"] or "success") == expected(row["url"]), row["url"]
    assert Counter(row["reason"] for row in stored if row["reason"]) == load["dropped"]
    assert load["rehearsal"]["photographs"] > 200 and 0.4 < load["kept"] / load["total"] < 0.7
    assert {"name not found", "http 404", "not a picture", "truncated"} <= set(load["dropped"])
    assert kept["dropped"]["too small"] and kept["dropped"]["duplicate picture"], kept["dropped"]


@pytest.mark.slow
def test_rows_come_out_the_same_a_second_time(laion, project, tmp_path):
    before = content(laion, "download")
    shutil.copytree(laion, tmp_path / "ws")
    shutil.rmtree(tmp_path / "ws/data/shards")
    finish(project, "download", tmp_path / "ws")
    assert content(tmp_path / "ws", "download") == before


@pytest.mark.slow
def test_rows_without_scores_are_refused_where_a_score_is_asked_for(laion, project, shared_data, tmp_path):
    (tmp_path / "params.yaml").write_text((laion / "params.yaml").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/source").symlink_to(laion / "data/source")
    change(tmp_path, "filter", missing_score="drop")
    done = run(project, "select", tmp_path)
    assert done.returncode == 1 and "no row has a similarity score" in done.stderr and "compute it" in done.stderr
    (head,) = (shared_data / "weights/laion_aesthetic_v2").glob("*.pth")
    change(tmp_path, "score", aesthetic=str(head))
    done = run(project, "select", tmp_path)
    assert done.returncode == 1 and "clip: got '', expected a CLIP" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_v2_head_says_which_embeddings_it_needs(laion, project, shared_data, tmp_path):
    """ViT-L/14 is not here; a CLIP of another width is refused, and never scored by."""
    config = yaml.safe_load((laion / "params.yaml").read_text())
    root = tmp_path / "ws"
    root.mkdir()
    (root / "data").mkdir()
    for name in ("source", "selected", "shards"):
        (root / "data" / name).symlink_to(laion / "data" / name)
    (root / "params.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    save_clip(build_clip(load_config(project / "params.yaml").clip), root / "clip")
    (head,) = (shared_data / "weights/laion_aesthetic_v2").glob("*.pth")
    change(root, "score", aesthetic=str(head), clip="clip")
    done = run(project, "score", root)
    assert done.returncode == 1 and "768" in done.stderr and "name the CLIP it was trained on" in done.stderr
    assert "Traceback" not in done.stderr and not (root / "data/scores").exists()


@pytest.mark.slow
def test_coyo_rows_bring_their_scores_as_texts_and_pass(project, shared_data, tmp_path):
    rows = shared_data / "laion/coyo_preview_rows.jsonl"
    write_settings(
        project, tmp_path, rows, shared_data / "coco", source={"kind": "jsonl"}, select={"score_rules": True}
    )
    finish(project, "source", tmp_path)
    change(tmp_path, "filter", min_aesthetic=4.5, min_similarity=0.2)
    refused = run(project, "select", tmp_path)
    assert refused.returncode == 1 and "the lowest aesthetic_score_laion_v2 is 4.57594" in refused.stderr
    change(tmp_path, "filter", min_aesthetic=4.7)
    for stage in ("select", "download", "filter", "captions"):
        finish(project, stage, tmp_path)
    report = read_json(tmp_path / "reports/select.json")
    truth = [json.loads(line) for line in rows.read_text().splitlines() if line.strip()]
    low = [float(row["aesthetic_score_laion_v2"]) < 4.7 for row in truth]
    unlike = [not bad and float(row["clip_similarity_vitl14"]) < 0.2 for row, bad in zip(truth, low, strict=True)]
    assert report["dropped"].get("aesthetic too low", 0) == sum(low)
    assert report["dropped"].get("caption unlike picture", 0) == sum(unlike)
