"""Write reports/index.html: one page, complete in itself: what went in, what was learnt, what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael.base.config.params import Config
from raphael.base.config.systems import find_system, system_of
from raphael.base.images.growth import fixed_prompts
from raphael.base.stage import Stage, StageError, read_json
from raphael.base.strict import ConfigError, load, read_yaml, to_dict
from raphael.evaluate.catalogue import nearest
from raphael.evaluate.protocols.protocol import SYSTEMS, meta_of
from raphael.evaluate.report import inside
from raphael.evaluate.report.pages import page_environment

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


LOOKING_INSIDE = {"inside": inside.inside}  # name -> (config, model, generated, listing) -> content


@dataclass(frozen=True)
class Sections:
    """A system's report.yaml: names of LOOKING_INSIDE."""

    sections: tuple[str, ...]


SECTIONS = ("funnel", "charts", "grids", "gallery", "insight", "times", "accuracies", "measures")
SECTIONS += ("failures", "why", "provenance", "opening", "strip", "probe_curves")


def gather(config: Config) -> dict[str, Any]:
    """Everything the page shows, plain enough for the template. What a workspace does not have stays empty."""
    from raphael.evaluate.report import findings, growth, instruments
    from raphael.evaluate.report import sections as data

    listing = read_json(GENERATED / "images.json")
    measured = read_json(REPORTS / "evaluate.json") if (REPORTS / "evaluate.json").is_file() else {}
    train = config.train
    prompts = fixed_prompts(train.sample_prompts, train.num_sample_prompts, listing["images"])
    system = system_of(meta_of(MODEL))
    losses = [loss for part in find_system(config.model.system).parts for loss in part.losses]
    content: dict[str, Any] = {
        "title": system.upper(),
        "sections": sections_of(system),
        "source": config.source.kind,
        "generated": len(listing["images"]),
        "sampling": data.sampling(listing["settings"]),
        "paths": data.paths(REPORTS / "paths", listing["model"]),
        "funnel": data.funnel(REPORTS),
        "buckets": data.buckets(REPORTS),
        "charts": data.charts(MODEL / "curves.json", losses),
        "grids": data.grids(MODEL / "samples", MAX_GRIDS),
        "strip": growth.strip(MODEL / "samples", prompts),
        "probe_curves": growth.probe_curves(MODEL / "heldout.json"),
        "gallery": data.gallery(GENERATED, listing["images"]),
        "accuracies": data.accuracies(measured),
        "by_suite": data.by_suite(measured),
        "by_label": measured.get("class_accuracy_by_label", {}),
        "measures": findings.metric_cards(measured),
        "clip_by_suite": findings.clip_by_suite(measured),
        "failures": findings.failures(measured, GENERATED),
        "opening": findings.opening(measured, GENERATED, listing["images"]),
        "why": instruments.why(measured),
        **findings.beside(REPORTS, listing["model"]),
        "hero": data.hero(GENERATED, listing["images"]),
        **inside.NOTHING,
    }
    for name in content["sections"] if (MODEL / "meta.json").is_file() else ():
        content |= LOOKING_INSIDE[name](config, MODEL, GENERATED, listing)
    content["provenance"] = data.provenance(listing, MODEL, to_dict(config))
    return content


def sections_of(system: str, systems: Path = SYSTEMS) -> tuple[str, ...]:
    """The sections that look into a system's model: systems/<system>/report.yaml. Raises ConfigError."""
    file = systems / system / "report.yaml"
    if not file.is_file():
        return ()
    said = load(Sections, read_yaml(file), f"{system}/report.yaml")
    for name in said.sections:
        if name not in LOOKING_INSIDE:
            raise ConfigError(f"{system}/report.yaml: sections: got {name!r}, {nearest(name, LOOKING_INSIDE)}")
    return said.sections


def render(content: dict[str, Any]) -> str:
    """The page. Undefined names are errors, texts are escaped, figures and styles are ours."""
    environment = page_environment()
    files = {name: (TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("report.html").render(**content, **files)
