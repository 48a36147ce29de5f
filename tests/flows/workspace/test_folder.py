"""What is in a workspace beside its settings: the code as a copy, the models that come with it as links."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from truth.tiny_raphael import write_pipeline

from flows.workspace import folder as workspaces
from flows.workspace.folder import make_workspace
from raphael.pretrained import find


@pytest.fixture
def project_with_a_model(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, whose folder of models is another, with one tiny model in it."""
    home = tmp_path / "project"
    home.mkdir()
    for entry in project.iterdir():
        if entry.name not in ("raphael", "work", ".git"):
            (home / entry.name).symlink_to(entry)
    (home / "raphael").mkdir()
    for entry in (project / "raphael").iterdir():
        if entry.name != "pretrained":
            (home / "raphael" / entry.name).symlink_to(entry)
    models = home / "raphael/pretrained"
    models.mkdir()
    for file in (project / "raphael/pretrained").glob("*.py"):
        (models / file.name).write_bytes(file.read_bytes())
    write_pipeline(models / "scenes")
    monkeypatch.setattr(workspaces, "PROJECT", home)
    monkeypatch.setattr(find, "HOME", models)
    return home


def test_a_model_is_a_link_and_its_code_a_copy_and_made_again_nothing_changes(project_with_a_model, tmp_path):
    root = make_workspace(tmp_path / "space", [])
    model = root / "raphael/pretrained/scenes"
    assert model.is_symlink() and model.resolve() == project_with_a_model / "raphael/pretrained/scenes"
    assert (root / "raphael/pretrained/find.py").is_file() and not (root / "raphael/pretrained/find.py").is_symlink()
    stamp = model.lstat().st_mtime_ns
    make_workspace(tmp_path / "space", [])
    assert model.lstat().st_mtime_ns == stamp and (model / "manifest.json").is_file()


def test_a_workspace_of_a_project_that_moved_links_to_where_the_model_is_now(project_with_a_model, tmp_path):
    root = make_workspace(tmp_path / "space", [])
    link = root / "raphael/pretrained/scenes"
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    make_workspace(tmp_path / "space", [])
    assert link.resolve() == project_with_a_model / "raphael/pretrained/scenes"


def test_the_real_project_s_workspace_finds_the_model_by_its_name(tmp_path):
    """In a process of its own, with the workspace's own code."""
    if not find.names():
        pytest.skip("no model comes with this package yet")
    root = make_workspace(tmp_path / "space", [])
    say = "from raphael.pretrained.find import find_pipeline; print(find_pipeline('scenes'))"
    done = subprocess.run([sys.executable, "-c", say], cwd=root, capture_output=True, text=True, env={"PATH": ""})
    assert done.stdout.strip() == str(root / "raphael/pretrained/scenes"), done.stderr
    assert not [path for path in (root / "raphael").rglob("ema.safetensors") if not path.parent.is_symlink()]
