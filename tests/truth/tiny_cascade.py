"""An untrained cascade by a T5's tokens, whose text does something: every weight of its base is drawn anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from truth.cascade_workspace import write_cascade_workspace

from raphael.base.checkpoint.folder import write_checkpoint
from raphael.diffusion.cascade import Upsampler
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import prediction_of
from raphael.encoders.text import load_text_encoder
from raphael.generate.pipeline import Pipeline
from raphael.systems.imagen.pipeline import ImagenPipeline
from raphael.systems.imagen.training import described, networks
from raphael.systems.job import Folders


def cascade_in(folder: Path) -> Pipeline:
    """folder: of its workspace, which is written."""
    config = write_cascade_workspace(folder)
    settings, meta = config.model.load(), described(config, Folders.of(folder, folder))
    base, large = (networks(config, part) for part in ("base", "upsampler"))
    torch.manual_seed(5)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    noise = noise_of(settings.upsampler.diffusion), prediction_of(settings.upsampler.diffusion)
    upsampler = Upsampler(large, *noise, settings.upsampler.factor)
    text = load_text_encoder(folder / "models/clip")
    return ImagenPipeline(base, settings.base.diffusion, upsampler, text, meta)


def write_cascade(folder: Path, workspace: Path) -> Path:
    """A pipeline folder of it."""
    pipeline, read_from = cascade_in(workspace), workspace / "as_read"
    for name, network in pipeline.networks.items():
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        write_checkpoint(read_from / name, {"ema": weights, "raw": weights}, {})
    shutil.copytree(workspace / "models/clip", read_from / "text_encoder")
    pipeline.source = SimpleNamespace(folder=read_from)
    pipeline.save_pretrained(folder)
    return folder
