"""Numbers of `raphael evaluate --images` in MLflow: where they go and where not; how sampling is put in words."""

import shutil

import pytest

from raphael.base.config.params import load_config
from raphael.base.stage import write_json
from raphael.base.tracking.tracker import connect, create_run, remember_run, resolve_uri
from raphael.evaluate.protocols.tracked import log_report
from raphael.evaluate.report.sections import paths, sampling

MODEL = "ab" * 32


def report(value, weights=MODEL[:16]):
    numbers = [{"name": "clip_score_x", "value": value, "low": value - 0.1, "high": value + 0.1}]
    facts = {"protocol": "drawbench/v1", "settings": {"weights": weights}, "images": {"sha256": "c" * 64}}
    return facts | {"numbers": numbers}


@pytest.fixture
def workspace(tmp_path, project):
    shutil.copy(project / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def test_numbers_go_into_a_run_of_their_own_and_into_the_one_that_trained_the_model_as_another_point(workspace):
    config = load_config(workspace / "params.yaml")
    uri = resolve_uri(config, workspace)
    run_id = create_run(config, workspace, "training")
    remember_run(workspace, MODEL, uri, run_id)
    for value in (0.25, 0.75):
        line = log_report(report(value), {}, workspace / "params.yaml")
        assert run_id in line
    client = connect(uri)
    history = client.get_metric_history(run_id, "evaluate/drawbench/v1/clip_score_x")
    assert [(point.step, point.value) for point in history] == [(0, 0.25), (0, 0.75)]
    assert client.get_run(run_id).data.metrics["evaluate/drawbench/v1/clip_score_x_high"] == pytest.approx(0.85)
    assert [item.path for item in client.list_artifacts(run_id, "evaluate")] == ["evaluate/drawbench-v1-cccccccc.json"]
    assert client.get_run(run_id).info.status == "FINISHED"
    log_report(report(0.5, "ef" * 8), {}, workspace / "params.yaml")  # a model of unknown training
    runs = client.search_runs([client.get_run(run_id).info.experiment_id])
    names = [run.info.run_name for run in runs]
    assert sorted(names) == ["evaluation-abababab"] * 2 + ["evaluation-efefefef", "model-efefefef", "training"]
    own = [run for run in runs if run.info.run_name == "evaluation-abababab"]
    assert {run.data.tags["mlflow.parentRunId"] for run in own} == {run_id}
    assert {run.data.metrics["evaluate/drawbench/v1/clip_score_x"] for run in own} == {0.25, 0.75}


def test_no_store_is_made_for_a_folder_that_is_no_tracked_workspaces(workspace):
    assert "a training makes it" in log_report(report(0.5), {}, workspace / "params.yaml")
    assert "which model" in log_report(report(0.5, None), {}, workspace / "params.yaml")
    assert "no workspace" in log_report(report(0.5), {}, workspace / "elsewhere.yaml")
    assert sorted(path.name for path in workspace.iterdir()) == ["params.yaml"]


def test_a_report_says_how_images_were_generated_and_what_is_not_at_its_default():
    plain = {"sampler": "ddim", "steps": 20, "guidance_scale": 4.0, "eta": 0.0, "guidance_interval": [0.0, 1.0]}
    plain |= {"threshold": "none", "threshold_percentile": 99.5}
    assert sampling(plain) == "ddim, 20 steps, guidance 4.0" == sampling({k: plain[k] for k in list(plain)[:3]})
    special = plain | {"eta": 0.5, "guidance_interval": [0.1, 0.8], "threshold": "dynamic"}
    words = "ddim, 20 steps, guidance 4.0 for t from 10% to 80%, eta 0.5, dynamic threshold at 99.5 %"
    assert sampling(special) == words
    assert sampling(plain | {"threshold": "static"}).endswith(", static threshold")


def test_a_report_takes_the_path_analysis_of_its_own_model_alone(tmp_path, monkeypatch):
    """Drawn from its numbers: what section.html says beside them is nobody's word."""
    monkeypatch.setattr("raphael.evaluate.studies.path_report.section", lambda report, folder: report["drawn"])
    assert paths(tmp_path, "m1") == ""
    write_json(tmp_path / "paths.json", {"model": "m1", "drawn": "<section></section>"})
    (tmp_path / "section.html").write_text("<script>")
    assert paths(tmp_path, "m1") == "<section></section>" and paths(tmp_path, "m2") == ""
