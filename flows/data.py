"""raphael/data: from links to clean captions beside good pictures."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stages import FLOW, run_stages

STAGES = ["source", "select", "download", "score", "filter", "captions"]


@flow(name=FLOW, flow_run_name="data")
def data(overrides: dict[str, Any] | None = None) -> dict[str, str]:
    """overrides: settings to change in params.yaml first, as {"filter.min_aesthetic": 5.0}."""
    return run_stages(STAGES, overrides)
