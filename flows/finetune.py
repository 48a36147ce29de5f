"""`raphael train --from CHECKPOINT --data FOLDER --out WORKSPACE`: go on with a trained model on other pictures.

No second loop and no second pipeline: a workspace is made whose encoders are the checkpoint's, frozen, whose preset is
the checkpoint's, and whose stage `train` begins from its averaged weights (train.init_from). Then DVC brings that
stage up to date. The same command goes on where it stopped; other settings train anew.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import settings
from flows.environment import prepare
from flows.pipeline import ancestors, read_pipeline, reproduce
from flows.workspace import PROJECT, fingerprint, make_workspace
from raphael.preset import Preset, load_preset
from raphael.stage import StageError, one_clear_line, read_json
from raphael.strict import load, to_dict

LEARNING_RATE = {"adamw": 1e-5, "muon": 2e-4}  # a tenth of what trainings from nothing have here
LARGE_PX = 256  # from here on timesteps are drawn uniformly, as Stable Diffusion's and the paper's


@dataclass(frozen=True)
class Request:
    """What to fine-tune, on what, where; changes: further settings by dotted key, which win."""

    checkpoint: Path
    data: Path  # pictures, each with a .txt of the same name; or COCO's captions_train2017*.json beside train2017/
    out: Path
    num_images: int
    learning_rate: float | None  # None: LEARNING_RATE of the optimizer
    sample_every: int  # images; 0: never
    changes: dict[str, Any]


def make(request: Request) -> Path:
    """Make or refresh the workspace. Raises StageError, ConfigError, CheckpointError: one line each."""
    from raphael.checkpoint import checkpoint_sha256, read_checkpoint

    folder = request.checkpoint.resolve()
    if not folder.exists():
        raise StageError(f"{request.checkpoint}: no such folder; expected a pipeline folder such as models/raphael")
    _, meta = read_checkpoint(folder, [])
    preset = preset_of(meta, folder)
    name = _name(meta)
    changes = {**_settings(request, folder, meta, preset), **request.changes}
    changes |= {"train.init_from": str(folder), "train.init_sha256": checkpoint_sha256(folder)[:16]}
    root = make_workspace(request.out, [PROJECT / "params.coco.yaml"], {**changes, "model.preset": name})
    # DVC depends on the preset's file by its name, whose text is the checkpoint's in this workspace
    _put_yaml(root / "raphael" / "presets" / f"{name}.yaml", to_dict(preset))
    return root


def preset_of(meta: dict[str, Any], folder: Path) -> Preset:
    """The preset that a checkpoint was trained with; its text tower and autoencoder are those of the folder."""
    data = to_dict(load_preset(_name(meta)))
    config = folder / "autoencoder" / "config.json"
    vae = read_json(config) if config.is_file() else {}
    if "block_out_channels" in vae:
        data["vae"] = {
            "channels": vae["block_out_channels"],
            "layers_per_block": vae["layers_per_block"],
            "norm_groups": vae["norm_num_groups"],
            "attention": vae["mid_block_add_attention"],
        }
    unet = {**data["unet"], **meta["unet"]}
    text = {**data["text"], "context_length": unet["context_length"], "width": unet["context_dim"]}
    changed = {**data, "unet": unet, "diffusion": meta["diffusion"], "text": text, "sizes_px": _sizes(meta)}
    return load(Preset, changed, "the checkpoint's meta.json")


def _name(meta: dict[str, Any]) -> str:
    """Of a preset that exists: the checkpoint's own, or sd for one that was trained with a file."""
    name = str(meta.get("preset", "sd"))
    return name if (PROJECT / "raphael" / "presets" / f"{name}.yaml").is_file() else "sd"


def _sizes(meta: dict[str, Any]) -> list[list[int]]:
    from raphael.generate.pipeline import drawn_size

    picture = meta["picture"]
    return picture["sizes_px"] if "sizes_px" in picture else [list(drawn_size(picture))]


def _settings(request: Request, folder: Path, meta: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """What the workspace's params.yaml says otherwise than the project's."""
    from raphael.config import load_config
    from raphael.encoders.pretrained import follow

    if not request.data.is_dir():
        raise StageError(f"{request.data}: no such folder; expected pictures with captions (docs/data.md)")
    data, sizes = request.data.resolve(), _sizes(meta)
    coco = any(data.glob("captions_train2017*.json")) or any(data.glob("annotations/captions_train2017*.json"))
    train = load_config(PROJECT / "params.yaml").train
    loop = train.loop
    optimizer = request.changes.get("train.loop.optimizer", loop.optimizer)
    batch = int(request.changes.get("train.loop.batch_size", loop.batch_size))
    point = max(batch, request.num_images // 40)
    return {
        "source.kind": "coco" if coco else "folder",
        "source.path": str(data),
        "source.fingerprint": fingerprint(data),
        "download.image_size_px": max(min(size) for size in sizes),
        "picture.sizes_px": sizes,
        "autoencoder.pretrained": follow(folder / "autoencoder"),
        "clip.pretrained": follow(folder / "text_encoder"),
        "clip.context_length": preset.unet.context_length,
        "train.edge_weight": 0.0 if preset.unet.edge_tokens == "none" else 0.1,
        "train.timestep_shift": train.timestep_shift if max(map(max, sizes)) < LARGE_PX else 1.0,
        "train.loop.num_images": request.num_images,
        "train.loop.learning_rate": request.learning_rate or LEARNING_RATE[optimizer],
        "train.loop.warmup_images": min(10 * batch, request.num_images // 10),
        "train.loop.log_every_images": point,
        "train.loop.checkpoint_every_images": max(batch, request.num_images // 8),
        "train.loop.sample_every_images": request.sample_every,
    }


def run(root: Path) -> None:
    """Bring the stage `train` and what is before it up to date. Raises StageError with the failing stage's line."""
    prepare(root)
    pipeline = read_pipeline(root)
    wanted = ancestors(pipeline)["train"] | {"train"}
    for name in pipeline:
        if name in wanted:
            reproduce(root, name, lambda text: print(text, end="", flush=True))


def _put_yaml(file: Path, data: dict[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump(data, sort_keys=False)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="checkpoint", type=Path, required=True, help="a pipeline folder")
    parser.add_argument("--data", type=Path, required=True, help="pictures with captions")
    parser.add_argument("--out", type=Path, required=True, help="the workspace; made if absent")
    parser.add_argument("--num-images", type=int, default=6400, help="images seen (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: a tenth of a training's from nothing")
    parser.add_argument("--sample-every", type=int, default=0, metavar="IMAGES", help="draw grids; 0: never")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--only-make", action="store_true", help="make the workspace, train nothing")
    given = parser.parse_args(argv)
    with one_clear_line("train") as outcome:
        request = Request(
            given.checkpoint,
            given.data,
            given.out,
            given.num_images,
            given.learning_rate,
            given.sample_every,
            settings.parse(given.set),
        )
        root = make(request)
        if given.only_make:
            print(f"train: {root}; go on with: cd {root} && dvc repro train")
        else:
            run(root)
            print(f"train: {root / 'models/raphael'}")
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
