"""Two stages at once, by the real DVC: what needs nothing of the stage before it does not wait for it."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import psutil
import pytest
import yaml

from flows.environment import prepare
from flows.pipelines import full, stages
from flows.pipelines.beside import next_beside
from flows.pipelines.dvc_stages import ancestors, out_of_date, read_pipeline
from flows.workspace.folder import make_workspace
from raphael.base.stage import StageError

PROJECT = Path(__file__).resolve().parents[3]
NAMES = ["autoencoder", "clip", "encode"]
SCRIPT = """
import os, pathlib, sys, time, yaml
name = sys.argv[1]
seed = yaml.safe_load(open("params.yaml"))["generate"]["seed"]
pathlib.Path(f"{name}.pid").write_text(str(os.getpid()))
others = {"autoencoder": "clip", "clip": "autoencoder"}
deadline = time.monotonic() + 120
while name in others and not pathlib.Path(f"{others[name]}.pid").is_file():
    time.sleep(0.1)
    if time.monotonic() > deadline:
        sys.exit(f"{name}: error: alone")
if seed == 1 and name == "autoencoder":
    sys.exit("autoencoder: error: got 1")
if seed == 1 and name == "clip":
    time.sleep(600)
pathlib.Path(f"{name}.txt").write_text(f"{name} {seed}")
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_workspace(tmp_path / "beside", [])
    (root / "toy.py").write_text(SCRIPT)
    needs = {"encode": ["autoencoder.txt", "clip.txt"]}
    entries = {
        name: {
            "cmd": f"python toy.py {name}",
            "deps": ["toy.py", *needs.get(name, [])],
            "outs": [f"{name}.txt"],
            "params": ["generate"],
        }
        for name in NAMES
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": entries}, sort_keys=False))
    prepare(root)
    monkeypatch.setattr(stages, "available", lambda: 2)
    monkeypatch.setattr(stages, "_logger", lambda: logging.getLogger("flows"))
    monkeypatch.setattr(stages, "_stage_task", lambda stage, begun: lambda *told: stages._run_stage(*told, begun))
    monkeypatch.setattr(stages, "publish_summary", lambda root, outcome: None)
    return root


def test_two_stages_that_need_nothing_of_each_other_run_at_once_and_dvc_has_both(workspace):
    assert stages.run_stages(NAMES, {"generate.seed": 0}, workspace) == dict.fromkeys(NAMES, "ran")
    assert out_of_date(workspace) == {}
    assert set(yaml.safe_load((workspace / "dvc.lock").read_text())["stages"]) == set(NAMES)
    assert "Running stage 'clip'" in (workspace / "work/logs/clip.log").read_text()


def runs(pid: int) -> bool:
    """Whether there is such a process, and not just what nobody has asked after yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_stage_that_fails_ends_the_one_beside_it(workspace):
    with pytest.raises(StageError, match="autoencoder: error: got 1"):
        stages.run_stages(NAMES, {"generate.seed": 1}, workspace)
    assert not runs(int((workspace / "clip.pid").read_text()))
    assert not (workspace / "clip.txt").exists()


def test_of_the_projects_stages_clip_alone_begins_beside_another():
    needs = ancestors(read_pipeline(PROJECT))
    pairs = {name: next_beside(full.STAGES, name, needs) for name in full.STAGES}
    assert {name: other for name, other in pairs.items() if other} == {"autoencoder": "clip"}
