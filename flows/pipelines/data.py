"""raphael/data: from links to clean captions beside good images."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipelines.stages import FLOW, run_stages
from raphael.base.pipeline import stages_of

STAGES = stages_of("data")


@flow(name=FLOW, flow_run_name="data")
def data(overrides: dict[str, Any] | None = None) -> dict[str, str]:
    """overrides: settings to change in params.yaml first, as {"filter.min_aesthetic": 5.0}."""
    return run_stages(STAGES, overrides)
