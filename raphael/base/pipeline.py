"""dvc.yaml, the table of contents of the pipeline, as whoever lists stages reads it: flows, the report, the data card.

What DVC does not ask stands in a stage's `meta`, which is no part of its identity:
flow      the flow beside `full` that runs it (flows/pipelines)
funnel    true where it keeps and drops rows: a step of the report's funnel and of the data card
system    which modules of the chosen system's package the stage uses, beside its system.py
network   true where a failure may go by itself: a flow tries again
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raphael.base.strict import ConfigError, read_yaml

PROJECT = Path(__file__).resolve().parents[2]
FILE = "dvc.yaml"


@dataclass(frozen=True)
class StageEntry:
    """One stage of dvc.yaml: paths as written there, params as keys of params.yaml, without those of other files."""

    name: str
    command: str
    params: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)


def read_pipeline(root: Path) -> dict[str, StageEntry]:
    """The stages of the dvc.yaml in `root`, in its order. Raises ConfigError where the folder is not a workspace."""
    file = root / FILE
    if not file.is_file():
        raise ConfigError(f"{root}: no {FILE} here; run from the project's root or from a workspace")
    entries = {}
    for name, entry in read_yaml(file)["stages"].items():
        outs = [
            next(iter(out)) if isinstance(out, dict) else out
            for out in entry.get("outs", []) + entry.get("metrics", [])
        ]
        entries[name] = StageEntry(
            name,
            entry["cmd"],
            tuple(key for key in entry.get("params", []) if isinstance(key, str)),
            tuple(entry.get("deps", [])),
            tuple(outs),
            entry.get("meta", {}),
        )
    return entries


def stages_of(flow: str, root: Path = PROJECT) -> list[str]:
    """The stages that a flow runs, in order; "full": all."""
    return [name for name, entry in read_pipeline(root).items() if flow in ("full", entry.meta.get("flow"))]


def funnel_stages(root: Path) -> list[str]:
    """The stages whose counts follow from each other. root: a workspace; one without a dvc.yaml has the project's."""
    pipeline = read_pipeline(root if (root / FILE).is_file() else PROJECT)
    return [name for name, entry in pipeline.items() if entry.meta.get("funnel")]
