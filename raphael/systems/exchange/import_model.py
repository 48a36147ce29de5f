"""`raphael import`: a folder of diffusers or one file becomes a pipeline folder (models/raphael's form).

Read are what `raphael export` writes, and Stable Diffusion 1 and 2 in diffusers' form or in CompVis' single file: their
U-Net fills the shape of a preset (raphael/net/moe/from_diffusers.py), whose mixtures begin from its feed-forwards. A
.ckpt is read as data (raphael/systems/exchange/ckpt.py); other pickles are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.checkpoint.folder import PICKLES, write_checkpoint
from raphael.base.config.preset import DiffusionConfig, load_preset
from raphael.base.files import put
from raphael.base.integrity.contents import seal
from raphael.base.stage import StageError, of_a_stranger, read_json
from raphael.base.strict import load, to_dict
from raphael.diffusion.scheduler import BETAS, PREDICTIONS
from raphael.systems.exchange.ckpt import read_ckpt
from raphael.systems.exchange.compvis import Prediction, unpack
from raphael.systems.exchange.export import ENCODERS, OWN_TEXT, SINGLE_FORM, UNET_CLASS, UNET_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

EXPECTED = (
    "a folder of diffusers with unet/, vae/, text_encoder/ and tokenizer/, a file of raphael export, or one of Stable "
    "Diffusion 1 or 2 (.safetensors, .ckpt)"
)
CKPT = ".ckpt"


def import_model(
    source: Path,
    out: Path,
    preset: str = "sd",
    layers: dict[str, str] | None = None,
    prediction: Prediction | None = None,
) -> str:
    """Write the pipeline folder `out`. Returns what a person should know of it. Raises StageError, one line.

    preset: whose mixtures, gates and edge heads a Stable Diffusion gets; layers: changes of its time_layer and
    space_layer. Neither matters for what `raphael export` wrote. prediction: of a single file, which does not say.
    """
    if out.exists():
        raise StageError(f"{out}: is there already; name another folder")
    if not source.exists():
        raise StageError(f"{source}: no such file or folder, expected {EXPECTED}")
    refuse_pickles(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with of_a_stranger(source):
            if source.is_file():
                text = _from_file(source, temporary, preset, layers or {}, prediction)
            elif read_json(source / "unet" / "config.json").get("_class_name") == UNET_CLASS:
                text = _from_export(source, temporary)
            else:
                text = _from_stable_diffusion(source, temporary, preset, layers or {})
        seal(temporary)
        put(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return text


def refuse_pickles(source: Path) -> None:
    """Raises StageError for a pickle, and for a part that has pickled weights only."""
    if source.is_file():
        if source.suffix not in (".safetensors", CKPT):
            kind = "a pickle, which can run code when it is read: refused" if source.suffix in PICKLES else "a file"
            raise StageError(f"{source}: got {kind}; expected {EXPECTED}")
        return
    for part in ("unet", "vae", "text_encoder"):
        files = sorted((source / part).glob("*")) if (source / part).is_dir() else []
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise StageError(
                f"{pickles[0]}: got a pickle, which can run code when it is read: refused; expected {EXPECTED}, each "
                "with weights in .safetensors"
            )


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise StageError(f"{file}: no such file, expected {EXPECTED}") from None
    except SafetensorError as error:
        raise StageError(f"{file}: damaged, or no safetensors ({error}); fetch or export it again") from None


def _from_file(file: Path, out: Path, preset: str, layers: dict[str, str], prediction: Prediction | None) -> str:
    if file.suffix == CKPT:
        tensors, header = read_ckpt(file), {}
    else:
        tensors, header = _read_tensors(file)
    if header.get("form") == SINGLE_FORM:
        return _from_single(file, tensors, header, out)
    folder = out.with_name(f"{out.name}.diffusers")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        unpack(tensors, file, folder, prediction)
        del tensors
        return _from_stable_diffusion(folder, out, preset, layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _from_single(file: Path, tensors: dict[str, Tensor], header: dict[str, str], out: Path) -> str:
    from safetensors.torch import save_file

    from raphael.encoders.pretrained import follow

    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, key = name.partition(":")
        files.setdefault(place, {})[key] = tensor
    texts = json.loads(header["files"])
    for name in [*files, *texts]:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise StageError(f"{file}: names {name}, a place outside the folder: refused")
    unet = files.pop("unet")
    write_checkpoint(out, {"ema": unet, "raw": unet}, json.loads(header["meta"]))
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    for name, group in files.items():
        save_file(group, out / name, metadata={"format": "pt"})
    for part in ENCODERS:
        follow(out / part)  # the header's pointers are a stranger's too
    return f"{len(unet)} tensors of the U-Net, {sum(map(len, files.values()))} of its encoders"


def _from_export(source: Path, out: Path) -> str:
    unet, _ = _read_tensors(source / "unet" / UNET_WEIGHTS)
    write_checkpoint(out, {"ema": unet, "raw": unet}, read_json(source / "unet" / "raphael.json"))
    _encoders(source, out)
    return f"{len(unet)} tensors of the U-Net"


def _from_stable_diffusion(source: Path, out: Path, preset_name: str, layers: dict[str, str]) -> str:
    import torch

    from raphael.encoders.text import load_text_encoder
    from raphael.net.moe.from_diffusers import config_from, load_diffusers
    from raphael.net.moe.unet import RaphaelUNet

    theirs = read_json(source / "unet" / "config.json")
    if theirs.get("_class_name") != "UNet2DConditionModel":
        raise StageError(f"{source}/unet: got a {theirs.get('_class_name')}, expected a UNet2DConditionModel")
    preset = load_preset(preset_name)
    tensors, _ = _read_tensors(source / "unet" / UNET_WEIGHTS)
    out.mkdir(parents=True)
    _encoders(source, out)
    encoders = {path.name: path for path in out.iterdir()}
    try:
        length = load_text_encoder(out / "text_encoder").context_length
        config = replace(config_from(theirs, preset.unet), context_length=length, **layers)
        torch.manual_seed(0)  # of gates and edge heads, which Stable Diffusion has not
        unet = RaphaelUNet(config)
        transfer = load_diffusers(unet, {name: tensor.float() for name, tensor in tensors.items()})
    except ValueError as error:
        raise StageError(f"{source}: {error}") from None
    scheduler = source / "scheduler" / "scheduler_config.json"
    diffusion = diffusion_from(read_json(scheduler), scheduler)
    factor = 2 ** (len(read_json(source / "vae" / "config.json")["block_out_channels"]) - 1)
    side = theirs.get("sample_size") or 64
    meta = {
        "unet": to_dict(config),
        "diffusion": to_dict(diffusion),
        "picture": {"sizes_px": [[side * factor, side * factor]]},
        "preset": preset_name,
        "images_seen": 0,
        "imported": {
            "matched": len(transfer.matched),
            "initialised": len(transfer.initialised),
            "own": len(transfer.own),
            "left_over": transfer.left_over,
            "lost": transfer.lost,
        },
    }
    keep = out.with_name(f"{out.name}.encoders")  # write_checkpoint replaces the folder it is given
    keep.mkdir()
    try:
        for name, path in encoders.items():
            os.rename(path, keep / name)
        write_checkpoint(out, {"ema": unet.state_dict(), "raw": unet.state_dict()}, meta)
        for name in encoders:
            os.rename(keep / name, out / name)
    finally:
        shutil.rmtree(keep)
    return transfer.text()


def diffusion_from(scheduler: dict[str, Any], where: Path) -> DiffusionConfig:
    """Our words for a scheduler_config.json. Raises StageError, ConfigError."""
    schedules, predictions = ({theirs: ours for ours, theirs in names.items()} for names in (BETAS, PREDICTIONS))
    schedule, prediction = scheduler.get("beta_schedule"), scheduler.get("prediction_type", "epsilon")
    if schedule not in schedules or prediction not in predictions:
        raise StageError(
            f"{where}: got beta_schedule {schedule!r}, prediction_type {prediction!r}, expected one of "
            f"{', '.join(schedules)} and one of {', '.join(predictions)}"
        )
    found = {
        "num_steps": scheduler["num_train_timesteps"],
        "schedule": schedules[schedule],
        "beta_start": scheduler["beta_start"],
        "beta_end": scheduler["beta_end"],
        "prediction": predictions[prediction],
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
    }
    return load(DiffusionConfig, found, str(where))


def _encoders(source: Path, out: Path) -> None:
    """The autoencoder as ours; text encoder and tokenizer in one folder, with a pointer that moves along."""
    from raphael.encoders.autoencoder import load_autoencoder
    from raphael.encoders.pretrained import HERE, follow, write_pointer
    from raphael.encoders.text import load_text_encoder

    load_autoencoder(source / "vae").save(out / "autoencoder")
    if (source / OWN_TEXT).is_dir():
        shutil.copytree(source / OWN_TEXT, out / "text_encoder")
        follow(out / "text_encoder")
        return
    home = out / "text_encoder" / "transformers"
    home.mkdir(parents=True)
    for part in ("tokenizer", "text_encoder"):
        for file in sorted((source / part).glob("*")):
            if file.is_file() and file.suffix in (".json", ".txt", ".safetensors", ".model"):
                shutil.copy2(file, home / file.name)
    architecture = read_json(home / "config.json").get("architectures", ["CLIPTextModel"])[0]
    kind = "t5" if architecture == "T5EncoderModel" else "clip"
    spec = f"{kind}:{HERE}/transformers"
    write_pointer(out / "text_encoder", spec, {})
    encoder = load_text_encoder(out / "text_encoder")
    write_pointer(out / "text_encoder", spec, {"context_length": encoder.context_length})
