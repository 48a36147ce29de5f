"""dvc.yaml against the code and the flows, and the running of stages on a small pipeline of its own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flows import data, evaluate, full, train
from flows.environment import prepare
from flows.pipeline import DVC, ancestors, out_of_date, read_pipeline, reproduce
from flows.workspace import DVC_CONFIG
from raphael.stage import StageError

PROJECT = Path(__file__).resolve().parents[2]
# Not dependencies of a stage: what a stage makes of its settings and inputs does not come from these.
GROUND = {"raphael.stage", "raphael.strict", "raphael.config", "raphael.tracking", "raphael.manifest"}


@pytest.mark.parametrize("flow", [full, data, train, evaluate])
def test_the_order_of_a_flow_is_a_topological_order_of_the_pipeline(flow) -> None:
    needs = ancestors(read_pipeline(PROJECT))
    for place, name in enumerate(flow.STAGES):
        late = needs[name] & set(flow.STAGES[place:])
        assert not late, f"{name} comes before {late}, which it needs"


def test_the_full_flow_runs_every_stage_once_and_the_others_share_them_out() -> None:
    assert sorted(full.STAGES) == sorted(read_pipeline(PROJECT))
    assert full.STAGES == data.STAGES + train.STAGES + evaluate.STAGES


def test_every_section_code_file_and_module_that_the_pipeline_names_exists() -> None:
    sections = yaml.safe_load((PROJECT / "params.yaml").read_text())
    pipeline = read_pipeline(PROJECT)
    made = [out for entry in pipeline.values() for out in entry.outs]
    for name, entry in pipeline.items():
        assert set(entry.params) <= set(sections), (
            f"{name}: params {set(entry.params) - set(sections)} not in params.yaml"
        )
        for dep in entry.deps:
            dep = dep.replace("${model.preset}", sections["model"]["preset"])
            inside = any(dep == out or dep.startswith(f"{out}/") for out in made)
            assert inside or (PROJECT / dep).exists(), f"{name}: dependency {dep} is neither made by a stage nor there"
        assert module_file(entry.command.removeprefix("python -m ")), f"{name}: no module for {entry.command}"


@pytest.mark.parametrize("name", list(read_pipeline(PROJECT)))
def test_a_stage_depends_on_all_code_that_it_uses(name: str) -> None:
    entry = read_pipeline(PROJECT)[name]
    used = closure(entry.command.removeprefix("python -m "))
    covered = [dep for dep in entry.deps if not dep.startswith(("data/", "models/", "reports/"))]
    missing = sorted(file for file in used if not any(file == dep or file.startswith(f"{dep}/") for dep in covered))
    assert not missing, (
        f"dvc.yaml: {name} uses {missing} without depending on it: a change there would keep old results"
    )


def module_file(module: str) -> Path | None:
    base = PROJECT.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__main__.py", base / "__init__.py"):
        if file.is_file():
            return file
    return None


def closure(module: str) -> set[str]:
    """Files of the project that a module imports, directly or not, at the top or inside functions."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = module_file(name)
        if file is None or name in found or name in GROUND:
            continue
        found[name] = file
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = {file.relative_to(PROJECT).as_posix() for file in found.values()}
    return {path for path in paths if path.startswith(("raphael/", "data_pipeline/")) and "__init__" not in path}


SCRIPT = """
import sys, time, pathlib, yaml
params = yaml.safe_load(open("params.yaml"))
name, out = sys.argv[1:]
seed = params["generate"]["seed"]
if name == "last" and seed == 99:
    sys.exit("last: error: got 99, expected less; set generate.seed")
if name == "last" and seed == 77:
    pathlib.Path("started").write_text("1"); time.sleep(600)
pathlib.Path(out).write_text(f"{name} {seed if name == 'last' else 0}")
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages: `first`, and `last`, which reads its output and the section generate."""
    root = tmp_path_factory.mktemp("toy")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text(DVC_CONFIG)
    (root / "stage.py").write_text(SCRIPT)
    shutil.copy(PROJECT / "params.yaml", root)
    stages = {
        "first": {"cmd": "python stage.py first a.txt", "deps": ["stage.py"], "outs": ["a.txt"]},
        "last": {
            "cmd": "python stage.py last b.txt",
            "deps": ["stage.py", "a.txt"],
            "params": ["generate"],
            "outs": ["b.txt"],
        },
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    keep = {name: os.environ.get(name) for name in ("PREFECT_HOME", "PATH")}
    prepare(root)
    yield root
    for name, value in keep.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def set_seed(root: Path, seed: int) -> None:
    from flows import settings

    settings.apply(root / "params.yaml", {"generate.seed": seed})


def test_a_stage_runs_once_then_is_up_to_date_and_an_old_result_is_restored(toy: Path) -> None:
    set_seed(toy, 0)
    assert set(out_of_date(toy)) == {"first", "last"}
    assert reproduce(toy, "first") == "ran"
    assert reproduce(toy, "last") == "ran"
    assert out_of_date(toy) == {}
    assert reproduce(toy, "last") == "up to date"
    set_seed(toy, 1)
    assert set(out_of_date(toy)) == {"last"}
    assert reproduce(toy, "last") == "ran"
    set_seed(toy, 0)
    assert reproduce(toy, "last") == "restored"
    assert (toy / "b.txt").read_text() == "last 0"


def test_a_failing_stage_ends_in_its_own_line(toy: Path) -> None:
    reproduce(toy, "first")
    set_seed(toy, 99)
    with pytest.raises(StageError, match=r"^last: error: got 99, expected less; set generate.seed$"):
        reproduce(toy, "last")
    set_seed(toy, 0)


def test_a_second_run_at_the_same_time_is_told_so_and_the_first_can_be_ended_whole(toy: Path) -> None:
    import psutil

    reproduce(toy, "first")
    set_seed(toy, 77)
    code = "from pathlib import Path; from flows.pipeline import reproduce; from raphael.stage import one_clear_line\n"
    code += "with one_clear_line('first run'):\n    reproduce(Path('.').resolve(), 'last')"
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=toy, env=env)
    try:
        deadline = 120
        while not (toy / "started").exists() and deadline:
            deadline -= 1
            time.sleep(0.5)
        assert (toy / "started").exists()
        with pytest.raises(StageError, match="another run is going on"):
            reproduce(toy, "last")
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.terminate()
        process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        process.kill()
        (toy / "started").unlink(missing_ok=True)
    set_seed(toy, 0)
    assert reproduce(toy, "last") in ("ran", "restored", "up to date")  # the lock of the dead is no lock


def test_status_is_the_same_question_that_dvc_answers(toy: Path) -> None:
    done = subprocess.run([*DVC, "status", "--json"], cwd=toy, capture_output=True, text=True)
    assert set(json.loads(done.stdout)) == set(out_of_date(toy))
