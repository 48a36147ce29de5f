"""A workspace in which a GLIDE can be trained at once: records of random pixels with token ids, a tiny random CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from truth.cascade_workspace import COUNT, LOOP, SIDE, captions, merge

from raphael.base.config.params import Config, load_config
from raphael.base.records import PIXELS, TOKEN_IDS, RecordWriter
from raphael.base.stage import write_json
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parents[2]
LENGTH, WIDTH = 12, 16
SHAPE = {"context_dim": WIDTH, "context_length": LENGTH, "vector_dim": WIDTH, "head_dim": 8, "norm_groups": 4}
OWN = {"unet": {**SHAPE, "channels": [8, 16], "attention_levels": [1]}, "text": {"layers": 1, "head_dim": 8}}
CLIP = {
    "context_length": LENGTH, "embed_dim": 16, "text_width": 16, "text_heads": 2, "text_layers": 1, "image_width": 8,
}  # fmt: skip


def settings(changes: dict) -> dict:
    """params.yaml with params.glide.yaml over it, at the smallest sizes, then `changes`."""
    base, own = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "params.glide.yaml"))
    del base["train"]["settings"]  # RAPHAEL's
    small = {
        "picture": {"sizes_px": [[SIDE, SIDE]]},
        "clip": CLIP,
        "model": {"settings": {"base": OWN, "upsampler": OWN}},
        "train": {"num_workers": 0, "num_sample_prompts": 3, "loop": LOOP},
        "generate": {"steps": 2, "images_per_prompt": 1, "batch_size": 5},
    }
    return merge(merge(merge(base, own), small), changes)


def write_glide_workspace(folder: Path, changes: dict | None = None) -> Config:
    import torch

    from raphael.encoders.clip import build_clip, save_clip
    from raphael.encoders.text import load_text_encoder

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings(changes or {})))
    config = load_config(folder / "params.yaml")
    torch.manual_seed(0)
    save_clip(build_clip(config.clip), folder / "models/clip")
    encoder = load_text_encoder(folder / "models/clip")
    values = {
        PIXELS: np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8),
        TOKEN_IDS: encoder.tokenize(captions()).numpy().astype(np.int32),
    }
    fields = {name: (str(array.dtype), array.shape[1:]) for name, array in values.items()}
    name = f"{SIDE}x{SIDE}"
    with RecordWriter(folder / "data/records", {name: fields}, {"picture": to_dict(config.picture)}) as writer:
        writer.append([f"{row:09d}" for row in range(COUNT)], values, name)
    entries = [
        {"prompt": f"a red {name}", "suite": "single", "truth": None, "reference": None}
        for name in ("circle", "star", "ring")
    ]
    write_json(folder / "data/source/prompts.json", {"source": "scenes", "prompts": entries})
    return config
