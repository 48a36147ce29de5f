"""A workspace in which a DDPM can be trained at once: records of drawn shapes in pixels with their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import SHAPES, scene_of_row
from raphael.base.config.params import Config, load_config
from raphael.base.images.fit import fit
from raphael.base.records import LABEL, NO_LABEL, PIXELS, RecordWriter
from raphael.base.stage import write_json
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parents[2]
SINGLE = {"single": 1.0, "relation": 0.0, "count": 0.0, "text": 0.0, "pair": 0.0, "three": 0.0}
SMALL = {"unet": {"channels": [8, 16], "attention_levels": [1], "head_dim": 8, "norm_groups": 4}}
LOOP = {
    "num_images": 64, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 16, "sample_every_images": 32,
    "warmup_images": 16, "precision": "fp32",
}  # fmt: skip


def merge(settings: dict, changes: dict) -> dict:
    both = {
        name: merge(settings[name], value)
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
        else value
        for name, value in changes.items()
    }
    return {**settings, **both}


def settings(changes: dict) -> dict:
    """params.yaml with params.ddpm.yaml over it, at the smallest sizes, then `changes`."""
    base, own = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "params.ddpm.yaml"))
    del base["train"]["settings"]  # RAPHAEL's
    small = {
        "picture": {"sizes_px": [[16, 16]]},
        "model": {"settings": SMALL},
        "train": {"num_workers": 0, "loop": LOOP},
        "generate": {"steps": 2, "images_per_prompt": 2, "batch_size": 5},
    }
    return merge(merge(merge(base, own), small), changes)


def write_class_workspace(folder: Path, changes: dict | None = None, count: int = 40, labels: bool = True) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings(changes or {})))
    config = load_config(folder / "params.yaml")
    write_class_records(folder / "data/records", config, count, labels)
    entry = {"prompt": "a red circle", "suite": "single", "truth": None, "reference": None}
    write_json(folder / "data/source/prompts.json", {"source": "scenes", "prompts": [entry]})
    return config


def write_class_records(folder: Path, config: Config, count: int, labels: bool) -> None:
    height, width = config.picture.sizes_px[0]
    scenes = [scene_of_row(0, row, (64, 64), 0.12, SINGLE) for row in range(count)]
    classes = sorted(SHAPES)
    images = np.stack([fit(draw(scene), height, width, True).transpose(2, 0, 1) for scene in scenes])
    places = [NO_LABEL if row % 9 == 8 else classes.index(scene.things[0].shape) for row, scene in enumerate(scenes)]
    fields = {PIXELS: ("uint8", (3, height, width))}
    values, facts = {PIXELS: images}, {"picture": to_dict(config.picture)}
    if labels:
        fields[LABEL], values[LABEL] = ("int32", ()), np.array(places, np.int32)
        facts[LABEL] = {"from": "a test", "classes": classes, "counts": [], "without": places.count(NO_LABEL)}
    with RecordWriter(folder, {f"{height}x{width}": fields}, facts) as writer:
        writer.append([f"{row:09d}" for row in range(count)], values, f"{height}x{width}")
