"""An address in the registry leads to the weights that were registered, or says why it does not."""

from __future__ import annotations

import shutil

import pytest
from truth.tiny_raphael import write_pipeline

from raphael.base.config.params import load_config
from raphael.base.integrity.contents import seal
from raphael.base.stage import StageError
from raphael.base.tracking import tracker as tracking
from raphael.base.tracking.registered import registered_folder
from raphael.base.tracking.registry import Judgement, promote, register_model


@pytest.fixture(scope="module")
def workspace(project, tmp_path_factory):
    """Settings, and a store with one registered model, which is the best."""
    root = tmp_path_factory.mktemp("registered")
    shutil.copy(project / "params.yaml", root / "params.yaml")
    folder = write_pipeline(root / "models" / "raphael")
    config = load_config(root / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run_id = tracking.create_run(config, root, "a")
        tracker = tracking.MlflowTracker(tracking.resolve_uri(config, root), run_id, tracking.journal_of(root, run_id))
        sha256 = seal(folder)
        assert register_model(tracker, "raphael", folder, sha256, {"images_seen": 1}) == "1"
        promote(tracker, "raphael", sha256, Judgement("p", "m", 0.5, 0.4, 0.6))
        yield root


def test_a_name_with_an_alias_and_one_with_a_version_are_the_folder(workspace):
    for address in ("models:/raphael@best", "models:/raphael/1"):
        assert registered_folder(address, workspace / "params.yaml") == workspace / "models" / "raphael"


def test_the_best_model_is_served_by_its_address(workspace, monkeypatch):
    """`raphael serve --checkpoint models:/raphael@best`: its id is the address, its bytes are the folder's."""
    from serve.conftest import running

    from raphael.serve.info import Catalogue
    from raphael.serve.models import open_models
    from raphael.serve.server import local_perform

    monkeypatch.chdir(workspace)
    models = open_models(["models:/raphael@best", "models/raphael"], "cpu")
    assert list(models) == ["raphael@best", "raphael"]
    with running(Catalogue(tuple(served.info for served in models.values())), local_perform(models)) as served:
        asked = {"prompt": "a", "seed": 1, "num_inference_steps": 1}
        best, own = (served.client.post("/v1/images", json=asked | {"model": name}).json() for name in models)
        assert best["images"] == own["images"] and best["model"] == "raphael@best"
        ids = [model["id"] for model in served.client.get("/v1/models").json()["models"] if model["default"]]
        assert ids == ["raphael@best"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("models:/raphael@none", "not in the registry"),
        ("models:/raphael/7", "not in the registry"),
        ("models:/nobody@best", "not in the registry"),
        ("models:/raphael", "expected models:/NAME@ALIAS"),
        ("models:/../raphael@best", "expected models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_there_is_one_line(workspace, address, words):
    with pytest.raises(StageError, match=words) as error:
        registered_folder(address, workspace / "params.yaml")
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_another_model_by_now_is_refused(workspace, project, tmp_path):
    folder = workspace / "models" / "raphael"
    kept = tmp_path / "kept"
    shutil.move(folder, kept)
    with pytest.raises(StageError, match="where no checkpoint is"):
        registered_folder("models:/raphael@best", workspace / "params.yaml")
    write_pipeline(folder, seed=1)
    with pytest.raises(StageError, match="holds .* by now, expected"):
        registered_folder("models:/raphael@best", workspace / "params.yaml")
    shutil.rmtree(folder)
    shutil.move(kept, folder)
    shutil.copy(project / "params.yaml", tmp_path / "params.yaml")
    with pytest.raises(StageError, match="no tracking store"):
        registered_folder("models:/raphael@best", tmp_path / "params.yaml")
