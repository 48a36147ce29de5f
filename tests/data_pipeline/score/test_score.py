"""Scores that the list lacks come from the images; what the list has stays, and every score says where it is from."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipeline.common import schema
from data_pipeline.common.places import SCORED, SHARDS
from data_pipeline.common.rules import score_rules
from data_pipeline.download.shards import table_schema
from data_pipeline.filter import stage as filter_stage
from data_pipeline.score import shard as shard_module
from data_pipeline.score import stage as score
from data_pipeline.score.scorer import Scorer
from data_pipeline.score.watermark_net import WatermarkModel, WatermarkNet
from data_pipeline.select.stage import LINKS, link_schema
from raphael.base.config.data import PipelineConfig
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError
from raphael.encoders.clip import build_clip, save_clip

GIVEN = {"similarity": 0.3, "unsafe": 0.1, "watermark": 0.1, "aesthetic": 5.5}
ROWS = 10


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (70, 60 + number, 3), np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory, project):
    """A small random CLIP, a V1-form head on its embeddings, and a random detector."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = load_config(project / "params.yaml")
    small = dataclasses.replace(config.clip, text_width=32, text_heads=2, text_layers=1, embed_dim=16, image_width=8)
    save_clip(build_clip(small), folder / "clip")
    head = {"weight": torch.randn(1, 16), "bias": torch.zeros(1)}
    torch.save(head, folder / "head.pth")
    WatermarkModel(WatermarkNet((4, 4, 8))).save(folder / "marks.safetensors")
    every = {"unsafe": str(folder / "head.pth"), "watermark": str(folder / "marks.safetensors"), "similarity": True}
    return folder, {**every, "clip": str(folder / "clip"), "batch_size": 3}


def png(number: int) -> bytes:
    body = io.BytesIO()
    picture(number).save(body, "png")
    return body.getvalue()


