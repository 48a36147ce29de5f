"""What the arms came to: each case's numbers with their intervals, and which differences can be told.

Over prompts of one seed a difference has the square-and-add interval (Newcombe 1998, method 10) of the two Wilson
intervals; that says nothing of another training, so it is called a difference of one seed. Told apart are two arms of
three seeds each or more, whose means differ by more than two standard errors of the difference. Where the interval of
every arm holds chance, nothing is told apart: there is no ranking of what no arm does.
"""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from flows.arms.cases import Case
from flows.systems.plan import Budget, SystemsPlan
from raphael.base.config.params import load_config
from raphael.base.stage import file_sha256, read_json
from raphael.base.strict import to_dict
from raphael.evaluate.instruments.probe import LABELS
from raphael.evaluate.metrics.spread import Difference, Spread
from raphael.evaluate.report.instruments import PART_LABELS
from raphael.evaluate.report.sections import ATTRIBUTE_LABELS

PARTS = ("both_colours", "both_pairs", "right_side")  # of a relation of two objects
TOLD, ONE_SEED, NOT_TOLD = "told apart", "differs in one seed", "not told apart"
ENOUGH_SEEDS = 3
TIMED = 5  # images, one at a time
Numbers = dict[str, dict[str, Any]]


def read_case(plan: SystemsPlan, case: Case, budget: Budget, before: dict[str, Any]) -> dict[str, Any]:
    """A case's file. before: the one of an earlier run, whose seconds stand where the model is the same."""
    evaluated = read_json(case.folder / "reports/evaluate.json")
    trained = read_json(case.folder / "reports/train.json")
    arm, model = plan.arms[case.arm], file_sha256(case.folder / "reports/evaluate.json")
    same = before.get("measured") == model and before.get("seconds_an_image") is not None
    return {
        "plan": plan.sha256,
        "arm": case.arm,
        "seed": case.seed,
        "system": arm.system,
        "protocol": evaluated.get("protocol", {}).get("identity"),
        "prompts": evaluated.get("prompts"),
        "measured": model,
        "flop_asked": plan.flop,
        "flop": budget.flop,
        "flop_per_image": budget.flop_per_image,
        "images": trained["total"],
        "parts": budget.parts,
        "parameters": trained["parameters"],
        "seconds_an_image": before["seconds_an_image"] if same else seconds_an_image(case.folder),
        "numbers": numbers_of(evaluated),
    }


def numbers_of(evaluated: dict[str, Any]) -> Numbers:
    """name -> {label, group, better, value, low, high, n, chance} of evaluate.json; the last four may be None."""
    found: Numbers = {}
    for fact, row in ((evaluated.get("probe") or {}).get("facts") or {}).items():
        ends = {end: row[f"win_share_{end}"] for end in ("low", "high", "n")}
        found[f"probe_{fact}"] = _number(LABELS[fact], "probe", row["win_share"], **ends, chance=0.5)
    for name, label in {**ATTRIBUTE_LABELS, "picture": "everything that is asked"}.items():
        key = f"{name}_accuracy"
        if evaluated.get(key) is not None and f"{key}_n" in evaluated:
            ends = {end: evaluated[f"{key}_{end}"] for end in ("low", "high", "n")}
            found[key] = _number(label, "reader", evaluated[key], **ends, chance=evaluated["chance"].get(key))
    parts = evaluated.get("relation_parts") or {}
    for name in PARTS:
        if parts.get(name) is not None:
            ends = {end: parts[f"{name}_{end}"] for end in ("low", "high", "n")}
            found[name] = _number(PART_LABELS[name], "reader", parts[name], **ends)
    for name, value in evaluated.items():
        if name.startswith("fd_") and isinstance(value, float):
            found[name] = _number(f"Frechet distance ({name})", "distance", value, better="lower")
    return found


def _number(label: str, group: str, value: float, better: str = "higher", **more: Any) -> dict[str, Any]:
    ends = {name: more.get(name) for name in ("low", "high", "n", "chance")}
    return {"label": label, "group": group, "better": better, "value": value, **ends}


