"""Train the autoencoder on the kept images, or check the pretrained one; measure its scaling.

It sees every image at the first size of picture.sizes_px: convolutions do not know an image's shape, so one size
teaches and measures them for all. Writes models/autoencoder."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.common.images import CAPTIONS, ImageSet, TrainingData, collect, drop_collected, shard_inputs
from raphael.base.config.params import Config
from raphael.base.cores.threads import one_thread
from raphael.base.stage import Stage, StageError, device_of
from raphael.base.strict import to_dict

if TYPE_CHECKING:
    from raphael.base.config.params import AutoencoderConfig
    from raphael.encoders.autoencoder import Autoencoder
    from raphael.objectives.autoencoding import AutoencodingObjective

OUT = Path("models/autoencoder")
MEASURED_IMAGES = 1024  # of the scaling: evenly spread over the training images
BATCH = 16
ONE_THREAD_PX = 16_384  # of a step; of 8,192: 200 images/s by one thread, 96 by two


def run(config: Config, stage: Stage) -> None:
    settings, size = config.autoencoder, config.picture.sizes_px[0]
    if settings.is_pixels:
        _pixels(config, stage)
        return
    decisive = {**to_dict(settings), "loop": settings.loop.decisive()}
    losses = [Path(name).expanduser() for name in (settings.perceptual.backbone, settings.perceptual.heads)]
    losses = [path for path in losses if path.is_file()]
    pad = config.picture.too_small == "pad"
    work = stage.workdir(*shard_inputs(stage), decisive, *losses, size, config.seed, *(["pad"] if pad else []))
    image_set = collect(stage, work, *size, pad)
    train_rows, held_rows = image_set.split()
    if settings.pretrained:
        autoencoder, history = _pretrained(config), []
    else:
        autoencoder, history = _train(config, stage, image_set, train_rows, work)
    autoencoder.to(device_of(config))
    if not autoencoder.scaling_known:
        spread = train_rows[np.linspace(0, len(train_rows) - 1, min(MEASURED_IMAGES, len(train_rows))).astype(int)]
        _measure(autoencoder, image_set, spread)
    quality = _quality(autoencoder, image_set, held_rows)
    finished = work / "autoencoder"
    shutil.rmtree(finished, ignore_errors=True)
    _write(autoencoder, settings.pretrained, finished)
    stage.publish(finished, OUT)
    drop_collected(work)
    stage.report(
        len(image_set.keys),
        len(image_set.keys),
        pretrained=settings.pretrained or None,
        trained_on=0 if settings.pretrained else len(train_rows),
        heldout=len(held_rows),
        lpips=None if settings.pretrained else perceptual_state(settings),
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
        **autoencoder.facts(),
        **quality,
        history=history,
    )


def _pixels(config: Config, stage: Stage) -> None:
    """Nothing to train: a folder that says so, which every reader of an autoencoder takes."""
    from data_pipeline.common.caption_rows import CaptionRows

    count, autoencoder = len(CaptionRows(stage.root / CAPTIONS)), _pretrained(config)
    finished = stage.workdir(config.autoencoder.pretrained) / "autoencoder"
    shutil.rmtree(finished, ignore_errors=True)
    _write(autoencoder, config.autoencoder.pretrained, finished)
    stage.publish(finished, OUT)
    told = {"trained_on": 0, "heldout": 0, "lpips": None, "parameters": 0, **autoencoder.facts(), "history": []}
    stage.report(count, count, pretrained=config.autoencoder.pretrained, **told)


def _train(
    config: Config, stage: Stage, image_set: ImageSet, rows: np.ndarray, work: Path
) -> tuple[Autoencoder, list[dict[str, float]]]:
    import torch

    from raphael.encoders.autoencoder import build_autoencoder
    from raphael.train.loop import Hooks, World, train

    settings = config.autoencoder
    torch.manual_seed(config.seed)
    autoencoder = build_autoencoder(settings)
    autoencoder.to(memory_format=torch.channels_last)
    objective = build_objective(autoencoder, settings)
    with stage.progress(settings.loop.num_images, "images") as bar:
        hooks = Hooks(progress=lambda images: bar.update(images - bar.bar.n))
        data = TrainingData(image_set, rows)
        world = World(device=str(device_of(config)))
        folder = work / "checkpoints"
        with one_thread() if _is_small(settings, world.device) else contextlib.nullcontext():
            outcome = train(objective, data, settings.loop, config.seed, folder=folder, world=world, hooks=hooks)
    _use_ema(objective, outcome["ema"], settings.loop.ema_decay)
    return autoencoder.eval(), outcome["history"]


def _is_small(settings: AutoencoderConfig, device: str) -> bool:
    """Whether a step has so little in each operation that a second thread is waited for longer than it computes."""
    return device == "cpu" and 0 < settings.loop.batch_size * settings.crop_px**2 <= ONE_THREAD_PX


def build_objective(autoencoder: Autoencoder, settings: AutoencoderConfig) -> AutoencodingObjective:
    """With the losses that the settings name. Raises StageError where a file of LPIPS cannot be read."""
    from raphael.objectives.adversarial import AdversarialLoss
    from raphael.objectives.autoencoding import AutoencodingObjective
    from raphael.objectives.perceptual import load_lpips

    perceptual, adversarial = None, None
    if perceptual_state(settings) == "on":
        files = (Path(name).expanduser() for name in (settings.perceptual.backbone, settings.perceptual.heads))
        try:
            perceptual = load_lpips(*files)
        except ValueError as error:
            raise StageError(f"autoencoder.perceptual: {error}") from None
    if settings.adversarial.weight:
        facts = settings.adversarial
        adversarial = AdversarialLoss(facts.weight, facts.start_images, facts.channels, facts.layers)
    return AutoencodingObjective(
        autoencoder,
        settings.kl_weight,
        settings.gradient_weight,
        settings.crop_px,
        perceptual=perceptual,
        perceptual_weight=settings.perceptual.weight,
        adversarial=adversarial,
    )


def perceptual_state(settings: AutoencoderConfig) -> str:
    """Whether LPIPS takes part in the loss; if not, why, for the report."""
    if not settings.perceptual.weight:
        return "off: autoencoder.perceptual.weight is 0"
    if not settings.perceptual.backbone:
        return "off: no autoencoder.perceptual.backbone is given"
    return "on"


def _use_ema(objective: Any, ema: dict[str, Any], decay: float) -> None:
    """Put the EMA weights in the place of the last ones, where an EMA was asked for."""
    import torch

    if decay:
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                if name in ema:
                    parameter.copy_(ema[name])


def _pretrained(config: Config) -> Autoencoder:
    from raphael.encoders.autoencoder import load_autoencoder

    autoencoder = load_autoencoder(config.autoencoder.pretrained)
    for size in config.picture.sizes_px:
        if any(side % autoencoder.downsampling for side in size):
            raise StageError(
                f"picture.sizes_px: got {list(size)}, expected multiples of {autoencoder.downsampling} for "
                f"{config.autoencoder.pretrained}; change it in {config.file}"
            )
    return autoencoder


def _measure(autoencoder: Autoencoder, image_set: ImageSet, rows: np.ndarray) -> None:
    from raphael.encoders.autoencoder import measure_scaling

    autoencoder.set_scaling(*measure_scaling(moments for _, moments in _encoded(autoencoder, image_set, rows)))


def _encoded(autoencoder: Autoencoder, image_set: ImageSet, rows: np.ndarray):
    """(images in [-1,1], moments), batch by batch, where the autoencoder is."""
    import torch

    from raphael.base.precision import without_tf32
    from raphael.objectives.autoencoding import to_network_range

    autoencoder.eval()
    device = autoencoder.device
    for start in range(0, len(rows), BATCH):
        images = to_network_range(torch.from_numpy(image_set.images[rows[start : start + BATCH]]).to(device))
        with torch.no_grad(), without_tf32():
            yield images, autoencoder.encode_moments(images)


def _quality(autoencoder: Autoencoder, image_set: ImageSet, rows: np.ndarray) -> dict[str, float]:
    """PSNR in dB on held-out images, decoded from the posterior's mean; mean and deviation of their latents."""
    import torch

    from raphael.encoders.autoencoder import psnr

    ratios, latents = [], []
    for images, moments in _encoded(autoencoder, image_set, rows):
        latents.append(autoencoder.latents_from_moments(moments))
        with torch.no_grad():
            ratios.append(psnr(images, autoencoder.decode(latents[-1])))
    values, scaled = torch.cat(ratios), torch.cat(latents)
    if not torch.isfinite(scaled).all():
        raise StageError("the autoencoder's latents are not finite; lower autoencoder.loop.learning_rate")
    return {
        "psnr_db": round(float(values.mean()), 4),
        "psnr_db_lowest": round(float(values.min()), 4),
        "latent_mean": round(float(scaled.mean()), 4),
        "latent_std": round(float(scaled.std()), 4),
    }


def _write(autoencoder: Autoencoder, spec: str, folder: Path) -> None:
    """A whole copy, so that what follows needs nothing else; weights above 1 GiB are pointed at instead."""
    from raphael.encoders.pretrained import MAX_COPY_BYTES, write_pointer

    weights_bytes = sum(parameter.numel() * 4 for parameter in autoencoder.parameters())
    if spec and weights_bytes > MAX_COPY_BYTES:
        write_pointer(folder, spec, {"scaling_factor": autoencoder.scaling_factor, "shift": autoencoder.shift})
    else:
        autoencoder.to("cpu").save(folder)