@pytest.fixture
def workspace(tmp_path, monkeypatch, project):
    """Two shards of real tars; of every third row the list has no score, row 4 has no image."""
    monkeypatch.chdir(tmp_path)
    LINKS.parent.mkdir(parents=True)
    SHARDS.mkdir(parents=True)
    links, stored = [], []
    for number in range(ROWS):
        link = {"id": 2 * number, "url": f"http://a.example/{number}", "caption": f"caption {number}"}
        scores = {name: None if number % 3 == 0 else value for name, value in GIVEN.items()}
        links.append({**link, **scores, "width": 60, "height": 60})
        failed = {"key": f"{number:09d}", "status": "failed", "reason": "http 404"}
        success = {
            "key": f"{number:09d}",
            "status": "success",
            "sha256": hashlib.sha256(png(number)).hexdigest(),
            "width": 60,
            "height": 70,
        }
        stored.append({**link, **(failed if number == 4 else success)})
    pq.write_table(pa.Table.from_pylist(links, link_schema()), LINKS)
    for shard, rows in enumerate((stored[:6], stored[6:])):
        with tarfile.open(SHARDS / f"{shard:05d}.tar", "w") as tar:
            for row in rows:
                body = png(row["id"] // 2)
                info = tarfile.TarInfo(f"{row['key']}.png")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        pq.write_table(pa.Table.from_pylist(rows, table_schema()), SHARDS / f"{shard:05d}.parquet")
    config = load_config(project / "params.yaml")
    config = dataclasses.replace(config, picture=dataclasses.replace(config.picture, too_small="upscale"))

    def run(pipeline=None, **changes):
        changed = dataclasses.replace(config, score=dataclasses.replace(config.score, **changes))
        changed = dataclasses.replace(changed, pipeline=PipelineConfig(**(pipeline or {})))
        score.run(changed, Stage("score", tmp_path))
        return changed, json.loads((tmp_path / "reports/score.json").read_text())

    return run


def scored() -> list[dict]:
    return [row for file in sorted(SCORED.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_with_nothing_configured_the_list_alone_counts(workspace, tmp_path):
    config, report = workspace()
    assert report["computed"] == [] and report["total"] == report["kept"] == ROWS - 1
    assert [file.name for file in SCORED.iterdir()] == ["scores.json"]
    filter_stage.run(config, Stage("filter", tmp_path))
    with_stage = Path("data/filtered/pictures.parquet").read_bytes()
    (SCORED / "scores.json").unlink()
    SCORED.rmdir()
    filter_stage.run(config, Stage("filter", tmp_path))
    assert Path("data/filtered/pictures.parquet").read_bytes() == with_stage


def test_nothing_heavy_is_loaded_where_nothing_is_configured(workspace, project, tmp_path):
    command = "import sys, time, data_pipeline.score.stage as s, raphael.base.stage as b; "
    command += "b.main('score', s.run, '', ['--params', sys.argv[1]]); "
    command += "print([name for name in ('torch', 'ray', 'open_clip', 'PIL') if name in sys.modules]); "
    command += "print(time.process_time())"
    params = tmp_path / "params.yaml"
    params.write_text((project / "params.yaml").read_text())
    done = subprocess.run([sys.executable, "-c", command, str(params)], capture_output=True, text=True)
    *_, loaded, seconds = done.stdout.strip().split("\n")
    assert loaded == "[]" and float(seconds) < 2, done.stdout + done.stderr


@pytest.mark.parametrize("replace", [False, True])
def test_computed_scores_fill_what_the_list_lacks_or_replace_it(workspace, models, replace):
    """The truth: every image by itself, straight from its array."""
    folder, every = models
    config, report = workspace(**every, replace=replace)
    scorer = Scorer(config.score)
    for row in scored():
        number = row["id"] // 2
        alone = {name: float(value[0]) for name, value in scorer([picture(number)], [f"caption {number}"]).items()}
        for name in ("similarity", "unsafe", "watermark"):
            if number == 4:
                expected, source = (GIVEN[name], "list")
            elif replace or number % 3 == 0:
                expected, source = alone[name], "computed"
            else:
                expected, source = GIVEN[name], "list"
            assert row[name] == pytest.approx(expected, abs=1e-5), (number, name)
            assert row[f"{name}_source"] == source
    assert "aesthetic" not in scored()[0]
    filled = {"list": 1, "computed": 9, "none": 0} if replace else {"list": 6, "computed": 4, "none": 0}
    assert report["sources"] == dict.fromkeys(("similarity", "unsafe", "watermark"), filled)


def test_the_filter_judges_by_the_computed_scores(workspace, models, tmp_path):
    _, every = models
    config, _ = workspace(**every, aesthetic=every["unsafe"], replace=True)
    middle = float(np.median([row["unsafe"] for row in scored() if row["id"] != 8]))
    loose = dataclasses.replace(
        config.filter, min_aesthetic=-100.0, min_similarity=-100.0, max_unsafe=middle, max_watermark=1.1, min_side_px=0
    )
    filter_stage.run(dataclasses.replace(config, filter=loose), Stage("filter", tmp_path))
    kept = set(pq.read_table("data/filtered/pictures.parquet")["id"].to_pylist())
    assert kept == {row["id"] for row in scored() if row["unsafe"] < middle and row["id"] != 8}
    assert len(kept) == 4


def test_a_finished_shard_is_not_scored_again_and_a_changed_one_is(workspace, models, monkeypatch):
    _, every = models
    workspace(**every)
    seen = []
    score_shard = shard_module.score_shard
    monkeypatch.setattr(shard_module, "score_shard", lambda *a: seen.append(a[2].table.stem) or score_shard(*a))
    workspace(**every)
    assert seen == []
    table = pq.read_table(SHARDS / "00001.parquet")
    pq.write_table(table.set_column(3, "caption", pa.array(["another"] * len(table))), SHARDS / "00001.parquet")
    workspace(**every)
    assert seen == ["00001"]
    workspace(**{**every, "similarity": False})
    assert seen == ["00001", "00000", "00001"]


def test_rows_without_a_score_are_requested_where_the_score_will_be_computed(project):
    config = load_config(project / "params.yaml")
    nothing = {name: np.array([np.nan]) for name in (*schema.SCORES, "width", "height")}
    marks = {reason: bool(rule(nothing)[0]) for reason, rule in score_rules(config.filter, ("watermark",))}
    assert "no watermark score" not in marks and marks["no unsafe score"] and not marks["watermarked"]


def test_wrong_models_are_one_clear_line(workspace, models, tmp_path):
    folder, every = models
    with pytest.raises(StageError, match="score.watermark: absent.safetensors: no such file"):
        workspace(watermark="absent.safetensors")
    with pytest.raises(StageError, match="expected a .safetensors file, the only kind that is read"):
        workspace(watermark=str(folder / "head.pth"))
    with pytest.raises(StageError, match="got a V1 head, whose scale is another"):
        workspace(aesthetic=str(folder / "head.pth"), clip=every["clip"])
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "wide.pth")
    with pytest.raises(StageError, match=r"score.unsafe: got embeddings of shape \(2, 16\), expected \(n, 7\)"):
        workspace(unsafe=str(tmp_path / "wide.pth"), clip=every["clip"], batch_size=3)
    with pytest.raises(ValueError, match="clip: got '', expected a CLIP: similarity are computed"):
        workspace(similarity=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_several_workers_give_the_files_of_one_process(workspace, models, engine):
    _, every = models
    _, report = workspace(**every)
    alone = {path.name: path.read_bytes() for path in SCORED.iterdir()}
    shutil.rmtree("work")
    _, spread = workspace({"engine": engine, "workers": 2}, **every)
    assert {path.name: path.read_bytes() for path in SCORED.iterdir()} == alone
    assert spread == {**report, "engine": engine} and report["engine"] == "local"
