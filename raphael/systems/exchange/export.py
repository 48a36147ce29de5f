"""`raphael export`: a trained pipeline in the forms that other programs read. Nothing in them is pickled.

diffusers      a folder: model_index.json, unet/, vae/ (AutoencoderKL's own), scheduler/ (what diffusers' schedulers
               load), text_encoder/ and tokenizer/; own_text_encoder/ where ours is no transformers folder. Text tower
               and autoencoder load by their own libraries; the U-Net's class is RAPHAEL's, which no other library has:
               unet/config.json is its shape, its weights are named as in raphael/net/unet.py.
safetensors    one file: the EMA weights, the autoencoder, the text encoder; in its header all that JSON says.

Both come back by `raphael import` (raphael/systems/exchange/import_model.py), to the last bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raphael.base.checkpoint.folder import Stored, checkpoint_sha256, read_checkpoint
from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.systems import expect_system
from raphael.base.files import written_whole
from raphael.base.stage import StageError, write_json
from raphael.base.strict import load
from raphael.diffusion import scheduler
from raphael.diffusion.scheduler import BETAS, PREDICTIONS
from raphael.pretrained.find import find_pipeline

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["diffusers", "safetensors"]
UNET_CLASS = "RaphaelUNet"
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
SINGLE_FORM = "raphael-single/1"
OWN_TEXT = "own_text_encoder"
ENCODERS = ("autoencoder", "text_encoder")


def export(checkpoint: str | Path, out: Path, form: Format, weights: str = "ema") -> Path:
    """Write `checkpoint`, a pipeline folder or the name of one, to `out` in that form. Returns what was written.

    It is written atomically. out: a folder that is absent or empty; with safetensors the file goes into it,
    named after the checkpoint. Raises StageError, CheckpointError.
    """
    source = find_pipeline(checkpoint)
    expect_system(Stored(source).meta, source)
    groups, meta = read_checkpoint(source, [weights])
    meta = {**meta, "weights": weights, "checkpoint_sha256": checkpoint_sha256(source)}
    if form == "safetensors":
        return _single(source, groups[weights], meta, out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StageError(f"{out}: is there already, expected a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as temporary:
        _diffusers(source, groups[weights], meta, temporary)
        if out.exists():
            out.rmdir()
    return out


def _diffusers(source: Path, tensors: dict[str, Tensor], meta: dict[str, Any], out: Path) -> None:
    import diffusers
    from safetensors.torch import save_file

    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.text import load_text_encoder
    from raphael.encoders.to_transformers import save_transformers

    (out / "unet").mkdir(parents=True)
    save_file(tensors, out / "unet" / UNET_WEIGHTS, metadata=single_line(meta))
    version = {"_diffusers_version": diffusers.__version__}
    write_json(out / "unet" / "config.json", {"_class_name": UNET_CLASS, **version, **meta["unet"]})
    write_json(out / "unet" / "raphael.json", meta)
    autoencoder = load_autoencoder(source / "autoencoder")
    if autoencoder.kind != "kl":
        raise StageError(f"{source}/autoencoder: is {autoencoder.kind}, expected a KL one; use --format safetensors")
    autoencoder.save(out / "vae")
    words = scheduler_config(meta["diffusion"])
    write_json(out / "scheduler" / "scheduler_config.json", {**version, **words})
    encoder = load_text_encoder(source / "text_encoder")
    kind = save_transformers(encoder, out / "text_encoder", out / "tokenizer")
    if encoder.kind == "open_clip":  # the way back is then a copy, its tokenizer included
        shutil.copytree(source / "text_encoder", out / OWN_TEXT)
    index = {
        "_class_name": "RaphaelPipeline",
        **version,
        "scheduler": ["diffusers", words["_class_name"]],
        "text_encoder": ["transformers", kind],
        "tokenizer": ["transformers", "AutoTokenizer"],
        "unet": ["raphael", UNET_CLASS],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(out / "model_index.json", index)


def scheduler_config(diffusion: dict[str, Any]) -> dict[str, Any]:
    """diffusers' words for our noise schedule; every scheduler of theirs reads them.

    Raises StageError for noise or a prediction that DDIMScheduler, and with it most of theirs, has no word for.
    """
    for name, known in (("schedule", BETAS), ("prediction", PREDICTIONS)):
        if diffusion[name] not in known:
            raise StageError(
                f"diffusers: got a model with diffusion.{name} {diffusion[name]}, expected one of {', '.join(known)}; "
                "use --format safetensors"
            )
    return dict(scheduler.scheduler_config(load(DiffusionConfig, diffusion, "meta.json", "diffusion")))


def single_line(meta: dict[str, Any]) -> dict[str, str]:
    """A safetensors header holds texts only: what a reader asks for first, and `meta` whole."""
    named = {name: str(meta.get(name, "unknown")) for name in ("git_revision", "records_sha256", "checkpoint_sha256")}
    return {"format": "pt", **named, "meta": json.dumps(meta, sort_keys=True)}


def _single(source: Path, tensors: dict[str, Tensor], meta: dict[str, Any], out: Path) -> Path:
    """U-Net and encoders in one file: tensors <part>/<file>:<name>, other files as texts in the header."""
    from safetensors.torch import load_file, save_file

    packed, texts = {f"unet:{name}": tensor for name, tensor in tensors.items()}, {}
    for part in ENCODERS:
        for path in sorted((source / part).rglob("*")):
            name = path.relative_to(source).as_posix()
            if path.suffix == ".safetensors":
                packed |= {f"{name}:{key}": tensor for key, tensor in load_file(path).items()}
            elif path.is_file() and path.suffix in (".json", ".txt"):
                texts[name] = path.read_text(encoding="utf-8")
            elif path.is_file():
                raise StageError(f"{path}: expected safetensors, json or txt: nothing else goes into the file")
    file = out if out.suffix == ".safetensors" else out / f"{source.resolve().name}.safetensors"
    if file.exists():
        raise StageError(f"{file}: is there already; name another place")
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"form": SINGLE_FORM, **single_line(meta), "files": json.dumps(texts, sort_keys=True)}
    with written_whole(file) as temporary:
        save_file(packed, temporary, metadata=header)
    return file
