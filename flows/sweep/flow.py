"""raphael/sweep: the paper's figures over guidance, alpha, numbers of experts and T_c, for a checkpoint.

Every point is a file under work/sweep, named by a hash of weights, settings and prompts: kill the sweep at any moment,
and the same command resumes where it stopped. Runs compare in MLflow, as children of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from flows.pipelines.stages import FLOW
from flows.sweep import results
from flows.sweep.page import write_page
from flows.sweep.plan import (
    HOW_MANY,
    PLAN,
    Model,
    SweepPlan,
    SweepPoint,
    check_knobs,
    chosen_prompts,
    config_of,
    guidance_points,
    knob_points,
    load_plan,
    points_at,
    workspaces_of,
)
from flows.sweep.points import Measure, Sweeper
from flows.sweep.runs import SweepRuns
from flows.sweep.trained import Trained, series_over, steps_per_s
from raphael.base.config.params import Config
from raphael.base.stage import device_of
from raphael.base.strict import to_dict
from raphael.pretrained.find import find_pipeline

NO_WORKSPACES = (
    "needs models trained for it: name a folder of workspaces in the plan (workspaces), such as work/spaces/ablation "
    "after `python -m flows.run_ablation --plan flows/train_....yaml`, as flows/plans/sweep_trained.yaml does"
)
Figure = dict[str, Any]
ResultOf = Callable[[SweepPoint], dict[str, Any]]


@flow(name=FLOW, flow_run_name="sweep")
def sweep(plan: str = str(PLAN)) -> str:
    """plan: a file like flows/plans/sweep.yaml. Returns the path of the page, reports/sweep.html. Raises StageError."""
    from prefect.logging import get_run_logger

    return str(run(Path.cwd(), load_plan(Path(plan)), get_run_logger().info))


def run(root: Path, plan: SweepPlan, say: Callable[..., None] = lambda *words: None) -> Path:
    """All points, then the page. What is done already is not done again."""
    config, home = config_of(plan, root / "params.yaml"), root / "work" / "sweep"
    model = Model.read(find_pipeline(plan.checkpoint, root))
    check_knobs(plan, model)
    measure = Measure(config, root, home, model, chosen_prompts(plan, model, root / plan.prompts), plan.metrics)
    sweeper = Sweeper(config, home, measure, plan.keep_pictures)
    trained = [one for folder in workspaces_of(plan, root) if (one := Trained.read(folder, model.system))]
    runs = SweepRuns(config, root, home / "runs.json", plan, model)

    def result_of(point: SweepPoint) -> dict[str, Any]:
        before, result = sweeper.generated, sweeper(point)
        runs.log(point, sweeper.result_file(point).stem, result, sweeper.grid_file(point))
        shown = {name: result["metrics"][name] for name in (result["distance"], result["score"])}
        say("%s: %s, %d images generated", point.name, shown, sweeper.generated - before)
        return result

    try:
        figures = {
            "guidance": titled(
                figure(guidance_points(plan, model, config), result_of, "the plan lists no guidance_scale"),
                "Guidance",
                "guidance weight",
            ),
            **knob_figures(plan, model, config, result_of),
            **trained_figures(plan, (model, trained), config, result_of, home),
        }
        page = write_page(root, {**facts_of(plan, model, config, measure), "figures": figures})
    except BaseException:
        runs.fail()
        raise
    runs.finish(page)
    return page


def facts_of(plan: SweepPlan, model: Model, config: Config, measure: Measure) -> dict[str, Any]:
    settings = to_dict(config.generate)  # but for the seeds, told apart
    return {
        "about": plan.about,
        "plan": plan.sha256,
        "model": model.checkpoint[:16],
        "system": model.system.name,
        "protocol": measure.protocol.identity,
        "knobs": {model.system.studied.knobs[name].axis: value for name, value in model.knobs.items()},
        "seeds": list(plan.seeds),
        "settings": {name: value for name, value in settings.items() if name not in (*HOW_MANY, "seed")},
    }


def figure(points: dict[float, list[SweepPoint]], result_of: ResultOf, why_not: str) -> Figure:
    if not points:
        return results.absent(why_not)
    return results.gather({"": {x: [result_of(point) for point in ones] for x, ones in points.items()}})


def titled(figure: Figure, title: str, axis: str, kind: str = "") -> Figure:
    """kind: changed, while sampling, or trained anew."""
    return {"title": title, "axis": axis, **({"kind": kind} if kind else {}), **figure}


def knob_figures(plan: SweepPlan, model: Model, config: Config, result_of: ResultOf) -> dict[str, Figure]:
    """Of every number of the model's network that may be changed while sampling."""
    figures: dict[str, Figure] = {}
    for name, knob in model.system.studied.knobs.items():
        found = (
            results.absent(why)
            if (why := knob.absent(model.unet))
            else figure(knob_points(plan, model, config, name), result_of, f"the plan lists no {name}")
        )
        figures[knob.figure] = titled(found, knob.title, knob.axis, "changed")
    return figures


def trained_figures(
    plan: SweepPlan, models: tuple[Model, list[Trained]], config: Config, result_of: ResultOf, home: Path
) -> dict[str, Figure]:
    """Distance over each number that models were trained with; steps a second over some. models: the sweep's, those."""
    from raphael.generate.pipeline import RaphaelPipeline

    figures: dict[str, Figure] = {}
    device, studied, trained = str(device_of(config)), models[0].system.studied, models[1]
    for kind, (title, axis) in studied.numbers.items():
        series = series_over(trained, kind, studied)
        if not series:
            reason = (
                f"{len(trained)} workspaces under {plan.workspaces}, but no two differ in {axis} (and the seed) alone"
                if trained
                else NO_WORKSPACES
            )
            figures[kind] = titled(results.absent(reason), title, axis, "trained")
            continue
        measured = {
            label: {x: [result_of(point_of(plan, one, config)) for one in ones] for x, ones in numbers.items()}
            for label, numbers in series.items()
        }
        figures[kind] = titled(results.gather(measured), title, axis, "trained")
        if kind in studied.timed:
            load = RaphaelPipeline.from_pretrained
            figures[kind]["steps_per_s"] = {
                label: [
                    [x, steps_per_s(ones[0].model, plan.speed_steps, home, load, device)] for x, ones in line.items()
                ]
                for label, line in series.items()
            }
    return figures


def point_of(plan: SweepPlan, one: Trained, config: Config) -> SweepPoint:
    """A trained model at the settings' guidance; its seeds of training are the spread, so one of the noise will do."""
    return points_at(plan, one.model, config, config.generate.guidance_scale)[0]
