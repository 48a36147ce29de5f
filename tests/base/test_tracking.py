import json
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from raphael.base.config.params import load_config
from raphael.base.strict import ConfigError
from raphael.base.tracking import tracker as tracking
from raphael.base.tracking.pipeline_run import PARENT, VARIABLE, noted_run
from raphael.base.tracking.registry import register_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config():
    return load_config(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def run(config, workspace):
    """A tracker in a run of its own; the data base is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = tracking.resolve_uri(config, workspace)

        def start(name="test"):
            run_id = tracking.create_run(config, workspace, name)
            return tracking.MlflowTracker(uri, run_id, tracking.journal_of(workspace, run_id))

        yield start


def test_the_store_is_in_the_workspace_and_the_environment_wins(config, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.resolve_uri(config, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    relative = replace(config, tracking=replace(config.tracking, uri="sqlite:///runs/x.db"))
    assert tracking.resolve_uri(relative, tmp_path) == f"sqlite:///{tmp_path}/runs/x.db"
    with pytest.raises(ConfigError, match="tracking.uri: got 'mlruns', expected sqlite"):
        tracking.resolve_uri(replace(config, tracking=replace(config.tracking, uri="mlruns")), tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.resolve_uri(relative, tmp_path) == "http://mlflow:5000"


def test_a_run_holds_all_settings_numbers_images_data_and_the_revision(run, config, workspace):
    tracker = run()
    for step in (64, 128):
        tracker.log(
            {"train/loss": 1 / step, "train/space_load/block00_expert1": 0.25, "train/images_per_s": 80.0}, step
        )
    tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), 64)
    tracker.dataset("records", "a" * 64, "data/records", "training")
    tracker.close()
    client = tracking.connect(tracker.uri)
    data = client.get_run(tracker.run_id)
    assert data.data.params["train.loop.batch_size"] == str(config.train.loop.batch_size)
    assert data.data.params["preset.unet.num_space_experts"] == str(config.model.load().unet.num_space_experts)
    assert len(tracking.flatten(tracking.to_dict(config))) <= len(data.data.params)
    assert data.data.metrics["train/loss"] == 1 / 128 and data.info.status == "FINISHED"
    assert data.data.tags["git.revision"] == "unknown"  # a workspace outside of git
    (entry,) = data.inputs.dataset_inputs
    assert entry.dataset.name == "records" and entry.dataset.digest == "a" * 36
    assert (workspace / "mlflow.db").exists() and list(
        workspace.glob(f"mlruns/{tracker.run_id}/artifacts/images/*.png")
    )
    assert not tracker.journal.exists()


def test_a_restart_adds_no_point_and_no_image_twice(run):
    first = run()
    first.log({"train/loss": 1.0}, 64)
    first.log({"train/loss": 2.0}, 128)
    first.image("samples/grid", np.zeros((8, 8, 3), np.uint8), 64)
    again = tracking.MlflowTracker(first.uri, first.run_id, first.journal)
    assert tracking.reopen_run(first.uri, first.run_id)
    again.log({"train/loss": 2.0}, 128)
    again.log({"train/loss": 3.0}, 192)
    again.image("samples/grid", np.zeros((8, 8, 3), np.uint8), 64)
    again.params({"seed": 99, "new": 1})  # MLflow refuses another value: the first stays
    client = tracking.connect(first.uri)
    assert [(point.step, point.value) for point in client.get_metric_history(first.run_id, "train/loss")] == [
        (64, 1.0), (128, 2.0), (192, 3.0)
    ]  # fmt: skip
    assert len([item for item in client.list_artifacts(first.run_id, "images") if item.path.endswith(".png")]) == 1
    params = client.get_run(first.run_id).data.params
    assert params["seed"] == "0" and params["new"] == "1"


def test_two_runs_have_the_same_keys_and_so_compare(run):
    runs = []
    for value in (1.0, 2.0):
        tracker = run()
        tracker.log({"train/loss": value, "train/edge": value}, 64)
        tracker.close()
        runs.append(tracking.connect(tracker.uri).get_run(tracker.run_id))
    a, b = runs
    assert a.data.metrics.keys() == b.data.metrics.keys() and a.data.params == b.data.params
    assert a.info.experiment_id == b.info.experiment_id


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_ends_as_its_block_does(run, error, status):
    tracker = run()
    try:
        with tracking.closing(tracker):
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert tracking.connect(tracker.uri).get_run(tracker.run_id).info.status == status


def test_the_final_model_is_registered_once_without_its_weights(run, workspace):
    tracker = run()
    folder = workspace / "models" / "raphael"
    folder.mkdir(parents=True)
    versions = [register_model(tracker, "raphael", folder, "f" * 64, {"images_seen": 640}) for _ in range(2)]
    assert versions[0] == versions[1]
    other = register_model(run(), "raphael", folder, "e" * 64, {"images_seen": 640})
    assert int(other) == int(versions[0]) + 1
    client = tracking.connect(tracker.uri)
    version = client.get_model_version("raphael", versions[0])
    assert version.run_id == tracker.run_id and version.tags["sha256"] == "f" * 64
    import mlflow

    pointer = json.loads((Path(mlflow.artifacts.download_artifacts(version.source)) / "pointer.json").read_text())
    assert pointer == {"path": str(folder), "sha256": "f" * 64, "images_seen": 640}
    assert register_model(tracking.NullTracker(), "raphael", folder, "f" * 64, {}) is None


def test_what_a_flows_stages_track_stands_under_one_run_made_by_the_first_of_them(run, config, workspace, monkeypatch):
    alone = run("before the flow")
    monkeypatch.setenv(VARIABLE, "full-1234abcd")
    assert noted_run(workspace, "full-1234abcd", alone.uri) is None, "nothing was tracked yet"
    trained, evaluated = run("training"), tracking.tracker_of_evaluation(config, workspace, "d" * 64, alone.run_id)
    client = tracking.connect(alone.uri)
    parent = noted_run(workspace, "full-1234abcd", alone.uri)
    assert client.get_run(parent).info.run_name == "full-1234abcd"
    assert [client.get_run(child).data.tags[PARENT] for child in (trained.run_id, evaluated.run_id)] == [parent] * 2
    monkeypatch.setenv(VARIABLE, "full-5678abcd")
    assert tracking.reopen_run(alone.uri, trained.run_id, workspace)  # a later run of the flow goes on with it
    later = client.get_run(trained.run_id).data.tags[PARENT]
    assert later == noted_run(workspace, "full-5678abcd", alone.uri) != parent
    monkeypatch.delenv(VARIABLE)
    by_hand = tracking.tracker_of_evaluation(config, workspace, "d" * 64, trained.run_id)
    assert client.get_run(by_hand.run_id).data.tags[PARENT] == trained.run_id
    assert PARENT not in client.get_run(alone.run_id).data.tags


def test_evaluation_finds_the_run_that_trained_the_model(run, config, workspace):
    tracker = run()
    tracker.close()
    tracking.remember_run(workspace, "a" * 64, tracker.uri, tracker.run_id)
    found = tracking.tracker_of_model(config, workspace, "a" * 64)
    assert found.run_id == tracker.run_id
    found.log({"evaluate/shape_accuracy": 0.5}, 640)
    strange = tracking.tracker_of_model(config, workspace, "b" * 64)
    assert strange.run_id not in (None, tracker.run_id)
    assert tracking.tracker_of_model(config, workspace, "b" * 64).run_id == strange.run_id


class Away(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(params=["nobody listens", "errors"])
def dead_server(request, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    server = HTTPServer(("127.0.0.1", 0), Away)
    if request.param == "errors":
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    yield f"http://someone:secret@127.0.0.1:{server.server_port}"
    if request.param == "errors":
        server.shutdown()
        server.server_close()


def test_a_server_that_is_away_stops_nothing_and_points_are_kept(dead_server, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    assert tracking.create_run(config, tmp_path, "x") is None
    tracker = tracking.MlflowTracker(dead_server, "a" * 32, tmp_path / "kept.jsonl")
    for step in (1, 2, 3):
        tracker.log({"train/loss": float(step)}, step)
    tracker.image("samples/grid", np.zeros((8, 8, 3), np.uint8), 1)
    tracker.close()
    assert [json.loads(line)["step"] for line in tracker.journal.read_text().splitlines()] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("tracking:") == 2 and "secret" not in said and "kept.jsonl" in said


def test_kept_points_are_sent_when_the_server_is_back(run):
    tracker = run()
    good, tracker.uri = tracker.uri, "http://127.0.0.1:9"
    tracker.log({"train/loss": 1.0}, 64)
    tracker.uri, tracker.client, tracker.retry_at_s = good, None, 0.0
    tracker.log({"train/loss": 2.0}, 128)
    history = tracking.connect(good).get_metric_history(tracker.run_id, "train/loss")
    assert [point.step for point in history] == [64, 128] and not tracker.journal.exists()


def test_the_do_nothing_tracker_does_nothing(tmp_path):
    tracker = tracking.NullTracker()
    with tracking.closing(tracker):
        tracker.log({"a": 1.0}, 1)
        tracker.image("a", None, 1)
        tracker.params({})
        tracker.tags({})
        tracker.dataset("a", "b", "c", "d")
        tracker.artifact(tmp_path)


def test_the_git_revision_says_when_files_differ(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert tracking.git_revision(tmp_path) == "unknown"
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    revision = tracking.git_revision(tmp_path)
    assert len(revision) == 40
    (tmp_path / "file").write_text("2")
    assert tracking.git_revision(tmp_path) == f"{revision}-dirty"


def test_lineage_is_what_the_lock_says(tmp_path):
    assert tracking.dvc_hashes(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  encode:\n    outs:\n    - {path: data/records, md5: abc.dir}\n"
        "    - {path: reports/encode.json, md5: def}\n"
    )
    assert tracking.dvc_hashes(tmp_path) == {"data/records": "abc.dir"}


def test_a_store_once_used_is_not_taken_for_the_next_workspaces(tmp_path, project, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config(project / "params.yaml")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert tracking.create_run(config, tmp_path / name, "run") is not None
        assert (tmp_path / name / "mlflow.db").is_file()
