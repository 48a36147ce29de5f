"""A toy workspace: the thirteen stages of the pipeline as one-line scripts, run by the real DVC and the real flows."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml

from flows.environment import prepare
from flows.pipelines import full
from flows.workspace.folder import make_workspace

SCRIPT = """
import json, os, pathlib, sys, time, yaml
name, out = sys.argv[1:]
seed = yaml.safe_load(open("params.yaml"))["generate"]["seed"] if name == "generate" else 0
if seed == 99:
    sys.exit("generate: error: got 99, expected less; set generate.seed in params.yaml")
if seed == 77:
    pathlib.Path("started").write_text(str(os.getpid()))
    time.sleep(600)
pathlib.Path(out).write_text(f"{name} {seed}")
pathlib.Path("reports").mkdir(exist_ok=True)
pathlib.Path(f"reports/{name}.json").write_text(json.dumps({"total": 3, "kept": 2, "dropped": {"late": 1}}))
"""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose stages pass a text along; only `generate` reads a setting, its seed (99 fails, 77 sleeps)."""
    root = make_workspace(tmp_path_factory.mktemp("toy"), [])
    (root / "toy.py").write_text(SCRIPT)
    stages, before = {}, None
    for name in full.STAGES:
        stages[name] = {
            "cmd": f"python toy.py {name} {name}.txt",
            "deps": ["toy.py", *([before] if before else [])],
            "outs": [f"{name}.txt"],
            "metrics": [f"reports/{name}.json"],
            **({"params": ["generate"]} if name == "generate" else {}),
        }
        before = f"{name}.txt"
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    keep = {name: os.environ.get(name) for name in ("PREFECT_HOME", "PATH")}
    prepare(root)
    yield root
    for name, value in keep.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
