from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from flows.ablation.page import render
from flows.ablation.plan import PLAN, cases_of, load_plan, make_case, preset_text
from flows.ablation.results import Difference, Spread, collect
from flows.arms.cases import Case
from flows.arms.runner import run_all
from flows.environment import SWITCHES
from flows.workspace import settings
from raphael.base.config.params import load_config
from raphael.base.config.preset import Preset
from raphael.base.stage import StageError, write_json
from raphael.base.strict import ConfigError, flatten, load

PROJECT = Path(__file__).resolve().parents[3]
SHARES = ("background_colour", "shape_colour", "shape", "count", "style", "relation")


def plan_of(tmp_path: Path, **changes):
    data = {**yaml.safe_load(PLAN.read_text()), **changes}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_plan(file)


def test_the_plans_arms_change_what_they_name_and_nothing_else():
    plan = load_plan()
    full = load(Preset, yaml.safe_load(preset_text(plan, "full")), "full")
    dense = load(Preset, yaml.safe_load(preset_text(plan, "dense")), "dense")
    assert dense == replace(full, unet=replace(full.unet, time_layer="none", space_layer="dense", dense_expansion=10))


def test_all_arms_of_the_plan_cost_the_same_floating_point_operations():
    from raphael.summary.model import unet_flops

    plan = load_plan()
    presets = {arm: load(Preset, yaml.safe_load(preset_text(plan, arm)), arm) for arm in plan.arms}
    flops = {arm: unet_flops(preset, (64, 64)) for arm, preset in presets.items()}
    for arm, count in flops.items():
        assert count == pytest.approx(flops["full"], rel=0.02), arm


def test_cases_come_seed_by_seed_so_that_an_ablation_cut_short_has_whole_seeds(tmp_path):
    plan = load_plan()
    names = [case.name for case in cases_of(plan, tmp_path)]
    assert names[:5] == [f"{arm}-0" for arm in plan.arms] and len(names) == 15


def test_what_a_plan_gets_wrong_is_named(tmp_path):
    arms = {"full": {"about": "", "unet": ["space_layers=dense"], "params": []}}
    with pytest.raises(ConfigError, match="seeds: got \\[1\\], expected two or more"):
        plan_of(tmp_path, seeds=[1])
    with pytest.raises(ConfigError, match="arms: got full, expected two or more"):
        plan_of(tmp_path, arms=arms)
    plan = plan_of(tmp_path, arms={**arms, "other": {"about": "", "unet": [], "params": []}})
    with pytest.raises(ConfigError, match="arms.full.unet: unknown field space_layers, did you mean space_layer"):
        preset_text(plan, "full")


def test_a_case_is_a_workspace_with_the_arms_network_under_the_presets_name(tmp_path):
    plan = load_plan()
    case = Case("no-time-moe", 2, tmp_path / "no-time-moe-2")
    make_case(plan, case, {"tracking.experiment": "here"})
    config = load_config(case.folder / "params.yaml")
    assert (config.train.seed, config.train.loop.num_images, config.tracking.experiment) == (2, 30000, "here")
    preset = yaml.safe_load((case.folder / "raphael/presets/tiny.yaml").read_text())
    assert (preset["unet"]["time_layer"], preset["unet"]["dense_expansion"]) == ("dense", 2)
    assert f"dir = {tmp_path / 'cache'}" in (case.folder / ".dvc" / "config").read_text()


def test_spreads_and_differences_are_those_of_the_textbook():
    a, b = [0.5, 0.6, 0.55], [0.7, 0.9, 0.8]
    spread = Spread.of(a)
    assert spread.mean == pytest.approx(np.mean(a)) and spread.error == pytest.approx(np.std(a, ddof=1) / np.sqrt(3))
    difference = Difference.of(Spread.of(b), spread)
    expected = np.sqrt(np.var(a, ddof=1) / 3 + np.var(b, ddof=1) / 3)
    assert difference.value == pytest.approx(0.25) and difference.error == pytest.approx(expected)
    assert difference.told and not Difference.of(Spread.of([0.5, 0.7]), spread).told
    assert not Difference.of(Spread.of([9.0]), spread).told  # a single seed has no spread


