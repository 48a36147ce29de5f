"""reports/ablation.html and reports/ablation.json: the arms of an ablation beside each other, with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.ablation.plan import AblationPlan
from flows.ablation.results import LOSS, collect
from flows.arms.cases import Case
from flows.arms.charts import CurvePoint, bands, dots
from raphael.base.stage import StageError, write_json
from raphael.evaluate.report.figures import short
from raphael.evaluate.report.page import TEMPLATES
from raphael.evaluate.report.pages import number, page_environment


def write_page(root: Path, plan: AblationPlan, cases: list[Case]) -> Path:
    """Both files, from the cases that are done. Raises StageError where the baseline has none."""
    if not any(case.arm == plan.baseline for case in cases):
        raise StageError(f"ablation: no case of {plan.baseline} is done, and it is what others are compared with")
    results = collect(plan, cases)
    write_json(root / "reports" / "ablation.json", results)
    page = root / "reports" / "ablation.html"
    page.write_text(render(results), encoding="utf-8")
    return page


def render(results: dict[str, Any]) -> str:
    """The page: complete in itself, texts escaped."""
    environment = page_environment()
    environment.filters |= {"number": number, "short": short}
    kinds = {kind: by_kind(results, kind) for kind in ("accuracy", "loss", "distance", "timestep")}
    curves = {arm: [tuple(point) for point in facts["curve"]] for arm, facts in results["arms"].items()}
    return environment.get_template("ablation.html").render(
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        results=results,
        kinds=kinds,
        told=[
            {"arm": arm, **row, **metric}
            for metric in results["metrics"].values()
            for arm, row in metric["arms"].items()
            if row.get("told_apart")
        ],
        comparisons=sum(len(metric["arms"]) - 1 for metric in results["metrics"].values()),
        accuracy_chart=dots(kinds["accuracy"], list(results["arms"])) if kinds["accuracy"] else "",
        training_chart=bands(curves, "images"),
        timestep_chart=bands(differences_by_timestep(results), "timestep") if results["timesteps"] else "",
    )


def by_kind(results: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: metric for name, metric in results["metrics"].items() if metric["kind"] == kind}


def differences_by_timestep(results: dict[str, Any]) -> dict[str, list[CurvePoint]]:
    """Each arm's held-out loss minus the baseline's, in per cent of the baseline's, over the timesteps.

    The baseline keeps a line at zero with its own spread: losses of one model span a decade over timesteps, and what
    arms differ by is a small part of them.
    """
    series: dict[str, list[CurvePoint]] = {}
    for timestep in results["timesteps"]:
        rows = results["metrics"][f"{LOSS}_t{timestep:04d}"]["arms"]
        base = rows[results["baseline"]]["mean"]
        for arm, row in rows.items():
            shift = 100 * (row["mean"] - base) / base
            series.setdefault(arm, []).append((timestep, shift, 100 * row["error"] / base))
    return series
