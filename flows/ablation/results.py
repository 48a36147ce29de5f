"""What the cases of an ablation came to: means over seeds with standard errors, and which differences can be told.

A difference counts as told apart when it is larger than two standard errors of the difference, se^2 = se_a^2 + se_b^2
(the seeds of two arms are no pairs: equal seeds give arms of different shape different weights). With this many
comparisons one in twenty passes by luck alone: read the table as a whole.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.ablation.plan import AblationPlan
from flows.arms.cases import Case
from raphael.base.config.params import load_config
from raphael.base.config.preset import NO_PRESET
from raphael.base.config.systems import System, find_system
from raphael.base.stage import read_json
from raphael.evaluate.catalogue import metric_of
from raphael.evaluate.metrics.spread import Difference, Spread
from raphael.evaluate.report.sections import ATTRIBUTE_LABELS
from raphael.systems import module_of

LOSS = "timestep_loss"
AT = re.compile(rf"{LOSS}_t(\d+)")


def collect(plan: AblationPlan, cases: list[Case]) -> dict[str, Any]:
    """Everything that the page shows, as plain data: {arms: {name: {...}}, metrics: {name: {...}}, timesteps}."""
    by_arm = {arm: [case for case in cases if case.arm == arm] for arm in plan.arms}
    by_arm = {arm: members for arm, members in by_arm.items() if members}
    results = {arm: [read_case(case, find_system(plan.system)) for case in members] for arm, members in by_arm.items()}
    metrics = {}
    for name, about in metric_names([one for ones in results.values() for one in ones]).items():
        spreads = {arm: Spread.of([one["metrics"][name] for one in ones]) for arm, ones in results.items()}
        rows = {}
        for arm, spread in spreads.items():
            difference = Difference.of(spread, spreads[plan.baseline])
            rows[arm] = {"mean": spread.mean, "error": spread.error, "values": list(spread.values)}
            if arm != plan.baseline:
                rows[arm] |= {"difference": difference.value, "difference_error": difference.error}
                rows[arm]["told_apart"] = difference.told
        metrics[name] = {**about, "arms": rows}
    return {
        "about": plan.about,
        "plan": plan.sha256,
        "baseline": plan.baseline,
        "arms": {arm: arm_facts(plan, arm, ones, by_arm[arm]) for arm, ones in results.items()},
        "metrics": metrics,
        "timesteps": [t for t in results[plan.baseline][0]["timesteps"] if f"{LOSS}_t{t:04d}" in metrics],
        "protocol": results[plan.baseline][0]["protocol"],
        "chance": results[plan.baseline][0]["chance"],
        "system": plan.system,
    }


def read_case(case: Case, system: System) -> dict[str, Any]:
    """One case's numbers out of its reports: what metrics gave of which more or less is better, and the losses."""
    evaluated = read_json(case.folder / "reports" / "evaluate.json")
    trained = read_json(case.folder / "reports" / "train.json")
    timings = case.folder / "work" / "timings" / "train.json"  # absent where DVC restored the training
    losses = evaluated.get("timestep_losses") or {"timesteps": [], "losses": []}
    metrics = {name: value for name, value in evaluated.items() if isinstance(value, float) and better(name)}
    metrics |= {f"{LOSS}_t{t:04d}": loss for t, loss in zip(losses["timesteps"], losses["losses"], strict=True)}
    return {
        "metrics": metrics,
        "shares": [name for name in metrics if f"{name}_n" in evaluated],
        "timesteps": losses["timesteps"],
        "chance": evaluated.get("chance", {}),
        "protocol": evaluated.get("protocol", {}).get("identity"),  # None: measured before reports told it
        "parameters": trained["parameters"],
        "images": trained["total"],
        "images_per_s": statistics.median(read_json(timings)["images_per_s"]) if timings.exists() else None,
        "curve": read_json(curves_of(case, system)),
    }


def curves_of(case: Case, system: System) -> Path:
    """Of a system in parts those of the last."""
    model = case.folder / "models" / "raphael"
    return (model / system.parts[-1].name if len(system.parts) > 1 else model) / "curves.json"


def metric_names(ones: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: {label, better, kind}} in the order of the page, which is that of the baseline: what all cases have."""
    names: dict[str, dict[str, Any]] = {}
    for name in ones[0]["metrics"]:
        attribute = ATTRIBUTE_LABELS.get(name.removesuffix("_accuracy"))
        if name == LOSS:
            names[name] = {"label": "held-out loss, mean over timesteps", "better": "lower", "kind": "loss"}
        elif at := AT.fullmatch(name):
            names[name] = {"label": f"held-out loss at t = {int(at[1])}", "better": "lower", "kind": "timestep"}
        else:
            kind = "accuracy" if name in ones[0]["shares"] else "distance"
            names[name] = {"label": attribute or name, "better": better(name), "kind": kind}
    return {name: about for name, about in names.items() if all(name in one["metrics"] for one in ones)}


def better(name: str) -> str | None:
    metric = metric_of(name)
    return metric.better if metric else None


def arm_facts(plan: AblationPlan, arm: str, ones: list[dict[str, Any]], cases: list[Case]) -> dict[str, Any]:
    """What an arm is and costs, and its training curve: mean and standard error over seeds at each point logged."""
    curve = []
    for points in zip(*(one["curve"] for one in ones), strict=True):
        spread = Spread.of([point.get("train/denoise", point.get("train/loss")) for point in points])
        curve.append([points[0]["images"], spread.mean, spread.error])
    return {
        "about": plan.arms[arm].about,
        "changes": [*plan.arms[arm].unet, *plan.arms[arm].params],
        "seeds": [case.seed for case in cases],
        "parameters": ones[0]["parameters"],
        "gflop_per_image": training_gflop(cases[0]),
        "images": ones[0]["images"],
        "images_per_s": next((one["images_per_s"] for one in ones if one["images_per_s"]), None),
        "curve": curve,
    }


def training_gflop(case: Case) -> float | None:
    """Of one image in training, as the system counts it; None of one that does not."""
    config = load_config(case.folder / "params.yaml")
    preset = case.folder / "raphael" / "presets" / f"{config.model.preset}.yaml"  # the arm's own
    if preset.is_file() and config.model.preset != NO_PRESET:
        config = replace(config, model=replace(config.model, preset=str(preset)))
    count = getattr(module_of(config.model.system, "training"), "step_flops", None)
    return count(config) / 1e9 if count else None
