"""The MLflow run of a run of a flow: made by its stages, ended as the flow ends, with the evaluation's numbers."""

import os
import shutil

import pytest

from flows.demo import mlflow_run
from flows.pipelines.tracked_runs import one_run_over_all
from raphael.base.config.params import load_config
from raphael.base.stage import write_json
from raphael.base.tracking import tracker as tracking
from raphael.base.tracking.pipeline_run import PARENT, VARIABLE

NAME = "full-0123abcd"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, project):
    root = tmp_path_factory.mktemp("workspace")
    shutil.copy(project / "params.yaml", root / "params.yaml")
    return root


@pytest.fixture
def client(workspace, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking.connect(tracking.resolve_uri(load_config(workspace / "params.yaml"), workspace))


def stage_tracks(workspace, name):
    """What the process of a stage does, in this one: the environment is the same."""
    return tracking.create_run(load_config(workspace / "params.yaml"), workspace, name)


def test_a_flow_in_which_nothing_is_tracked_leaves_no_run_and_no_store(workspace):
    with one_run_over_all(workspace, NAME, {"select": "up to date"}):
        assert os.environ[VARIABLE] == NAME
    assert VARIABLE not in os.environ and not (workspace / "mlflow.db").exists()


def test_finished_it_has_its_stages_the_numbers_and_the_report_and_is_the_run_that_the_demo_names(workspace, client):
    write_json(workspace / "models/raphael/meta.json", {"images_seen": 640})
    write_json(workspace / "reports/evaluate.json", {"total": 3, "clip_score": 0.5, "chance": {"clip_score": 0.1}})
    (workspace / "reports/index.html").write_text("report")
    outcome = {}
    with one_run_over_all(workspace, NAME, outcome):
        child = stage_tracks(workspace, "training")
        outcome |= {"train": "ran", "evaluate": "ran"}
    parent = client.get_run(client.get_run(child).data.tags[PARENT])
    assert (parent.info.run_name, parent.info.status) == (NAME, "FINISHED")
    assert parent.data.params == client.get_run(child).data.params, "what differs between pipelines is on their rows"
    assert parent.data.tags["mlflow.source.name"] == "raphael/full"
    assert (parent.data.tags["stage.train"], parent.data.tags["stage.evaluate"]) == ("ran", "ran")
    assert parent.data.metrics == {"evaluate/total": 3, "evaluate/clip_score": 0.5, "evaluate/chance/clip_score": 0.1}
    assert [point.step for point in client.get_metric_history(parent.info.run_id, "evaluate/clip_score")] == [640]
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["index.html"]
    assert mlflow_run(workspace) == f"{NAME} ({parent.info.run_id}) in the experiment raphael"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_it_ends_as_the_flow_does_and_says_which_stages_were_done(workspace, client, error, status):
    with pytest.raises(error), one_run_over_all(workspace, f"train-{status}", {"encode": "restored"}):
        child = stage_tracks(workspace, "training")
        raise error
    parent = client.get_run(client.get_run(child).data.tags[PARENT])
    assert (parent.info.status, parent.data.tags["stage.encode"]) == (status, "restored")
    assert not parent.data.metrics, "the numbers of an earlier evaluation are not this one's"
