"""raphael/evaluate: images of the held-out prompts, their scores, and the report."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipelines.stages import FLOW, run_stages
from raphael.base.pipeline import stages_of

STAGES = stages_of("evaluate")


@flow(name=FLOW, flow_run_name="evaluate")
def evaluate(overrides: dict[str, Any] | None = None) -> dict[str, str]:
    """overrides: settings to change in params.yaml first, as {"generate.seed": 1}."""
    return run_stages(STAGES, overrides)
