"""A workspace in which the stage `train` can run at once: debug sizes, random encoders, random records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from raphael.config import Config, load_config
from raphael.preset import load_preset
from raphael.records import EDGES, MOMENTS, TOKEN_IDS, RecordWriter
from raphael.stage import write_json
from raphael.strict import to_dict

ROOT = Path(__file__).resolve().parents[2]
COUNT = 40


def merge(settings: dict, changes: dict) -> dict:
    changed = {
        name: merge(settings[name], value) if isinstance(value, dict) else value for name, value in changes.items()
    }
    return {**settings, **changed}


def write_workspace(folder: Path, changes: dict) -> Config:
    """Write params.yaml (the debug sizes, then `changes`) and everything that the stage reads."""
    import torch

    from raphael.encoders.autoencoder import build_autoencoder
    from raphael.encoders.clip import build_clip, save_clip
    from raphael.encoders.text import load_text_encoder

    folder.mkdir(parents=True, exist_ok=True)
    settings, debug = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "params.debug.yaml"))
    settings = merge(settings, debug)
    length = load_preset(debug["model"]["preset"]).unet.context_length
    sizes = {"picture": {"height_px": 32, "width_px": 32}, "generate": {"steps": 2}, "clip": {"context_length": length}}
    settings = merge(settings, sizes)
    (folder / "params.yaml").write_text(yaml.safe_dump(merge(settings, changes)))
    config = load_config(folder / "params.yaml")
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config.autoencoder)
    autoencoder.set_scaling(1.0, 0.0)
    autoencoder.save(folder / "models/autoencoder")
    save_clip(build_clip(config.clip), folder / "models/clip")
    text = load_text_encoder(folder / "models/clip")
    rng = np.random.default_rng(0)
    side, channels = 32 // autoencoder.downsampling, autoencoder.latent_channels
    fields = {
        MOMENTS: ("float16", (2 * channels, side, side)), TOKEN_IDS: ("int32", (text.context_length,)),
        EDGES: ("uint8", (side, side)),
    }  # fmt: skip
    captions = [f"a {('red', 'green', 'blue')[i % 3]} {('circle', 'square')[i % 2]}" for i in range(COUNT)]
    with RecordWriter(folder / "data/records", fields, {"picture": to_dict(config.picture)}) as writer:
        writer.append([f"{i:09d}" for i in range(COUNT)], {
            MOMENTS: rng.standard_normal((COUNT, 2 * channels, side, side)).astype(np.float16),
            TOKEN_IDS: text.tokenize(captions).numpy().astype(np.int32),
            EDGES: rng.integers(0, 256, (COUNT, side, side)).astype(np.uint8),
        })  # fmt: skip
    suites = {"single": ("cross", "star"), "relation": ("pair", "row")}
    prompts = [
        {"prompt": f"a {name}", "suite": suite, "truth": None, "reference": None}
        for suite, names in suites.items()
        for name in names
    ]
    write_json(folder / "data/source/prompts.json", {"source": "scenes", "prompts": prompts})
    return config