def seconds_an_image(folder: Path) -> float:
    """The median of `TIMED` images, one at a time, by one thread on the CPU; what else the machine does included."""
    import time

    from raphael.base.cores.threads import one_thread
    from raphael.diffusion.sampling import sampling_of
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(folder / "models/raphael")
    how = sampling_of(load_config(folder / "params.yaml").generate)
    prompts = [entry["prompt"] for entry in read_json(folder / "data/generated/images.json")["images"]]
    taken = []
    with one_thread():
        for turn in range(TIMED + 1):  # the first warms up
            started_s = time.perf_counter()
            pipeline(prompts[turn % len(prompts)], sampling=how, seed=turn)
            taken.append(time.perf_counter() - started_s)
    return round(statistics.median(taken[1:]), 4)


def collect(plan: SystemsPlan, ones: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the page shows, as plain data. ones: the cases' files."""
    by_arm = {arm: [one for one in ones if one["arm"] == arm] for arm in plan.arms}
    by_arm = {arm: members for arm, members in by_arm.items() if members}
    names = [
        name
        for name in next(iter(by_arm.values()))[0]["numbers"]
        if all(name in one["numbers"] for members in by_arm.values() for one in members)
    ]
    return {
        "about": plan.about,
        "plan": plan.sha256,
        "flop": plan.flop,
        "protocol": plan.protocol,
        "arms": {arm: arm_facts(plan, arm, members) for arm, members in by_arm.items()},
        "metrics": {name: metric_of(name, by_arm) for name in names},
    }


def arm_facts(plan: SystemsPlan, arm: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    told = plan.arms[arm]
    same = {name: members[0][name] for name in ("system", "flop", "flop_per_image", "images", "parts", "parameters")}
    own = {"about": told.about, "recipe": to_dict(told.recipe), "found": told.found}
    changes = [*([f"model.preset={told.preset}"] if told.preset else []), *told.unet, *told.params]
    seconds = statistics.median(one["seconds_an_image"] for one in members)
    return {**own, "changes": changes, **same, "seeds": [one["seed"] for one in members], "seconds_an_image": seconds}


def metric_of(name: str, by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One number of all arms: means with intervals, and what is said of each pair."""
    first = next(iter(by_arm.values()))[0]["numbers"][name]
    rows = {arm: summary([one["numbers"][name] for one in members]) for arm, members in by_arm.items()}
    at_chance = all(
        row["chance"] is not None and row["low"] is not None and row["low"] <= row["chance"] <= row["high"]
        for row in rows.values()
    )
    pairs = [
        {"a": a, "b": b, **difference(rows[a], rows[b], at_chance)} for a, b in itertools.combinations(rows, 2)
    ]  # fmt: skip
    return {
        **{key: first[key] for key in ("label", "group", "better")},
        "at_chance": at_chance,
        "arms": rows,
        "pairs": pairs,
    }


def summary(ones: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one seed the interval over prompts; of several the mean with two standard errors over seeds."""
    values = [one["value"] for one in ones]
    spread, chances = Spread.of(values), [one["chance"] for one in ones if one["chance"] is not None]
    low, high = ones[0]["low"], ones[0]["high"]
    if len(values) > 1:
        low, high = spread.mean - 2 * spread.error, spread.mean + 2 * spread.error
    chance = statistics.fmean(chances) if chances else None
    return {"value": spread.mean, "low": low, "high": high, "n": ones[0]["n"], "chance": chance, "values": values}


def difference(a: dict[str, Any], b: dict[str, Any], at_chance: bool) -> dict[str, Any]:
    """a minus b, its interval and what may be said of it."""
    value, low, high = a["value"] - b["value"], None, None
    enough = min(len(a["values"]), len(b["values"])) >= ENOUGH_SEEDS
    if enough:
        found = Difference.of(Spread.of(a["values"]), Spread.of(b["values"]))
        low, high = found.value - 2 * found.error, found.value + 2 * found.error
    elif a["low"] is not None and b["low"] is not None:
        low = value - math.hypot(a["value"] - a["low"], b["high"] - b["value"])
        high = value + math.hypot(a["high"] - a["value"], b["value"] - b["low"])
    apart = low is not None and high is not None and (low > 0 or high < 0) and not at_chance
    return {
        "difference": value,
        "low": low,
        "high": high,
        "said": (TOLD if enough else ONE_SEED) if apart else NOT_TOLD,
    }
