"""raphael/sweep: the paper's figures over guidance, alpha, numbers of experts and T_c, for a checkpoint.

Every point is a file under work/sweep, named by a hash of weights, settings and prompts: kill the sweep at any moment,
and the same command goes on where it stopped. Runs compare in MLflow, as children of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from flows import sweep_results as results
from flows.stages import FLOW
from flows.sweep_page import write_page
from flows.sweep_plan import (
    MEASURED_WITH,
    PLAN,
    Model,
    Plan,
    Point,
    alpha_points,
    chosen_prompts,
    config_of,
    guidance_points,
    load_plan,
    points_at,
    workspaces_of,
)
from flows.sweep_points import Measure, Sweeper
from flows.sweep_runs import SweepRuns
from flows.sweep_trained import NUMBERS, Trained, series_over, steps_per_s
from raphael.config import Config
from raphael.strict import to_dict

NO_WORKSPACES = (
    "needs models trained for it: name a folder of workspaces in the plan (workspaces), such as work/spaces/ablation "
    "after `python -m flows.run_ablation --plan flows/train_....yaml`, as flows/sweep_trained.yaml does"
)
Figure = dict[str, Any]
Draw = Callable[[Point], dict[str, Any]]


@flow(name=FLOW, flow_run_name="sweep")
def sweep(plan: str = str(PLAN)) -> str:
    """plan: a file like flows/sweep.yaml. Returns the path of the page, reports/sweep.html. Raises StageError."""
    from prefect.logging import get_run_logger

    return str(run(Path.cwd(), load_plan(Path(plan)), get_run_logger().info))


def run(root: Path, plan: Plan, say: Callable[..., None] = lambda *words: None) -> Path:
    """All points, then the page. What is done already is not done again."""
    config, home = config_of(plan, root / "params.yaml"), root / "work" / "sweep"
    model = Model.read(root / plan.checkpoint)
    measure = Measure(config, root, home, model, chosen_prompts(plan, root / plan.prompts))
    sweeper = Sweeper(config, home, measure, plan.keep_pictures)
    trained = [Trained.read(folder) for folder in workspaces_of(plan, root)]
    runs = SweepRuns(config, root, home / "runs.json", plan, model)

    def draw(point: Point) -> dict[str, Any]:
        before, result = sweeper.drawn, sweeper(point)
        runs.log(point, sweeper.result_file(point).stem, result, sweeper.grid_file(point))
        shown = {name: result["metrics"][name] for name in (result["distance"], result["score"])}
        say("%s: %s, %d pictures drawn", point.name, shown, sweeper.drawn - before)
        return result

    try:
        figures = {
            "guidance": figure(guidance_points(plan, model, config), draw, "the plan lists no guidance_scale"),
            "alpha": alpha_figure(plan, model, config, draw),
            **trained_figures(plan, trained, config, draw, home),
        }
        page = write_page(root, {**facts_of(plan, model, config), "figures": figures})
    except BaseException:
        runs.fail()
        raise
    runs.finish(page)
    return page


def facts_of(plan: Plan, model: Model, config: Config) -> dict[str, Any]:
    settings = to_dict(config.generate)
    return {
        "about": plan.about,
        "plan": plan.sha256,
        "model": model.checkpoint[:16],
        "mask_threshold": model.mask_threshold,
        "seeds": list(plan.seeds),
        "settings": {name: settings[name] for name in (*MEASURED_WITH, "guidance_scale", "precision")},
    }


def figure(points: dict[float, list[Point]], draw: Draw, why_not: str) -> Figure:
    if not points:
        return results.absent(why_not)
    return results.gather({"": {x: [draw(point) for point in ones] for x, ones in points.items()}})


def alpha_figure(plan: Plan, model: Model, config: Config, draw: Draw) -> Figure:
    if model.unet["space_layer"] != "moe":
        return results.absent("the model has no Space-MoE, so nothing reads alpha")
    return figure(alpha_points(plan, model, config), draw, "the plan lists no mask_threshold")


def trained_figures(plan: Plan, trained: list[Trained], config: Config, draw: Draw, home: Path) -> dict[str, Figure]:
    """Distance over each number that models were trained with; steps a second over the numbers of experts."""
    from raphael.generate.pipeline import RaphaelPipeline

    figures: dict[str, Figure] = {}
    for kind, name in NUMBERS.items():
        series = series_over(trained, kind)
        if not series:
            figures[kind] = results.absent(
                f"{len(trained)} workspaces under {plan.workspaces}, but no two differ in {name} (and the seed) alone"
                if trained
                else NO_WORKSPACES
            )
            continue
        measured = {
            label: {x: [draw(point_of(plan, one, config)) for one in ones] for x, ones in numbers.items()}
            for label, numbers in series.items()
        }
        figures[kind] = results.gather(measured)
        if kind.endswith("_experts"):
            figures[kind]["steps_per_s"] = {
                label: [
                    [x, steps_per_s(ones[0].model, plan.speed_steps, home, RaphaelPipeline.from_pretrained)]
                    for x, ones in numbers.items()
                ]
                for label, numbers in series.items()
            }
    return figures


def point_of(plan: Plan, one: Trained, config: Config) -> Point:
    """A trained model at the settings' guidance; its seeds of training are the spread, so one of the noise will do."""
    return points_at(plan, one.model, config, config.generate.guidance_scale)[0]
