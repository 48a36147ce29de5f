"""The door for whoever generates: `RaphaelPipeline.from_pretrained(folder)` is the pipeline of the system that made the
folder (raphael/systems), with one way to call it."""

from __future__ import annotations

from raphael.systems.halves import is_halved
from raphael.systems.pipeline import WEIGHTS, Pipeline, PipelineOutput, chosen_sampling, default_size

RaphaelPipeline = Pipeline

__all__ = ["WEIGHTS", "Pipeline", "PipelineOutput", "RaphaelPipeline", "chosen_sampling", "default_size", "is_halved"]
