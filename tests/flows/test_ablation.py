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

from flows import settings
from flows.ablation import run_all
from flows.ablation_page import render
from flows.ablation_plan import PLAN, Case, cases_of, load_plan, make_case, preset_text
from flows.ablation_results import Difference, Spread, collect
from flows.environment import SWITCHES
from flows.timestep_loss import heldout_pictures, timestep_losses
from raphael.config import load_config
from raphael.config_data import PictureConfig
from raphael.preset import Preset
from raphael.stage import StageError, write_json
from raphael.strict import ConfigError, load

PROJECT = Path(__file__).resolve().parents[2]
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
    from raphael.generate.anatomy import unet_flops

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
    with pytest.raises(ConfigError, match="arms.full.unet: unknown field space_layers"):
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
    write_json(reports / "evaluate.json", {**accuracies, **distances, "chance": chance})
    losses = [0.9 - 0.1 * t + 0.02 * place + 0.001 * case.seed for t in range(3)]
    write_json(reports / "timestep_loss.json", {"timesteps": [50, 500, 950], "losses": losses})
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
    assert results["metrics"]["loss"]["arms"]["full"]["mean"] == pytest.approx(0.801)
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


def test_the_loss_by_timestep_is_the_mean_square_of_a_naive_loop(tmp_path):
    import torch
    from truth.tiny_raphael import write_pipeline

    from raphael.diffusion.latents import sample_latents
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(write_pipeline(tmp_path / "model"))
    config = load_config(PROJECT / "params.yaml")
    pictures, captions = heldout_pictures(replace(config, picture=PictureConfig(sizes_px=((48, 64),))), 5)
    pictures = pictures[:, :32, :32]
    losses = timestep_losses(pipeline, pictures, captions, bins=4)
    with torch.inference_mode():
        total = 0.0
        for i in range(5):
            image = torch.from_numpy(pictures[i : i + 1]).permute(0, 3, 1, 2) / 127.5 - 1
            autoencoder = pipeline.autoencoder
            x0 = sample_latents(autoencoder.encode_moments(image), autoencoder.scaling_factor, autoencoder.shift)
            noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(i))[None]
            alpha_bar = pipeline.schedule.alpha_bar[625]
            text = pipeline.encode([captions[i]])
            noised = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
            velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
            output = pipeline.unet(noised.float(), torch.tensor([625.0]), text.context, text.mask)
            total += (output.prediction - velocity).square().mean().item()
    assert losses[2] == pytest.approx(total / 5, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_small_ablation_runs_to_its_page_and_the_second_time_does_nothing(tmp_path):
    overlay = [f"{key}={json.dumps(value)}" for key, value in settings.flat(PROJECT / "params.debug.yaml").items()]
    arms = {
        "full": {"about": "all", "unet": [], "params": []},
        "dense": {
            "about": "none",
            "unet": ["time_layer=none", "space_layer=dense"],
            "params": ["train.edge_weight=0.0"],
        },
    }
    plan = {"about": "?", "preset": "tiny-debug", "seeds": [0, 1], "arms": arms}
    plan["params"] = [*overlay, "train.num_workers=0"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    command = [sys.executable, "-m", "flows.run_ablation", "--plan", "plan.yaml", "--jobs", "2"]
    env = {**os.environ, **SWITCHES, "PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(tmp_path / ".run" / "prefect")}
    first = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((tmp_path / "reports" / "ablation.json").read_text())
    assert results["arms"]["full"]["seeds"] == [0, 1] and (tmp_path / "reports" / "ablation.html").is_file()
    spaces = tmp_path / "work" / "spaces" / "ablation"
    stamps = {file: file.stat().st_mtime for file in spaces.glob("*/models/raphael/manifest.json")}
    assert len(stamps) == 4
    second = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert second.returncode == 0 and {file: file.stat().st_mtime for file in stamps} == stamps
    assert json.loads((tmp_path / "reports" / "ablation.json").read_text()) == results
