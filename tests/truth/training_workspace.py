"""A workspace in which the stage `train` can run at once: debug sizes, random encoders, random records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from raphael.base.config.params import Config, load_config
from raphael.base.config.preset import load_preset
from raphael.base.records import EDGES, MOMENTS, TOKEN_IDS, RecordWriter
from raphael.base.stage import write_json
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parents[2]
COUNT = 40


def merge(settings: dict, changes: dict) -> dict:
    changed = {
        name: merge(settings.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return {**settings, **changed}


def write_workspace(folder: Path, changes: dict, counts: dict[str, int] | None = None) -> Config:
    """Write params.yaml (the debug sizes, then `changes`) and everything that the stage reads.

    counts: records of each bucket, by its name; COUNT of the first size if not given.
    """
    import torch

    from raphael.encoders.autoencoder import build_autoencoder
    from raphael.encoders.clip import build_clip, save_clip
    from raphael.encoders.text import load_text_encoder

    folder.mkdir(parents=True, exist_ok=True)
    settings, debug = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "params.debug.yaml"))
    settings = merge(settings, debug)
    length = load_preset(debug["model"]["preset"]).unet.context_length
    sizes = {"picture": {"sizes_px": [[32, 32]]}, "generate": {"steps": 2}, "clip": {"context_length": length}}
    settings = merge(settings, sizes)
    (folder / "params.yaml").write_text(yaml.safe_dump(merge(settings, changes)))
    config = load_config(folder / "params.yaml")
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config.autoencoder)
    autoencoder.set_scaling(1.0, 0.0)
    autoencoder.save(folder / "models/autoencoder")
    save_clip(build_clip(config.clip), folder / "models/clip")
    text = load_text_encoder(folder / "models/clip")
    write_records(folder / "data/records", config, autoencoder, text, counts)
    suites = {"single": ("cross", "star"), "relation": ("pair", "row")}
    prompts = [
        {"prompt": f"a {name}", "suite": suite, "truth": None, "reference": None}
        for suite, names in suites.items()
        for name in names
    ]
    write_json(folder / "data/source/prompts.json", {"source": "scenes", "prompts": prompts})
    return config


def write_records(folder: Path, config: Config, autoencoder, text, counts: dict[str, int] | None) -> None:
    """Random moments and edges, captions of two shapes in three colours."""
    rng = np.random.default_rng(0)
    factor, channels = autoencoder.downsampling, 2 * autoencoder.latent_channels
    sides = {f"{h}x{w}": (h // factor, w // factor) for h, w in config.picture.sizes_px}
    counts = counts or {next(iter(sides)): COUNT}
    tokens = ("int32", (text.context_length,))
    fields = {
        name: {MOMENTS: ("float16", (channels, *side)), TOKEN_IDS: tokens, EDGES: ("uint8", side)}
        for name, side in sides.items()
    }
    with RecordWriter(folder, fields, {"picture": to_dict(config.picture)}) as writer:
        for name, count in counts.items():
            start = len(writer.seen)
            captions = [f"a {('red', 'green', 'blue')[i % 3]} {('circle', 'square')[i % 2]}" for i in range(count)]
            writer.append([f"{i:09d}" for i in range(start, start + count)], {
                MOMENTS: rng.standard_normal((count, channels, *sides[name])).astype(np.float16),
                TOKEN_IDS: text.tokenize(captions).numpy().astype(np.int32),
                EDGES: rng.integers(0, 256, (count, *sides[name])).astype(np.uint8),
            }, name)  # fmt: skip
