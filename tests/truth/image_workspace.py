"""A workspace as the stages before the encoders leave it: shards of small drawn images, and clean captions."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}


def drawn(number: int, width: int = 40, height: int = 32) -> tuple[str, Image.Image]:
    """A caption and its image: a square of one colour on a ground of another, by number."""
    names = list(COLOURS)
    inner, outer = names[number % 4], names[(number // 4 + 1 + number) % 4]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = COLOURS[outer]
    pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = COLOURS[inner]
    pixels[0, 0] = number % 256  # no two alike
    return f"a {inner} square on {outer}", Image.fromarray(pixels)


def write_workspace(
    root: Path, project: Path, count: int = 10, per_shard: int = 4, shapes: tuple = ((32, 40),), **sections: dict
) -> Path:
    """data/shards, data/captions and params.yaml under `root`; sections: changes of params.yaml's sections.

    shapes: (height, width) of the images, in turn.
    """
    (root / "data/shards").mkdir(parents=True)
    (root / "data/captions").mkdir()
    rows = []
    for first in range(0, count, per_shard):
        shard = f"{first // per_shard:05d}.tar"
        with tarfile.open(root / "data/shards" / shard, "w") as tar:
            for number in reversed(range(first, min(count, first + per_shard))):  # members in no order
                height, width = shapes[number % len(shapes)]
                caption, picture = drawn(number, width, height)
                key = f"{number:09d}"
                add_member(tar, f"{key}.txt", b"other members are no pictures")
                add_member(tar, f"{key}.png", png(picture))
                rows.append({"key": key, "shard": shard, "caption": caption, "width": width, "height": height})
    pq.write_table(pa.Table.from_pylist(rows), root / "data/captions/captions.parquet")
    write_params(root, project, **sections)
    return root


def write_params(root: Path, project: Path, **sections: dict) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    for section, changes in sections.items():
        merge(params[section], changes)
    if params["model"]["system"] != "raphael":
        del params["train"]["settings"]  # of RAPHAEL's own training
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def merge(into: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def add_member(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def small_preset(root: Path, project: Path, **unet: object) -> str:
    """A preset file of small sizes in `root`; returns what model.preset takes."""
    preset = yaml.safe_load((project / "raphael/presets/tiny.yaml").read_text())
    preset["unet"].update({"context_dim": 32, "latent_channels": 4, "attention_levels": [1], **unet})
    preset["text"].update({"width": preset["unet"]["context_dim"], "heads": 2, "layers": 1})
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(preset))
    return str(path)


SMALL_LOOP = {
    "num_images": 16, "batch_size": 4, "warmup_images": 4, "log_every_images": 8, "checkpoint_every_images": 8,
}  # fmt: skip
SMALL = {
    "picture": {"sizes_px": [[16, 32]]},
    "autoencoder": {"latent_channels": 4, "channels": [8, 8, 8], "norm_groups": 4, "loop": SMALL_LOOP},
    "clip": {
        "text_width": 32, "text_heads": 2, "text_layers": 1, "image_width": 32, "image_layers": 1, "embed_dim": 16,
        "image_tower": "vit", "image_size_px": 16, "patch_size_px": 16, "loop": SMALL_LOOP,
    },
    "encode": {"batch_size": 4},
}  # fmt: skip
