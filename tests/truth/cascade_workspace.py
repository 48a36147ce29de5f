"""A workspace in which an Imagen can be trained at once: records of drawn scenes in pixels, a tiny T5, its tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from raphael.base.config.params import Config, T5Config, load_config
from raphael.base.records import PIXELS, TEXT, TEXT_MASK, RecordWriter
from raphael.base.stage import write_json
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parents[2]
SIDE, LENGTH, WIDTH, COUNT = 16, 12, 16, 32
SHAPE = {"context_dim": WIDTH, "context_length": LENGTH, "head_dim": 8, "norm_groups": 4}
SMALL = {
    "base": {"unet": {**SHAPE, "channels": [8, 16], "attention_levels": [1]}},
    "upsampler": {
        "unet": {
            **SHAPE, "stem_channels": 8, "channels": [8, 16], "res_blocks": [1, 1], "strides": [2, 2],
            "attention_levels": [1],
        }
    },
}  # fmt: skip
LOOP = {
    "num_images": 80, "batch_size": 8, "log_every_images": 8, "checkpoint_every_images": 8, "sample_every_images": 64,
    "warmup_images": 16, "precision": "fp32",
}  # fmt: skip
T5 = {"width": WIDTH, "heads": 2, "hidden": 32, "layers": 1, "vocabulary": 128}


def merge(settings: dict, changes: dict) -> dict:
    both = {
        name: merge(settings[name], value)
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
        else value
        for name, value in changes.items()
    }
    return {**settings, **both}


def settings(changes: dict) -> dict:
    """params.yaml with params.imagen.yaml over it, at the smallest sizes, then `changes`."""
    base, own = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "params.imagen.yaml"))
    del base["train"]["settings"]  # RAPHAEL's
    small = {
        "picture": {"sizes_px": [[SIDE, SIDE]]},
        "clip": {"context_length": LENGTH, "t5": T5},
        "model": {"settings": SMALL},
        "train": {"num_workers": 0, "num_sample_prompts": 3, "loop": LOOP},
        "generate": {"steps": 2, "upsampler_steps": 2, "images_per_prompt": 1, "batch_size": 5},
    }
    return merge(merge(merge(base, own), small), changes)


def captions(count: int = COUNT) -> list[str]:
    return [f"a {('red', 'green', 'blue')[i % 3]} {('circle', 'square')[i % 2]} on white" for i in range(count)]


def write_t5(folder: Path) -> Path:
    """models/clip as the stage leaves it, with random weights."""
    import torch

    from raphael.encoders.pretrained import HERE, write_pointer
    from raphael.encoders.t5.build import build_t5, save_encoder
    from raphael.encoders.t5.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer(captions(), T5["vocabulary"], folder)
    torch.manual_seed(0)
    save_encoder(build_t5(T5Config(**T5), len(load_tokenizer(folder))), folder)
    write_pointer(folder, f"t5:{HERE}", {"context_length": LENGTH})
    return folder


def write_cascade_workspace(folder: Path, changes: dict | None = None, text: bool = True) -> Config:
    from raphael.encoders.text import load_text_encoder

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings(changes or {})))
    config = load_config(folder / "params.yaml")
    encoder = load_text_encoder(write_t5(folder / "models/clip"))
    ids = encoder.tokenize(captions())
    values = {PIXELS: np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8)}
    if text:
        values[TEXT] = encoder.encode(ids).context.numpy().astype(np.float16)
        values[TEXT_MASK] = encoder.mask_of(ids).numpy().astype(np.uint8)
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
