"""Where a pipeline's folder is accepted: a path, or the name of a model that comes with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from truth.tiny_raphael import write_pipeline

from raphael.base.stage import StageError, write_json
from raphael.cli.main import main
from raphael.pretrained import find
from raphael.pretrained.find import default_pipeline, find_pipeline


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A package with one model, "scenes", that has just a name."""
    home = tmp_path / "package"
    for name in ("manifest.json", "meta.json"):
        write_json(home / "scenes" / name, {})
    monkeypatch.setattr(find, "HOME", home)
    return home


def pretend(folder: Path) -> Path:
    """A folder that looks like a pipeline from outside."""
    for name in ("manifest.json", "meta.json"):
        write_json(folder / name, {})
    return folder


def test_a_name_is_found_in_the_package_and_a_path_where_it_points(home, tmp_path):
    mine = pretend(tmp_path / "mine")
    assert find_pipeline("scenes") == home / "scenes"
    assert find_pipeline(mine) == find_pipeline(str(mine)) == find_pipeline("mine", tmp_path) == mine


def test_a_pipeline_of_that_path_comes_before_the_name_and_another_folder_does_not(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scenes").mkdir()
    assert find_pipeline("scenes") == home / "scenes"
    pretend(Path("scenes"))
    assert find_pipeline("scenes") == Path("scenes")


def test_a_wrong_name_says_what_was_expected_and_the_names(home):
    with pytest.raises(StageError, match="scnes: no such folder; expected a pipeline folder.*package: scenes; did you"):
        find_pipeline("scnes")
    with pytest.raises(StageError, match="no/such: no such folder; .*: scenes$"):
        find_pipeline("no/such")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model_index.json", "is diffusers' form; make a pipeline folder of it: raphael import .*/it --out NEW"),
        ("models/raphael/meta.json", "is a workspace; name the pipeline in it: .*/it/models/raphael"),
        ("raphael/meta.json", "is a folder of models; name the pipeline in it: .*/it/raphael"),
        ("images.json", "is a folder of generated images; expected a pipeline folder"),
        ("model.safetensors", "is a text encoder; expected a pipeline folder"),
        ("diffusion_pytorch_model.safetensors", "is an autoencoder; expected a pipeline folder"),
        (".", "is an empty folder; expected a pipeline folder"),
    ],
)
def test_a_wrong_folder_says_what_it_is(home, tmp_path, file, said):
    place = tmp_path / "it" / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if file == "." else place.write_text("{}")
    with pytest.raises(StageError, match=said) as caught:
        find_pipeline(tmp_path / "it")
    assert "\n" not in str(caught.value)


def test_without_a_name_the_trained_model_is_used_and_ours_only_where_there_is_none(home, tmp_path):
    folder, note = default_pipeline(tmp_path)
    assert folder == home / "scenes" and "using scenes" in note and "\n" not in note
    trained = pretend(tmp_path / "models/raphael")
    assert default_pipeline(tmp_path) == (trained, "")


def test_a_package_without_models_names_none(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "HOME", tmp_path / "nothing")
    assert find.names() == [] and default_pipeline(tmp_path) == (tmp_path / "models/raphael", "")
    with pytest.raises(
        StageError, match=r"pipeline folder, such as models/raphael \(run the stage train, or dvc pull\)$"
    ):
        find_pipeline("scenes")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("package") / "scenes")


@pytest.fixture
def shipped(model, tmp_path, monkeypatch) -> Path:
    """The package has a real, tiny model, and the working folder nothing at all."""
    monkeypatch.setattr(find, "HOME", model.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_generates_with_our_model_where_nothing_was_trained_and_says_so(shipped, capsys):
    assert main(["generate", "a red circle left of a blue square", "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 2 and "raphael generate: no model was named" in said.err
    assert said.out.strip() == "generated/a-red-circle-left-of-a-blue-square-seed0/00000.png"
    assert (shipped / said.out.strip()).is_file()
    assert main(["generate", "a red circle", "--steps", "1", "--checkpoint", "scenes", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert (
        said.err.startswith("raphael generate: device ")
        and (shipped / "generated/a-red-circle-seed3/00000.png").is_file()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["routes", "a red circle", "--checkpoint", "scenes"],
        ["figures", "--checkpoint", "scenes", "--num-words", "2"],
        ["info", "--checkpoint", "scenes"],
        ["info"],
        ["export", "scenes", "--out", "exported", "--format", "safetensors"],
    ],
)
def test_wherever_a_checkpoint_is_asked_for_a_name_will_do(shipped, arguments, capsys):
    assert main(arguments) == 0, capsys.readouterr().err


def test_a_wrong_name_is_one_line_of_the_command(shipped, capsys):
    assert main(["generate", "a", "--checkpoint", "scene"]) == 1
    assert "raphael generate: error: scene: no such folder" in capsys.readouterr().err
