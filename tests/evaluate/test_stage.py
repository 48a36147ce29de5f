"""generate, evaluate and report, one after another, in a workspace of the smallest size."""

import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
import yaml
from truth.tiny_raphael import ROOT, write_pipeline

from raphael.config import load_config
from raphael.stage import Stage, StageError, main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """data/source, data/shards, data/captions and models/raphael as the stages before leave them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from data_pipeline.scene_captions import heldout_prompts

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("workspace")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["generate"] |= {"steps": 2, "batch_size": 5, "images_per_prompt": 1}
    params["evaluate"]["max_reference_images"] = 10
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    write_pipeline(root / "models/raphael")
    (root / "data/source").mkdir(parents=True)
    prompts = {"source": "scenes", "prompts": heldout_prompts(0, 3, 32, 0.12)}
    (root / "data/source/prompts.json").write_text(json.dumps(prompts))
    (root / "data/shards").mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(root / "data/shards/00000.tar", "w") as tar:
        for key in range(12):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{key:09d}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    (root / "data/captions").mkdir()
    kept = {"key": [f"{key:09d}" for key in range(11)], "shard": ["00000.tar"] * 11}
    pq.write_table(pa.table(kept), root / "data/captions/captions.parquet")
    (root / "reports").mkdir()
    told = {"total": 11, "kept": 11, "dropped": {}, "buckets": {"64x64": 9, "48x96": 2, "96x48": 0}}
    (root / "reports/encode.json").write_text(json.dumps(told))
    return root


def run_stage(name, workspace, monkeypatch):
    from importlib import import_module

    module = import_module({"report": "raphael.evaluate.report"}.get(name, f"raphael.{name}.__main__"))
    monkeypatch.chdir(workspace)
    return main(name, module.run, "", ["--params", str(workspace / "params.yaml")])


@pytest.fixture
def generated(workspace, monkeypatch):
    if not (workspace / "data/generated").is_dir():
        assert run_stage("generate", workspace, monkeypatch) == 0
    return workspace / "data/generated"


@pytest.fixture
def evaluated(generated, workspace, monkeypatch):
    if not (workspace / "reports/evaluate.json").is_file():
        assert run_stage("evaluate", workspace, monkeypatch) == 0
    return json.loads((workspace / "reports/evaluate.json").read_text())


def test_every_prompt_gets_its_picture(generated):
    images = json.loads((generated / "images.json").read_text())["images"]
    assert [entry["file"] for entry in images] == [f"{i:05d}.png" for i in range(12)]
    assert {path.name for path in generated.iterdir()} == {entry["file"] for entry in images} | {"images.json"}


def test_a_killed_run_taken_up_again_ends_in_the_same_bytes(generated, workspace, monkeypatch):
    from raphael.generate.__main__ import MODEL, PROMPTS, draw_block, picture_jobs
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.strict import to_dict

    truth = {path.name: path.read_bytes() for path in generated.iterdir()}
    shutil.rmtree(generated)
    monkeypatch.chdir(workspace)
    config = load_config("params.yaml")
    jobs = picture_jobs(json.loads(PROMPTS.read_text()), 1)
    folder = Stage("generate", workspace).workdir(MODEL, PROMPTS, to_dict(config.generate)) / "generated"
    folder.mkdir()
    pipeline = RaphaelPipeline.from_pretrained(MODEL)
    draw_block(pipeline, jobs[:5], config, folder)
    draw_block(pipeline, jobs[5:10], config, folder)
    (folder / jobs[7]["file"]).unlink()
    (folder / f".{jobs[7]['file']}").write_bytes(b"half a picture")
    assert run_stage("generate", workspace, monkeypatch) == 0
    assert {path.name: path.read_bytes() for path in generated.iterdir()} == truth


def test_the_numbers_have_the_names_and_the_intervals_that_are_promised(evaluated):
    for name in ("background_colour", "shape_colour", "shape", "relation", "count", "text", "style"):
        value, n, low, high = (evaluated[f"{name}_accuracy{end}"] for end in ("", "_n", "_low", "_high"))
        assert n >= 3 and 0 <= low <= value <= high <= 1
    assert evaluated["shape_accuracy_n"] == evaluated["relation_accuracy_n"] == 3
    assert set(evaluated["by_suite"]) == {"single", "relation", "count", "text"}
    assert evaluated["fd_clip_self_12"] > 0 and evaluated["fd_clip_self_12_reference"] == "10 training pictures"
    assert not any(key.startswith("fid") for key in evaluated)
    assert -1 <= evaluated["clip_score_self"] <= 1 and "clip_score" not in evaluated


def test_a_second_evaluation_writes_the_same_bytes_a_run_of_its_own_and_a_point_of_the_models(
    evaluated, workspace, monkeypatch
):
    before = (workspace / "reports/evaluate.json").read_bytes()
    assert run_stage("evaluate", workspace, monkeypatch) == 0
    assert (workspace / "reports/evaluate.json").read_bytes() == before
    from mlflow import MlflowClient

    from raphael.tracking import resolve_uri

    client = MlflowClient(resolve_uri(load_config(workspace / "params.yaml"), workspace))
    (experiment,) = [item for item in client.search_experiments() if item.name == "raphael"]
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in runs if run.info.run_name.startswith("model-")]
    own = [run for run in runs if run.info.run_name.startswith("evaluation-")]
    assert len(own) == len(runs) - 1 == 2
    assert all(one.data.tags["mlflow.parentRunId"] == run.info.run_id for one in own)
    assert all(one.data.metrics == run.data.metrics for one in own)
    assert run.data.metrics["evaluate/shape_accuracy"] == json.loads(before)["shape_accuracy"]
    (model,) = client.search_logged_models([experiment.experiment_id])
    on_the_board = {metric.key: metric.value for metric in model.metrics}
    assert on_the_board == run.data.metrics, "the leaderboard has every number of the evaluation"
    assert "evaluate_pictures.json" in [item.path for item in client.list_artifacts(run.info.run_id)]


def test_the_evaluation_names_its_protocol_and_failures_worth_looking_at(evaluated, generated):
    listed = json.loads((generated / "images.json").read_text())["images"]
    assert len(evaluated["prompts"]) == 64 and len(evaluated["failures"]["lowest_clip_score"]) == 10
    low, high = evaluated["clip_score_self_interval"]
    assert low < evaluated["clip_score_self"] < high
    values = [row["value"] for row in evaluated["failures"]["lowest_clip_score"]]
    rest = len(listed) * evaluated["clip_score_self"] - sum(values)  # of the pictures that scored higher
    assert values == sorted(values) and len(listed) == 12 and rest >= 2 * values[-1]
    assert {row["file"] for row in evaluated["failures"]["most_wrong"]} <= {entry["file"] for entry in listed}
    assert set(evaluated["clip_score_self_by_suite"]) == set(evaluated["by_suite"])


def test_the_page_is_one_file_that_asks_nobody_for_anything_and_is_the_same_again(evaluated, workspace, monkeypatch):
    assert run_stage("report", workspace, monkeypatch) == 0
    page = (workspace / "reports/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert all(part.startswith("data:image/") for part in page.split('src="')[1:])
    assert "Does it paint what it is told?" in page and "No curves were logged" in page
    assert "Failures worth looking at" in page and "n = 12; prompts " in page
    assert len(page) < 6 << 20
    sizes = re.findall(r"<b>(\d+ × \d+)</b><span>(\d+)<small> ([\d.]+) %", page)
    assert sizes == [("64 × 64", "9", "81.8"), ("48 × 96", "2", "18.2"), ("96 × 48", "0", "0.0")]
    assert run_stage("report", workspace, monkeypatch) == 0
    assert (workspace / "reports/index.html").read_text() == page


def test_the_page_takes_in_the_paths_of_its_own_model_and_of_no_other(generated, workspace, monkeypatch):
    folder = workspace / "reports" / "paths"
    folder.mkdir()
    (folder / "section.html").write_text('<section id="paths"><h2>Ways of words</h2></section>')
    model = json.loads((generated / "images.json").read_text())["model"]
    for name, shown in (("another", False), (model, True)):
        (folder / "paths.json").write_text(json.dumps({"model": name}))
        assert run_stage("report", workspace, monkeypatch) == 0
        page = (workspace / "reports/index.html").read_text()
        assert ("<h2>Ways of words</h2>" in page) == ('href="#paths"' in page) == shown
    shutil.rmtree(folder)


def test_a_broken_or_missing_picture_is_an_error_that_names_it(tmp_path):
    from raphael.evaluate.__main__ import load_picture

    with pytest.raises(StageError, match="no such picture"):
        load_picture(tmp_path / "00000.png")
    (tmp_path / "00001.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    with pytest.raises(StageError, match="00001.png: not a whole picture"):
        load_picture(tmp_path / "00001.png")


def test_a_missing_inception_file_is_an_error_that_says_which_file_is_expected():
    from raphael.evaluate.features import inception_space

    with pytest.raises(StageError, match="weights-inception"):
        inception_space("/nowhere/weights.pth")


def test_a_corrupt_shard_is_an_error_that_names_it(workspace, tmp_path):
    from raphael.evaluate.references import reference_pictures

    (tmp_path / "00000.tar").write_bytes(b"no tar")
    with pytest.raises(StageError, match="00000.tar: a corrupt shard"):
        list(reference_pictures(tmp_path, workspace / "data/captions/captions.parquet", 5, 32, 32))
