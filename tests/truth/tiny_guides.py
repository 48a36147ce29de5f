"""Models and records at the smallest size beside which guides can be trained at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from truth.class_workspace import write_class_workspace
from truth.tiny_ddpm import write_ddpm
from truth.tiny_raphael import write_pipeline

from raphael.base.records import LABEL, MOMENTS, TOKEN_IDS, Records, RecordWriter
from raphael.generate.pipeline import RaphaelPipeline

SMALL = {
    "num_heldout": 8,
    "network.channels": [8, 16],
    "network.attention_levels": [1],
    "network.head_dim": 8,
    "loop.num_images": 64,
    "loop.batch_size": 8,
    "loop.warmup_images": 16,
    "loop.log_every_images": 16,
    "loop.checkpoint_every_images": 16,
    "loop.precision": "fp32",
}
PICTURE = {"picture": {"sizes_px": [[32, 32]]}}
CLASSES = ("circle", "cross", "heart", "square", "star", "triangle")
COLOURS = ("red", "blue", "green", "yellow", "white")


def write_class_home(folder: Path, labels: bool = True) -> Path:
    """A workspace with records of drawn shapes, 32 x 32 px, and an untrained DDPM beside them."""
    free = {} if labels else {"encode": {"fields": ["pixels"], "label_pattern": ""}}
    write_class_workspace(folder, {**PICTURE, **free}, labels=labels)
    write_ddpm(folder / "models/raphael", classes=CLASSES if labels else ())
    return folder


def write_text_home(folder: Path, count: int = 40) -> tuple[RaphaelPipeline, Records]:
    """An untrained RAPHAEL and records of random moments whose captions name a colour and a shape, with labels."""
    pipeline = RaphaelPipeline.from_pretrained(write_pipeline(folder / "models/raphael"))
    rng = np.random.default_rng(0)
    shapes = rng.integers(0, len(CLASSES), count)
    captions = [f"a {COLOURS[row % len(COLOURS)]} {CLASSES[shape]}" for row, shape in enumerate(shapes)]
    values: dict[str, Any] = {
        MOMENTS: rng.standard_normal((count, 8, 8, 8)).astype(np.float16),
        TOKEN_IDS: pipeline.text_encoder.tokenize(captions).numpy().astype(np.int32),
        LABEL: shapes.astype(np.int32),
    }
    fields = {name: (str(value.dtype), value.shape[1:]) for name, value in values.items()}
    autoencoder = {"autoencoder": pipeline.autoencoder.facts(), LABEL: {"classes": list(CLASSES)}}
    facts = {"picture": {"sizes_px": pipeline.meta["picture"]["sizes_px"]}, **autoencoder}
    with RecordWriter(folder / "data/records", {"32x32": fields}, facts) as writer:
        writer.append([f"{row:09d}" for row in range(count)], values, "32x32")
    return pipeline, Records(folder / "data/records")
