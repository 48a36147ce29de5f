"""What the cases of an ablation came to: means over seeds with standard errors, and which differences can be told.

A difference counts as told apart when it is larger than two standard errors of the difference, se^2 = se_a^2 + se_b^2
(the seeds of two arms are no pairs: equal seeds give arms of different shape different weights). With this many
comparisons one in twenty passes by luck alone: read the table as a whole.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from flows.ablation_plan import Case, Plan
from raphael.stage import read_json

ACCURACIES = {  # of reports/evaluate.json: held-out prompts, judged by the scene reader
    "background_colour_accuracy": "background colour",
    "shape_colour_accuracy": "object colour",
    "shape_accuracy": "object shape",
    "count_accuracy": "count",
    "style_accuracy": "style",
    "relation_accuracy": "relation",
}


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds of an arm."""

    mean: float
    error: float  # standard error of the mean; NaN for a single seed
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error, tuple(values))


@dataclass(frozen=True)
class Difference:
    """An arm's mean minus the baseline's."""

    value: float
    error: float

    @classmethod
    def of(cls, arm: Spread, baseline: Spread) -> Difference:
        return cls(arm.mean - baseline.mean, math.hypot(arm.error, baseline.error))

    @property
    def told(self) -> bool:
        return abs(self.value) > 2 * self.error  # False for NaN


def collect(plan: Plan, cases: list[Case]) -> dict[str, Any]:
    """Everything that the page shows, as plain data: {arms: {name: {...}}, metrics: {name: {...}}, timesteps}."""
    by_arm = {arm: [case for case in cases if case.arm == arm] for arm in plan.arms}
    by_arm = {arm: members for arm, members in by_arm.items() if members}
    results = {arm: [read_case(case) for case in members] for arm, members in by_arm.items()}
    metrics = {}
    for name, about in metric_names(results[plan.baseline]).items():
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
        "timesteps": results[plan.baseline][0]["timesteps"],
        "chance": results[plan.baseline][0]["chance"],
    }


def read_case(case: Case) -> dict[str, Any]:
    """One case's numbers out of its reports."""
    evaluated = read_json(case.folder / "reports" / "evaluate.json")
    losses = read_json(case.folder / "reports" / "timestep_loss.json")
    trained = read_json(case.folder / "reports" / "train.json")
    timings = case.folder / "work" / "timings" / "train.json"  # absent where DVC restored the training
    metrics = {name: evaluated[name] for name in ACCURACIES if evaluated.get(name) is not None}
    metrics |= {name: value for name, value in evaluated.items() if is_distance(name, value)}
    metrics |= {f"loss_t{t:04d}": loss for t, loss in zip(losses["timesteps"], losses["losses"], strict=True)}
    metrics["loss"] = statistics.fmean(losses["losses"])
    return {
        "metrics": metrics,
        "timesteps": losses["timesteps"],
        "chance": evaluated["chance"],
        "parameters": trained["parameters"],
        "images": trained["total"],
        "images_per_s": statistics.median(read_json(timings)["images_per_s"]) if timings.exists() else None,
        "curve": read_json(case.folder / "models" / "raphael" / "curves.json"),
    }


def is_distance(name: str, value: Any) -> bool:
    """Frechet distances and CLIP scores under whatever name they have (raphael/evaluate/spaces.py)."""
    return isinstance(value, float) and name.startswith(("fd_", "fid_", "clip_score")) and "of_other" not in name


def metric_names(ones: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: {label, better, kind}} in the order of the page."""
    names: dict[str, dict[str, Any]] = {}
    for name in ones[0]["metrics"]:
        if name in ACCURACIES:
            names[name] = {"label": ACCURACIES[name], "better": "higher", "kind": "accuracy"}
        elif name == "loss":
            names[name] = {"label": "held-out loss, mean over timesteps", "better": "lower", "kind": "loss"}
        elif name.startswith("loss_t"):
            names[name] = {"label": f"held-out loss at t = {int(name[6:])}", "better": "lower", "kind": "timestep"}
        else:
            better = "higher" if name.startswith("clip_score") else "lower"
            names[name] = {"label": name, "better": better, "kind": "distance"}
    return names


def arm_facts(plan: Plan, arm: str, ones: list[dict[str, Any]], cases: list[Case]) -> dict[str, Any]:
    """What an arm is and costs, and its training curve: mean and standard error over seeds at each point logged."""
    curve = []
    for points in zip(*(one["curve"] for one in ones), strict=True):
        spread = Spread.of([point["train/denoise"] for point in points])
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


def training_gflop(case: Case) -> float:
    """Of one picture in training: three forwards of the U-Net at full cover, edge heads not counted."""
    from raphael.config import load_config
    from raphael.generate.anatomy import unet_flops
    from raphael.preset import load_preset

    config = load_config(case.folder / "params.yaml")
    preset = load_preset(str(case.folder / "raphael" / "presets" / f"{config.model.preset}.yaml"))
    return 3 * unet_flops(preset, (config.picture.height_px, config.picture.width_px)) / 1e9
