"""reports/systems.html and reports/systems.json: the systems beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.arms.cases import Case
from flows.systems.plan import RECIPE, SystemsPlan
from flows.systems.results import NOT_TOLD, collect
from raphael.base.stage import read_json, write_json
from raphael.evaluate.report.page import TEMPLATES
from raphael.evaluate.report.pages import number, page_environment

GROUPS = {
    "probe": "Does it know what the caption says? The probe: how often the true caption has the lower denoising loss",
    "reader": "Does it draw what it is told? What the reader of scenes sees in held-out prompts' images",
    "distance": "How far are its images from real ones?",
}
Shown = dict[str, Any]  # prompt, images: arm -> {src, read, wrong}


def write_page(root: Path, plan: SystemsPlan, cases: list[Case], ones: list[dict[str, Any]]) -> Path:
    """Both files, from the cases that are done. ones: their files, in the order of `cases`."""
    results = collect(plan, ones)
    write_json(root / "reports" / "systems.json", results)
    page = root / "reports" / "systems.html"
    page.write_text(render(results, side_by_side(plan, cases)), encoding="utf-8")
    return page


def render(results: dict[str, Any], shown: list[Shown]) -> str:
    """The page: complete in itself, texts escaped."""
    environment = page_environment()
    environment.filters |= {"number": number}
    metrics = results["metrics"]
    return environment.get_template("systems.html").render(
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        results=results,
        groups={
            title: {name: metric for name, metric in metrics.items() if metric["group"] == group}
            for group, title in GROUPS.items()
        },
        recipe=RECIPE,
        said=[
            {"label": metric["label"], "better": metric["better"], "group": metric["group"], **pair}
            for metric in metrics.values()
            for pair in metric["pairs"]
            if pair["said"] != NOT_TOLD
        ],
        at_chance=[metric["label"] for metric in metrics.values() if metric["at_chance"]],
        comparisons=sum(len(metric["pairs"]) for metric in metrics.values()),
        shown=shown,
    )


def side_by_side(plan: SystemsPlan, cases: list[Case]) -> list[Shown]:
    """The same prompts, evenly spread over the list, as each arm's first case drew them."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.arm, case)
    listed = {arm: read_json(case.folder / "data/generated/images.json")["images"] for arm, case in first.items()}
    entries = next(iter(listed.values()))
    count = min(plan.num_shown, len(entries))
    found = []
    for row in (place * len(entries) // count for place in range(count)):
        prompt = entries[row]["prompt"]
        images = {
            arm: look(first[arm].folder / "data/generated", its[row])
            for arm, its in listed.items()
            if row < len(its) and its[row]["prompt"] == prompt
        }
        found.append({"prompt": prompt, "images": images})
    return found


def look(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """An image as the page holds it, what is read in it, and what of the prompt is wrong."""
    import base64

    from raphael.base.images.fit import read_image
    from raphael.evaluate.scenes.attributes import wrong_attributes
    from raphael.evaluate.scenes.reader import read_scene

    reading = read_scene(read_image(folder / entry["file"]))
    objects = ", ".join(f"{item.colour} {item.shape}" for item in reading.objects) or "no object"
    words = [objects, f"on {reading.background_colour}", reading.style, f'"{reading.text}"' if reading.text else None]
    data = base64.b64encode((folder / entry["file"]).read_bytes()).decode()
    return {
        "src": f"data:image/png;base64,{data}",
        "read": ", ".join(word for word in words if word),
        "wrong": wrong_attributes(entry, reading) if entry.get("truth") else [],
    }
