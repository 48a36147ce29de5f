"""`raphael train --from CHECKPOINT --data FOLDER --out WORKSPACE`: fine-tune a trained model on other images.

No second loop and no second pipeline: a workspace is made whose encoders are the checkpoint's, frozen, whose preset is
the checkpoint's, and whose stage `train` begins from its EMA weights (train.init_from). Then DVC brings that
stage up to date. The same command resumes where it stopped; other settings train anew.

--lora RANK trains low rank beside the frozen weights instead (LoRA): WORKSPACE/lora.safetensors is what it leaves, and
models/raphael in the workspace the model with it.

--guide classifier|clip is another program: a guide of a model's sampling (raphael train --guide classifier --help).
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.common.tables import is_remote
from data_pipeline.local_images.kinds import kind_of
from flows.environment import prepare
from flows.finetuning.prior import join_prior, prompts_of
from flows.pipelines.dvc_stages import ancestors, read_pipeline, reproduce
from flows.workspace import settings
from flows.workspace.folder import PROJECT, fingerprint, make_workspace
from raphael.base.config import consent
from raphael.base.config.preset import Preset, load_preset
from raphael.base.config.systems import expect_system, find_system, system_of
from raphael.base.config.unet import SIZES
from raphael.base.images.sizes import least_short_side
from raphael.base.stage import one_clear_line, read_json
from raphael.base.strict import load, to_dict
from raphael.pretrained.find import find_pipeline

# a tenth of what trainings from nothing have here; adafactor's is a share of each weight's own size
LEARNING_RATE = {"adamw": 1e-5, "muon": 2e-4, "adafactor": 1e-3}
LORA_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Request:
    """What to fine-tune, on what, where; changes: further settings by dotted key, which win."""

    checkpoint: str | Path  # a pipeline folder, or the name of one
    data: str | Path  # a folder, a file or an address of images with captions (data_pipeline/local_images/kinds.py)
    out: Path
    num_images: int
    learning_rate: float | None  # None: LEARNING_RATE of the optimizer
    sample_every: int  # images; 0: never
    changes: dict[str, Any]
    inpainting: bool = False  # the network gains the input of raphael/net/inputs.py: mask and picture
    sizes: bool = False  # the network gains the input of an image's sizes and crop, as SDXL's
    measuring: dict[str, Any] = field(default_factory=dict)  # what is held out and how often it is shown
    captions: str = "auto"  # source.captions
    lora: int = 0  # rank; 0: all weights are trained
    form: str = "kohya"  # of the adapter's file
    prompts: tuple[str, ...] = ()  # of the grids
    trigger: str = ""  # a word before every caption
    prior_images: int = 0  # how many of them; 0: as many as its data has
    prior: tuple[str, ...] = ()  # prompts of the model's own images beside the others (flows/finetuning/prior.py)


def make(request: Request) -> Path:
    """Make or refresh the workspace. Raises StageError, ConfigError, CheckpointError: one line each."""
    from raphael.base.checkpoint.folder import checkpoint_sha256, read_checkpoint

    folder = base_of(request)
    _, meta = read_checkpoint(folder, [])
    expect_system(meta, folder)
    preset = preset_of(meta, folder)
    if request.inpainting:
        unet = replace(preset.unet, inpainting=True, picture_channels=preset.unet.latent_channels + 1)
        preset = replace(preset, unet=unet)
    if request.sizes:
        factor = 2 ** (len(preset.vae.channels) - 1)
        preset = replace(preset, unet=replace(preset.unet, vector_dim=SIZES, size_px=factor))
    name = _name(meta)
    if request.lora:
        _check_rank(request, preset)
    changes = {**_settings(request, folder, meta, preset), **request.measuring, **request.changes}
    changes |= {"train.init_from": str(folder), "train.init_sha256": checkpoint_sha256(folder)[:16]}
    root = make_workspace(request.out, [PROJECT / "params.coco.yaml"], {**changes, "model.preset": name})
    # DVC depends on the preset's file by its name, whose text is the checkpoint's in this workspace
    _put_yaml(root / "raphael" / "presets" / f"{name}.yaml", to_dict(preset))
    return root


def base_of(request: Request) -> Path:
    """The pipeline folder to begin with. A single file of Stable Diffusion is imported first, beside the workspace."""
    file = Path(request.checkpoint)
    if not file.is_file():
        return find_pipeline(request.checkpoint).resolve()
    from raphael.base.files import file_sha256
    from raphael.systems.exchange.import_model import import_model

    out = request.out.resolve()
    imported = out.with_name(f"{out.name}.base-{file_sha256(file)[:12]}")
    if not imported.exists():
        print(f"train: {import_model(file, imported)}", flush=True)
    return imported


def with_prior(request: Request) -> Request:
    """The request with the model's own images beside those of its data, where it asks for them."""
    if not request.prior:
        return request
    joined = request.out.resolve().with_name(f"{request.out.name}.data")
    asked = prompts_of(request.prior), request.trigger, request.prior_images
    data = join_prior(base_of(request), Path(request.data), joined, *asked)
    return replace(request, data=data)


