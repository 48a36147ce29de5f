"""dvc.yaml against the code and the flows, and the running of stages on a small pipeline of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows import data, evaluate, full, settings, train
from flows.environment import stage_environment
from flows.pipeline import DVC, ancestors, out_of_date, read_pipeline, reproduce
from flows.stages import run_stages
from raphael.stage import StageError

PROJECT = Path(__file__).resolve().parents[2]
# Not dependencies of a stage: what a stage makes of its settings and inputs does not come from these.
GROUND = {
    "raphael.stage",
    "raphael.strict",
    "raphael.config",
    "raphael.config_data",
    "raphael.tracking",
    "raphael.manifest",
}
GROUND |= {"raphael.preset", "raphael.registry"}


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
        for key in entry.params:
            place = sections
            for part in key.split("."):
                assert part in place, f"{name}: {key} is not in params.yaml"
                place = place[part]
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
    """Files of the project that a module imports, directly or not, at the top or inside functions; not what only
    annotations name, since that changes no result."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = module_file(name)
        if file is None or name in found or name in GROUND:
            continue
        found[name] = file
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = {file.relative_to(PROJECT).as_posix() for file in found.values()}
    return {path for path in paths if path.startswith(("raphael/", "data_pipeline/")) and "__init__" not in path}


def set_seed(root: Path, seed: int) -> None:
    settings.apply(root / "params.yaml", {"generate.seed": seed})


def test_a_stage_runs_once_then_is_up_to_date_and_an_old_result_is_restored(toy: Path) -> None:
    set_seed(toy, 0)
    subprocess.run([*DVC, "repro", "train"], cwd=toy, check=True, capture_output=True, env=stage_environment(toy))
    assert reproduce(toy, "generate") == "ran"
    assert set(out_of_date(toy)) == {"evaluate", "report"}
    assert reproduce(toy, "generate") == "up to date"
    set_seed(toy, 1)
    assert set(out_of_date(toy)) == {"generate", "evaluate", "report"}
    assert reproduce(toy, "generate") == "ran"
    set_seed(toy, 0)
    assert reproduce(toy, "generate") == "restored"
    assert (toy / "generate.txt").read_text() == "generate 0"


def test_a_failing_stage_ends_in_its_own_line(toy: Path) -> None:
    set_seed(toy, 99)
    with pytest.raises(StageError, match=r"^generate: error: got 99, expected less; set generate.seed in params.yaml$"):
        reproduce(toy, "generate")
    set_seed(toy, 0)


def test_a_second_run_at_the_same_time_is_told_so_and_the_first_can_be_ended_whole(toy: Path) -> None:
    (toy / "started").unlink(missing_ok=True)
    set_seed(toy, 77)
    code = "from pathlib import Path; from flows.pipeline import reproduce; from raphael.stage import one_clear_line\n"
    code += "with one_clear_line('first run'):\n    reproduce(Path('.').resolve(), 'generate')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=toy, env=stage_environment(toy))
    try:
        deadline = time.monotonic() + 120
        while not (toy / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        with pytest.raises(StageError, match="another run is going on"):
            reproduce(toy, "generate")
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.terminate()
        process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        process.kill()
    set_seed(toy, 0)
    assert reproduce(toy, "generate") in ("ran", "restored")  # the lock of the dead is no lock


def test_a_flow_on_old_inputs_names_what_to_run_first(toy: Path) -> None:
    settings.apply(toy / "params.yaml", {"generate.seed": 0})
    (toy / "dvc.lock").unlink()
    with pytest.raises(StageError, match="generate: what it needs is out of date: source, select.*raphael/full"):
        run_stages(evaluate.STAGES, root=toy)