def fabricated(case: Case, plan) -> None:
    """The reports of a case: the arm's place in the plan decides the shape accuracy, the seed a little noise."""
    place = list(plan.arms).index(case.arm)
    accuracies = {f"{name}_accuracy": 0.5 for name in SHARES} | {"shape_accuracy": 0.8 - 0.1 * place + 0.01 * case.seed}
    chance = {f"{name}_accuracy": 0.1 for name in SHARES}
    distances = {"fd_clip_self_800": 0.1 + 0.001 * case.seed, "clip_score_self": 0.7}
    reports = case.folder / "reports"
    losses = [0.9 - 0.1 * t + 0.02 * place + 0.001 * case.seed for t in range(3)]
    measured = {**accuracies, **{f"{name}_n": 9 for name in accuracies}, **distances, "chance": chance}
    measured |= {"timestep_loss": sum(losses) / 3, "timestep_losses": {"timesteps": [50, 500, 950], "losses": losses}}
    write_json(reports / "evaluate.json", {**measured, "nearest_training_picture_cosine": 0.9})
    write_json(reports / "train.json", {"parameters": 1000 + place, "total": 30000})
    curve = [{"images": n, "train/denoise": 1 / n + 0.01 * case.seed} for n in (960, 1920)]
    write_json(case.folder / "models" / "raphael" / "curves.json", curve)


def test_the_page_shows_means_errors_and_only_the_differences_that_can_be_told(tmp_path):
    plan = load_plan()
    cases = cases_of(plan, tmp_path)
    for case in cases:
        make_case(plan, case, {}) if case.seed == 0 else None
        fabricated(case, plan)
    results = collect(plan, cases)
    row = results["metrics"]["shape_accuracy"]["arms"]["dense"]
    assert row["mean"] == pytest.approx(0.41) and row["difference"] == pytest.approx(-0.4) and row["told_apart"]
    assert not results["metrics"]["count_accuracy"]["arms"]["dense"]["told_apart"]
    assert not results["metrics"]["fd_clip_self_800"]["arms"]["dense"]["told_apart"]
    assert results["metrics"]["timestep_loss"]["arms"]["full"]["mean"] == pytest.approx(0.801)
    assert "nearest_training_picture_cosine" not in results["metrics"], "neither way of it is better"
    assert results["arms"]["full"]["curve"][0] == [
        960,
        pytest.approx(1 / 960 + 0.01),
        pytest.approx(0.01 / math.sqrt(3)),
    ]
    assert results["arms"]["dense"]["gflop_per_image"] > 0 and results["arms"]["dense"]["images_per_s"] is None
    page = render(results)
    assert page.count("<svg") == 3 and "http://" not in page.replace("http://www.w3.org", "") and "-0.4000" in page
    for arm in plan.arms:
        assert arm in page
    json.dumps(results, allow_nan=False)


def test_a_case_that_fails_is_named_at_the_end_and_the_others_are_done(tmp_path):
    cases, done = [Case(arm, 0, tmp_path) for arm in ("a", "b", "c")], []

    def runner(case):
        if case.arm == "b":
            raise StageError("b-0: train: error: got nothing")

    runner.stopped = threading.Event()
    failed = run_all(runner, cases, 2, lambda case: done.append(case.arm), logging.getLogger("test"))
    assert sorted(done) == ["a", "c"] and failed == {"b-0": "b-0: train: error: got nothing"}
    assert runner.stopped.is_set()


DDPM = {
    "about": "?", "preset": "none", "system": "ddpm", "seeds": [0, 1], "params": ["train.num_workers=0"],
    "arms": {
        "cosine": {"about": "the cosine", "unet": [], "params": []},
        "deeper": {"about": "more blocks", "unet": ["res_blocks=2"], "params": ["train.settings.label_drop=0.2"]},
    },
}  # fmt: skip


def ddpm_plan(tmp_path: Path, **changes):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**DDPM, **changes}, sort_keys=False))
    return load_plan(tmp_path / "plan.yaml")


def test_an_arm_of_another_system_has_its_settings_and_its_numbers_on_the_page(tmp_path):
    plan = ddpm_plan(tmp_path)
    cases = cases_of(plan, tmp_path)
    for case in cases:
        make_case(plan, case, {"tracking.experiment": "here"})
        config = load_config(case.folder / "params.yaml")
        deeper = case.arm == "deeper"
        assert config.model.system == "ddpm" and config.train.seed == case.seed
        assert config.model.load().unet.res_blocks == (2 if deeper else 1)
        assert config.training().label_drop == (0.2 if deeper else 0.1)
        assert config.evaluate.metrics == ("timestep_loss",), "of the cases, beside the system's own"
        read = {"class_accuracy": 0.5 + 0.2 * deeper + 0.01 * case.seed, "class_accuracy_n": 240}
        measured = {**read, "fd_random64_240": 0.3, "recall_random64": 0.9, "class_accuracy_ceiling": 0.99}
        losses = {"timestep_loss": 0.2, "timestep_losses": {"timesteps": [50, 950], "losses": [0.1, 0.3]}}
        write_json(case.folder / "reports/evaluate.json", {**measured, **losses})
        write_json(case.folder / "reports/train.json", {"parameters": 9, "total": 64})
        write_json(case.folder / "models/raphael/curves.json", [{"images": n, "train/loss": 1 / n} for n in (32, 64)])
    results = collect(plan, cases)
    kinds = {name: metric["kind"] for name, metric in results["metrics"].items()}
    assert kinds == {
        "class_accuracy": "accuracy", "fd_random64_240": "distance", "recall_random64": "distance",
        "timestep_loss": "loss", "timestep_loss_t0050": "timestep", "timestep_loss_t0950": "timestep",
    }  # fmt: skip
    assert results["metrics"]["class_accuracy"]["arms"]["deeper"]["told_apart"]
    flops = {arm: facts["gflop_per_image"] for arm, facts in results["arms"].items()}
    assert flops["deeper"] > 1.3 * flops["cosine"] > 0
    page = render(results)
    assert "deeper</b>, class: +0.2" in page and "space experts" not in page


