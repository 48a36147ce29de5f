"""raphael/train: the autoencoder, the CLIP, the records and the diffusion model."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipelines.stages import FLOW, run_stages
from raphael.base.pipeline import stages_of

STAGES = stages_of("train")


@flow(name=FLOW, flow_run_name="train")
def train(overrides: dict[str, Any] | None = None) -> dict[str, str]:
    """overrides: settings to change in params.yaml first, as {"train.loop.num_images": 60000}."""
    return run_stages(STAGES, overrides)
