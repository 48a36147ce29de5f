"""The card of a published model: README.md in its folder, every number from a file of its workspaces."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from raphael.base.stage import read_json
from raphael.evaluate.scenes.attributes import HEADLINE_SUITES, PICTURE

TEMPLATES = Path(__file__).with_name("templates")
TEMPLATE = "model_card.md.j2"
ROWS = {  # attribute of evaluate.json -> what it is called here
    "background_colour": "background colour",
    "shape_colour": "colour of the object",
    "shape": "shape of the object",
    "count": "number of objects",
    "style": "style",
    "relation": "relation of two objects",
    "text": "printed word",
}
SHOWN_FAILURES = 5


def history(workspaces: list[Path], machine: str) -> list[dict[str, Any]]:
    """Of each training, the first first: what it saw, for how long, by which settings. Raises StageError, ConfigError.

    machine: what they ran on; "": this one.
    """
    from raphael.base.config.params import load_config

    found = []
    for root in workspaces:
        config, train = load_config(root / "params.yaml"), read_json(root / "reports/train.json")
        source, encode = read_json(root / "reports/source.json"), read_json(root / "reports/encode.json")
        timings, asked = read_json(root / "work/timings/train.json"), config.train.num_workers
        found.append(
            {
                "images": train["total"],
                "hours": timings["seconds"] / 3600,
                "workers": max(1, timings.get("workers", 0 if asked == "auto" else asked)),
                "parameters": train["parameters"],
                "preset": config.model.preset,
                "data": f"{encode['kept']:,} images kept of {source['total']:,} rows, kind {source['kind']}",
                "seed": f"{config.train.seed}, data {config.seed}",
                "machine": machine or this_machine(config.train.use_gpu),
            }
        )
    return found


def this_machine(use_gpu: bool) -> str:
    """Its processor and cores, and with use_gpu its GPU."""
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        named = None
    text = f"{named.group(1).strip() if named else 'unknown processor'}, {os.cpu_count()} cores"
    if use_gpu:
        import torch

        text += f", {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a GPU'}"
    return text


def write_card(
    folder: Path,
    evaluation: dict[str, Any],
    meta: dict[str, Any],
    check: dict[str, Any],
    trainings: list[dict[str, Any]],
) -> None:
    """README.md in `folder`. evaluation: evaluate.json; check: check.json; trainings: of `history`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    failures, stored = evaluation["failures"], check["stored_and_trained"]
    page = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    text = page.get_template(TEMPLATE).render(
        size=meta["picture"]["sizes_px"][0],
        sampling=meta["sampling"],
        meta=meta,
        trainings=trainings,
        images=sum(one["images"] for one in trainings),
        hours=sum(one["hours"] for one in trainings),
        rows=number_rows(evaluation),
        weakest=_weakest(evaluation),
        judged=f"{evaluation[f'{PICTURE}_n']:,}",
        wrong=", ".join(f"{ROWS.get(name, name)} {count}" for name, count in failures["wrong"].items()),
        most_wrong=[
            {"prompt": item["prompt"], "wrong": [ROWS.get(name, name) for name in item["wrong"]]}
            for item in failures["most_wrong"][:SHOWN_FAILURES]
        ],
        checked=len(check["prompts"]),
        stored=stored,
        agree=percent(stored["same_verdicts"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def number_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each number that was measured: those at the top of evaluate.json, then whole images by suite."""
    rows = []
    for attribute, called in ROWS.items():
        name, suite = f"{attribute}_accuracy", HEADLINE_SUITES[attribute] or "all"
        if evaluation[name] is not None:
            rows.append(_row(called, evaluation, name, suite, percent(evaluation["chance"][name])))
    called = "everything that the prompt states"
    rows.append(_row(called, evaluation, PICTURE, "all", percent(evaluation["chance"][PICTURE])))
    rows += [_row(called, numbers, PICTURE, suite, "") for suite, numbers in evaluation["by_suite"].items()]
    return rows


def _row(called: str, numbers: dict[str, Any], name: str, suite: str, chance: str) -> dict[str, Any]:
    low, high = percent(numbers[f"{name}_low"]), percent(numbers[f"{name}_high"])
    shown = {"right": percent(numbers[name]), "low": low, "high": high, "n": numbers[f"{name}_n"]}
    return {"called": called, "suite": suite, "chance": chance, **shown}


def _weakest(evaluation: dict[str, Any]) -> str:
    measured = {called: evaluation[f"{name}_accuracy"] for name, called in ROWS.items()}
    measured = {called: got for called, got in measured.items() if got is not None}
    return ", ".join(f"{called} {percent(measured[called])}" for called in sorted(measured, key=measured.__getitem__))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
