"""dvc.yaml against the code and the flows, and the running of stages on a small pipeline of its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows.environment import stage_environment
from flows.pipelines import data, evaluate, full, train
from flows.pipelines.dvc_stages import DVC, ancestors, out_of_date, read_pipeline, reproduce
from flows.pipelines.stages import run_stages
from flows.workspace import settings
from raphael.base.code.graph import CodeGraph
from raphael.base.code.stage_code import programs_of
from raphael.base.pipeline import funnel_stages
from raphael.base.stage import StageError

PROJECT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("flow", [full, data, train, evaluate])
def test_the_order_of_a_flow_is_a_topological_order_of_the_pipeline(flow) -> None:
    needs = ancestors(read_pipeline(PROJECT))
    for place, name in enumerate(flow.STAGES):
        late = needs[name] & set(flow.STAGES[place:])
        assert not late, f"{name} comes before {late}, which it needs"


def test_the_full_flow_runs_every_stage_once_and_the_others_share_them_out() -> None:
    assert sorted(full.STAGES) == sorted(read_pipeline(PROJECT))
    assert full.STAGES == data.STAGES + train.STAGES + evaluate.STAGES
    assert data.STAGES and train.STAGES and evaluate.STAGES


def test_the_funnel_is_a_chain_of_the_pipeline_from_the_list_to_the_records() -> None:
    chain, needs = funnel_stages(PROJECT), ancestors(read_pipeline(PROJECT))
    assert (chain[0], chain[-1]) == ("source", "encode")
    assert all(before in needs[after] for before, after in itertools.pairwise(chain))
    retried = [name for name, entry in read_pipeline(PROJECT).items() if entry.meta.get("network")]
    assert retried == ["download"]  # a second try of any other fails as the first did


def test_every_section_input_and_module_that_the_pipeline_names_exists() -> None:
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
            assert any(dep == out or dep.startswith(f"{out}/") for out in made), f"{name}: no stage makes {dep}"
        assert CodeGraph(PROJECT).file(programs_of(PROJECT)[name], run=True), f"{name}: no module for {entry.command}"


def test_no_stage_depends_on_a_file_of_code_but_by_the_version_of_its_code() -> None:
    for name, entry in read_pipeline(PROJECT).items():
        code = [dep for dep in entry.deps if not dep.startswith(("data/", "models/", "reports/"))]
        assert not code, f"dvc.yaml: {name} depends on {code}: a comment there would make it run again"


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


def test_what_stands_in_meta_is_no_reason_to_run_a_stage(toy: Path) -> None:
    set_seed(toy, 0)
    assert reproduce(toy, "generate") in ("up to date", "restored")
    stale, file = set(out_of_date(toy)), toy / "dvc.yaml"
    before = file.read_text()
    pipeline = yaml.safe_load(before)
    for entry in pipeline["stages"].values():
        entry["meta"] = {"flow": "data", "funnel": True}
    file.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert set(out_of_date(toy)) == stale and "generate" not in stale
    file.write_text(before)


def test_a_failing_stage_ends_in_its_own_line(toy: Path) -> None:
    set_seed(toy, 99)
    with pytest.raises(StageError, match=r"^generate: error: got 99, expected less; set generate.seed in params.yaml$"):
        reproduce(toy, "generate")
    set_seed(toy, 0)


def test_a_second_run_at_the_same_time_is_told_so_and_the_first_can_be_ended_whole(toy: Path) -> None:
    (toy / "started").unlink(missing_ok=True)
    set_seed(toy, 77)
    code = "from pathlib import Path; from flows.pipelines.dvc_stages import reproduce\n"
    code += "from raphael.base.stage import one_clear_line\n"
    code += "with one_clear_line('first run'):\n    reproduce(Path('.').resolve(), 'generate')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=toy, env=stage_environment(toy))
    try:
        deadline = time.monotonic() + 120
        while not (toy / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        with pytest.raises(StageError, match="another run is active"):
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


def test_a_second_flow_with_other_overrides_is_refused_before_it_changes_a_setting(toy: Path) -> None:
    """Its settings would reach the stages of the first that are still to come."""
    set_seed(toy, 0)
    before = (toy / "params.yaml").read_bytes()
    code = "import sys; from pathlib import Path; from raphael.base.stage import only_run\n"
    code += "with only_run('flow', Path.cwd()):\n    print(flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", code], cwd=toy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=stage_environment(toy)
    )
    try:
        first.stdout.readline()
        with pytest.raises(
            StageError, match=f"another run of flow is going on in this workspace .process {first.pid}, since"
        ):
            run_stages(evaluate.STAGES, {"generate.seed": 5}, root=toy)
        assert (toy / "params.yaml").read_bytes() == before
    finally:
        first.communicate()


def test_a_flow_on_old_inputs_names_what_to_run_first(toy: Path) -> None:
    settings.apply(toy / "params.yaml", {"generate.seed": 0})
    (toy / "dvc.lock").unlink()
    with pytest.raises(StageError, match="generate: what it needs is out of date: source, select.*raphael/full"):
        run_stages(evaluate.STAGES, root=toy)