def _check_rank(request: Request, preset: Preset) -> None:
    """Raises ConfigError now, and not after the images were encoded."""
    import torch

    from raphael.base.config.lora import LoraConfig
    from raphael.net.lora.low_rank import check_rank
    from raphael.net.moe.unet import RaphaelUNet

    said = {key.removeprefix("train.lora."): value for key, value in request.changes.items() if "train.lora." in key}
    with torch.device("meta"):
        check_rank(RaphaelUNet(preset.unet), load(LoraConfig, {"rank": request.lora, **said}, "--set", "train.lora"))


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
    from raphael.generate.pipeline import default_size

    picture = meta["picture"]
    return picture["sizes_px"] if "sizes_px" in picture else [list(default_size(picture))]


def _settings(request: Request, folder: Path, meta: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """What the workspace's params.yaml says otherwise than the project's."""
    from raphael.base.config.params import load_config
    from raphael.encoders.pretrained import follow

    data, sizes = _place(request.data), _sizes(meta)
    kind = kind_of(data)
    tuned = find_system(system_of(meta)).tuned(preset, max(map(max, sizes)))
    project = load_config(PROJECT / "params.yaml")
    train, short = project.train, least_short_side(sizes, project.filter.max_aspect_ratio)
    loop = train.loop
    optimizer = request.changes.get("train.loop.optimizer", loop.optimizer)
    batch = int(request.changes.get("train.loop.batch_size", loop.batch_size))
    point = max(batch, request.num_images // 40)
    own = (
        {}
        if not request.lora
        else {
            "train.lora.rank": request.lora,
            "train.settings.balance": "none",  # gates stay as they are
            "train.loop.optimizer": "adamw",
            "train.loop.learning_rate": request.learning_rate or LORA_LEARNING_RATE,
        }
    )
    return {
        "source.kind": kind,
        "source.path": data,
        "source.captions": request.captions,
        "source.fingerprint": "" if is_remote(data) else fingerprint(Path(data)),
        "download.image_size_px": short,
        "picture.sizes_px": sizes,
        "filter.min_side_px": min(project.filter.min_side_px, short),
        "autoencoder.pretrained": follow(folder / "autoencoder"),
        "clip.pretrained": follow(folder / "text_encoder"),
        "clip.context_length": preset.unet.context_length,
        **{f"train.settings.{name}": value for name, value in tuned.items()},
        "train.loop.num_images": request.num_images,
        "train.loop.learning_rate": request.learning_rate or LEARNING_RATE[optimizer],
        "train.loop.warmup_images": min(10 * batch, request.num_images // 10),
        "train.loop.log_every_images": point,
        "train.loop.checkpoint_every_images": max(batch, request.num_images // 8),
        "train.loop.sample_every_images": request.sample_every,
        **({"encode.fields": [*project.encode.fields, "sizes"]} if preset.unet.size_px else {}),
        **({"train.sample_prompts": list(request.prompts)} if request.prompts else {}),
        **({"captions.prefix": request.trigger} if request.trigger and not request.prior else {}),
        **own,
    }


def run(root: Path, request: Request) -> Path:
    """Bring the stage `train` and what is before it up to date; -> what it left, the adapter or the model.

    Raises StageError with the failing stage's line.
    """
    prepare(root)
    pipeline = read_pipeline(root)
    wanted = ancestors(pipeline)["train"] | {"train"}
    for name in pipeline:
        if name in wanted:
            reproduce(root, name, lambda text: print(text, end="", flush=True))
    return put_adapter(root, request.form) if request.lora else root / "models/raphael"


def put_adapter(root: Path, form: str) -> Path:
    """The adapter that the training left, in the workspace itself."""
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.systems.lora.file import LORA_FILE, PEFT_FILE, Header, read_lora, write_lora
    from raphael.systems.lora.names import fit

    trained = root / "models/raphael" / LORA_FILE
    if form == "kohya":
        shutil.copyfile(trained, root / LORA_FILE)
        return root / LORA_FILE
    file = read_lora(trained)
    pairs = fit(file, {"unet": RaphaelPipeline.from_pretrained(root / "models/raphael").unet})
    some = next(iter(pairs.values()))
    return write_lora(root / PEFT_FILE, pairs, Header(file.header["raphael_base"], some.rank, some.alpha), form)


def _place(data: str | Path) -> str:
    return str(data) if is_remote(data) else str(Path(data).resolve())


def show(root: Path, began_s: float) -> list[str]:
    """Write the sheet and the losses beside it, into MLflow's run of the training, too; -> lines for a person."""
    from flows.finetuning.sheet import CURVES, SHEET, draw_losses, make_sheet
    from raphael.base.config.params import load_config
    from raphael.base.integrity.contents import model_sha256
    from raphael.base.tracking.tracker import closing, tracker_of_model

    config = load_config(root / "params.yaml")
    if not config.train.loop.sample_every_images:
        return []
    found, sheet = make_sheet(config, root)
    sheet.save(root / SHEET)
    draw_losses(config, root, root / CURVES)
    with closing(tracker_of_model(config, root, model_sha256(root / "models/raphael"))) as tracker:
        for name in (SHEET, CURVES):
            tracker.artifact(root / name)
    took = (time.monotonic() - began_s) / 60
    return [f"{found.line()}; it took {took:.1f} minutes", f"{root / SHEET}, {root / CURVES}"]


def plan(request: Request, asked: dict[str, int | None], memory_gb: float | None) -> tuple[Request, list[str]]:
    """The request with what its images and this machine's memory ask for, and lines for a person.

    asked: as flows.finetuning.plan.measuring. Raises StageError where images or memory do not do.
    """
    from flows.finetuning.plan import look, measuring, need
    from raphael.base.checkpoint.folder import read_checkpoint
    from raphael.base.config.params import load_config

    folder = base_of(request)
    _, meta = read_checkpoint(folder, [])
    root = make(request)
    config = load_config(root / "params.yaml")
    looked = look(config)
    told = measuring(looked, request.num_images, config.train.loop.batch_size, asked)
    if request.prompts:
        told.pop("train.sample_prompts", None)
    request = replace(request, measuring=told)
    needed = need(load_config(make(request) / "params.yaml"), preset_of(meta, folder), folder, looked, memory_gb)
    request = replace(request, measuring={**request.measuring, **needed.settings})
    return request, [looked.write(root / "reports" / "check"), needed.line()]


def _put_yaml(file: Path, data: dict[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump(data, sort_keys=False)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    """What is most often asked for with an adapter, and prior preservation."""
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter of that rank, no weights")
    parser.add_argument("--format", choices=("kohya", "peft"), default="kohya", help="of the adapter's file")
    parser.add_argument("--prompt", action="append", default=[], help="of the grids; may be repeated")
    parser.add_argument("--trigger", default="", metavar="WORD", help="put it before every caption")
    text = "prior preservation: the model's own images of this, or of a .txt file's lines, beside; may be repeated"
    parser.add_argument("--prior", action="append", default=[], metavar="PROMPT", help=text)
    text = "how many of them (default: as many as --data has); more are more varied, half of an epoch they stay"
    parser.add_argument("--prior-images", type=int, default=0, metavar="N", help=text)


def _request(given: argparse.Namespace) -> Request:
    return Request(
        given.checkpoint,
        given.data,
        given.out,
        given.num_images,
        given.learning_rate,
        given.sample_every or 0,
        settings.parse(given.set),
        inpainting=given.inpainting,
        sizes=given.sizes,
        lora=given.lora,
        form=given.format,
        prompts=tuple(given.prompt),
        captions=given.captions,
        trigger=given.trigger,
        prior=tuple(given.prior),
        prior_images=given.prior_images,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="checkpoint", required=True, help="a pipeline folder, or a name: scenes")
    text = "images with captions: a folder, COCO's, parquet files that hold images, webdataset's tars"
    parser.add_argument("--data", required=True, help=text)
    parser.add_argument("--captions", default="auto", choices=("auto", "sidecar", "metadata", "file_name"))
    parser.add_argument("--out", type=Path, required=True, help="the workspace; made if absent")
    parser.add_argument("--num-images", type=int, default=6400, help="images seen (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: a tenth of a training's from nothing")
    parser.add_argument("--inpainting", action="store_true", help="the network learns to see mask and picture, too")
    text = "the network learns to be told images' sizes and crops, too, as SDXL's"
    parser.add_argument("--sizes", action="store_true", help=text)
    text = "images between two grids; 0: none, and no sheet (default: a twentieth of all)"
    parser.add_argument("--sample-every", type=int, metavar="IMAGES", help=text)
    text = "images kept out, whose loss says when it is enough; 0: none (default: a tenth, of ten images and more)"
    parser.add_argument("--heldout", type=int, metavar="IMAGES", help=text)
    text = "end after so many of twenty points without a lower held-out loss; 0: never (default: %(default)s)"
    parser.add_argument("--patience", type=int, default=5, metavar="POINTS", help=text)
    text = "plan for this much memory, 8, 12, 24 or 80 say (default: what there is)"
    parser.add_argument("--memory", type=float, metavar="GB", help=text)
    _add_adapters(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument("--only-make", action="store_true", help="make the workspace, train nothing")
    consent.add_option(parser)
    given = parser.parse_args(argv)
    with one_clear_line("train") as outcome:
        request = with_prior(_request(given))
        asked = {name: getattr(given, name) for name in ("heldout", "patience", "sample_every")}
        request, lines = plan(request, asked, given.memory)
        for line in lines:
            print(f"train: {line}", flush=True)
        root = make(request)
        if given.only_make:
            print(f"train: {root}; continue with: cd {root} && dvc repro train")
        else:
            began_s = time.monotonic()
            for line in [str(run(root, request)), *show(root, began_s)]:
                print(f"train: {line}")
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
