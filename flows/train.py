"""raphael/train: the autoencoder, the CLIP, the records and the diffusion model."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stages import FLOW, run_stages

STAGES = ["autoencoder", "clip", "encode", "train"]


@flow(name=FLOW, flow_run_name="train")
def train(overrides: dict[str, Any] | None = None) -> dict[str, str]:
    """overrides: settings to change in params.yaml first, as {"train.loop.num_images": 60000}."""
    return run_stages(STAGES, overrides)