def test_what_a_plan_of_another_system_gets_wrong_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="system: got 'dppm', expected one of raphael.*; did you mean ddpm"):
        ddpm_plan(tmp_path, system="dppm")
    arms = {**DDPM["arms"], "wrong": {"about": "", "unet": ["res_block=2", "space_layer=moe"], "params": []}}
    plan = ddpm_plan(tmp_path, arms=arms)
    with pytest.raises(ConfigError, match="arms.wrong.unet: unknown field res_block, did you mean res_blocks"):
        make_case(plan, Case("wrong", 0, tmp_path / "wrong-0"), {})
    assert not (tmp_path / "wrong-0").exists()


def test_a_case_without_drawn_scenes_has_no_loss_and_a_page_all_the_same(tmp_path):
    plan = load_plan()
    cases = [case for case in cases_of(plan, tmp_path) if case.arm in ("full", "dense")]
    for case in cases:
        make_case(plan, case, {}) if case.seed == 0 else None
        fabricated(case, plan)
        write_json(case.folder / "reports" / "evaluate.json", {"clip_score_self": 0.5 + 0.1 * case.seed})
    page = render(collect(plan, cases))
    assert "no drawn scenes lie beside the data" in page and "nothing reads these images" in page


def small_raphael() -> dict:
    overlay = [f"{key}={json.dumps(value)}" for key, value in settings.flat(PROJECT / "params.debug.yaml").items()]
    arms = {
        "full": {"about": "all", "unet": [], "params": []},
        "dense": {
            "about": "none",
            "unet": ["time_layer=none", "space_layer=dense"],
            "params": ["train.settings.edge_weight=0.0"],
        },
    }
    plan = {"about": "?", "preset": "tiny-debug", "seeds": [0, 1], "arms": arms}
    return {**plan, "params": [*overlay, "train.num_workers=0"]}


def small_ddpm() -> dict:
    from truth.class_workspace import LOOP, SMALL

    sizes = {"source": {"scenes": {"num_rows": 120, "num_heldout_prompts": 4, "num_probe_scenes": 6}}}
    sizes |= {"model": {"settings": SMALL}, "train": {"loop": LOOP}, "generate": {"steps": 2, "images_per_prompt": 2}}
    overlay = [f"{key}={json.dumps(value)}" for key, value in flatten(sizes).items()]
    return {**DDPM, "params": [*DDPM["params"], *overlay]}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("plan", "metrics"),
    [(small_raphael(), {"shape_accuracy", "clip_score_self"}), (small_ddpm(), {"class_accuracy", "fd_random64_12"})],
    ids=["raphael", "ddpm"],
)
def test_a_small_ablation_runs_to_its_page_and_the_second_time_does_nothing(tmp_path, plan, metrics):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    for name in ("params.yaml", "prefect.toml"):
        (tmp_path / name).write_text((PROJECT / name).read_text())
    command = [sys.executable, "-m", "flows.run_ablation", "--plan", "plan.yaml", "--jobs", "2"]
    env = {**os.environ, **SWITCHES, "PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(tmp_path / ".run" / "prefect")}
    first = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((tmp_path / "reports" / "ablation.json").read_text())
    assert results["arms"][next(iter(plan["arms"]))]["seeds"] == [0, 1]
    assert {"timestep_loss", "timestep_loss_t0950", *metrics} <= results["metrics"].keys()
    assert (tmp_path / "reports" / "ablation.html").is_file()
    spaces = tmp_path / "work" / "spaces" / "ablation"
    stamps = {file: file.stat().st_mtime for file in spaces.glob("*/models/raphael/manifest.json")}
    assert len(stamps) == 4
    second = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert second.returncode == 0 and {file: file.stat().st_mtime for file in stamps} == stamps
    assert json.loads((tmp_path / "reports" / "ablation.json").read_text()) == results
