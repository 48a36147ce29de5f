"""Write reports/index.html: one page, complete in itself: what went in, what was learnt, what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raphael.config import Config
from raphael.evaluate.pages import page_environment
from raphael.stage import Stage, StageError, main, read_json
from raphael.strict import to_dict

GENERATED = Path("data/generated")
MODEL = Path("models/raphael")
REPORTS = Path("reports")
TEMPLATES = Path(__file__).parent / "templates"
OUT = "reports/index.html"
MAX_BYTES = 6 << 20
MAX_GRIDS = 9


def run(config: Config, stage: Stage) -> None:
    if not (GENERATED / "images.json").is_file():
        raise StageError(f"{GENERATED}/images.json: no such file; run the stage generate (dvc repro), or dvc pull")
    content = gather(config)
    page = render(content)
    while len(page.encode()) > MAX_BYTES and len(content["grids"]) > 1:
        content["grids"] = content["grids"][1::2] or content["grids"][-1:]  # a page one can send; the last grid stays
        page = render(content)
    finished = stage.workdir(page) / "index.html"
    finished.write_text(page, encoding="utf-8")
    stage.publish(finished, OUT)
    shown = sum(bool(content[name]) for name in SECTIONS)
    stage.report(len(SECTIONS), shown, {"no data": len(SECTIONS) - shown}, bytes=len(page.encode()))


SECTIONS = ("funnel", "charts", "grids", "gallery", "insight", "times", "accuracies", "measures")
SECTIONS += ("failures", "provenance")


def gather(config: Config) -> dict[str, Any]:
    """Everything the page shows, plain enough for the template. What a workspace does not have stays empty."""
    from raphael.evaluate import report_data as data
    from raphael.evaluate import report_findings as findings

    drawn = read_json(GENERATED / "images.json")
    measured = read_json(REPORTS / "evaluate.json") if (REPORTS / "evaluate.json").is_file() else {}
    content: dict[str, Any] = {
        "source": config.source.kind,
        "drawn": len(drawn["images"]),
        "drawing": data.drawing(drawn["settings"]),
        "paths": data.paths(REPORTS / "paths", drawn["model"]),
        "funnel": data.funnel(REPORTS),
        "buckets": data.buckets(REPORTS),
        "charts": data.charts(MODEL / "curves.json"),
        "grids": data.grids(MODEL / "samples", MAX_GRIDS),
        "gallery": data.gallery(GENERATED, drawn["images"]),
        "accuracies": data.accuracies(measured),
        "by_suite": data.by_suite(measured),
        "measures": findings.metric_cards(measured),
        "clip_by_suite": findings.clip_by_suite(measured),
        "failures": findings.failures(measured, GENERATED),
        **findings.beside(REPORTS, drawn["model"]),
        "hero": data.hero(GENERATED, drawn["images"]),
        "insight": [],
        "times": None,
        "mean_over": None,
    }
    content |= data.inside(config, MODEL, GENERATED, drawn) if (MODEL / "meta.json").is_file() else {}
    content["provenance"] = data.provenance(drawn, MODEL, to_dict(config))
    return content


def render(content: dict[str, Any]) -> str:
    """The page. Undefined names are errors, texts are escaped, figures and styles are ours."""
    environment = page_environment()
    files = {name: (TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("report.html").render(**content, **files)


if __name__ == "__main__":
    raise SystemExit(main("report", run, __doc__))
