"""What the MLflow run of a fine-tuning says that it came from."""

import json
from dataclasses import replace

from truth.own_images import sidecars
from truth.training_workspace import write_workspace

from flows.workspace.folder import fingerprint
from raphael.base.stage import Stage
from raphael.base.tracking.tracker import connect
from raphael.systems.job import Folders
from raphael.systems.train_stage import start_run


def inputs(uri, run_id):
    """{name: (digest, where it lies)} of a run's data sets."""
    found = connect(uri).get_run(run_id).inputs.dataset_inputs
    return {entry.dataset.name: (entry.dataset.digest, json.loads(entry.dataset.source)["uri"]) for entry in found}


def test_its_run_names_the_base_model_and_the_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain = write_workspace(tmp_path / "workspace", {"train": {"num_workers": 0}})
    photos = sidecars(tmp_path / "photos", 2)
    source = replace(plain.source, kind="folder", path=str(photos), fingerprint=fingerprint(photos))
    train = replace(plain.train, init_from="models/base", init_sha256="0123456789abcdef")
    stage = Stage("train", tmp_path / "workspace")
    folders = Folders.of(tmp_path / "workspace", tmp_path / "workspace/work/train/one")
    folders.work.mkdir(parents=True)
    job = start_run(replace(plain, train=train, source=source), stage, folders)
    told = inputs(job.tracking_uri, job.run_id)
    assert told.keys() == {"records", "base", "images"}
    assert told["base"] == ("0123456789abcdef", "models/base")
    assert told["images"] == (fingerprint(photos)[:36], str(photos))
    again = start_run(replace(plain, train=train, source=source), stage, folders)
    assert again.run_id == job.run_id, "what goes on after a kill is the same run"
    other = Folders.of(tmp_path / "workspace", tmp_path / "workspace/work/train/two")
    other.work.mkdir()
    nothing = start_run(plain, stage, other)
    assert inputs(nothing.tracking_uri, nothing.run_id).keys() == {"records"}
