"""A cascade's upsampler alone: what it learns on drawn scenes, against bilinear enlarging.

Network and recipe are those of params.imagen.yaml, without captions: scenes are drawn as they are asked for, nothing is
kept. Then drawn scenes of combinations that training never saw are shrunk to half by means of areas and enlarged again,
at levels of augmentation and numbers of steps: PSNR against the drawn scene, and the share of scenes whose every
attribute is read right. Beside it what needs no training: other ways of enlarging, and the deviation that
`Residual` tells the network beside the true one.

    python benchmarks/upsampler.py --images 8000
    python benchmarks/upsampler.py --name v --set model.settings.upsampler.diffusion.prediction=v

Writes results/upsampler_<name>-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from _machine import judged, keep
from PIL import Image

from data_pipeline.source.scene_captions import caption
from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import heldout_scene, scene_of_row
from flows.workspace.settings import flat, merged
from raphael.base.config.params import Config, load_config
from raphael.base.records import PIXELS, TEXT, TEXT_MASK
from raphael.diffusion.cascade import Upsampler, augmented, enlarged, shrunk, with_picture
from raphael.diffusion.image_noise import ImageNoise
from raphael.diffusion.prediction import Residual, about, prediction_of
from raphael.diffusion.sampling import Order, as_bytes, sampling_of
from raphael.evaluate.instruments.enlarging import mean, psnr
from raphael.evaluate.scenes.attributes import wrong_attributes
from raphael.evaluate.scenes.reader import read_scene
from raphael.net.condition import Condition
from raphael.systems.imagen.system import UPSAMPLER
from raphael.systems.imagen.training import build
from raphael.train.loop import Hooks, train

PROJECT = Path(__file__).resolve().parents[1]
SIDE, ROWS, HELDOUT, SEED = 64, 100_000, 0.12, 7
POINTS = ((0.0, 1), (0.0, 2), (0.0, 4), (0.0, 8), (0.0, 16), (0.02, 4), (0.05, 4), (0.1, 4), (0.2, 4))  # level, steps
FLOOR_DB, FLOOR_READ = 3.0, 0.95


class Drawn:
    """Scenes as records of pixels, with no caption: every token is masked."""

    def __init__(self, shares: dict[str, float], tokens: tuple[int, int]):
        self.shares, self.tokens = shares, tokens

    def __len__(self) -> int:
        return ROWS

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images = [np.asarray(draw(scene_of_row(SEED, int(i), (SIDE, SIDE), HELDOUT, self.shares))) for i in indices]
        text = np.zeros((len(images), *self.tokens), np.float16)
        return {PIXELS: np.stack(images).transpose(0, 3, 1, 2), TEXT: text, TEXT_MASK: np.zeros(text.shape[:2], bool)}


def settings(changes: dict[str, Any], images: int, folder: Path) -> Config:
    """Of params.imagen.yaml over params.yaml. changes: dotted keys above both."""
    loop = {"num_images": images, "checkpoint_every_images": images, "sample_every_images": 0, "log_every_images": 800}
    more = {f"train.loop.{key}": value for key, value in loop.items()} | changes
    file = folder / "params.yaml"
    file.write_text(merged(PROJECT / "params.yaml", flat(PROJECT / "params.imagen.yaml"), more), encoding="utf-8")
    return load_config(file)


def trained(config: Config, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The objective with its averaged weights, and what the training says."""
    goal, unet = build(config, UPSAMPLER), config.model.load().upsampler.unet
    data = Drawn(vars(config.source.scenes.shares), (unet.context_length, unet.context_dim))
    points: list[dict[str, float]] = []
    hooks = Hooks(on_log=lambda point, images: points.append(point) or print(_line(images, point), flush=True))
    began = processor_s()
    ended = train(goal, data, config.train.loop, config.train.seed, folder=folder, hooks=hooks)
    spent = processor_s() - began
    weights = {name.removeprefix("unet."): value for name, value in ended["ema"].items()}
    goal.unet.load_state_dict({**goal.unet.state_dict(), **weights})
    goal.unet.eval()
    parameters = sum(parameter.numel() for parameter in goal.unet.parameters())
    told = {"images": ended["images"], "processor_s": round(spent, 1), "parameters": parameters}
    return goal, told | {"images_per_processor_s": round(ended["images"] / spent, 1), "losses": _losses(points)}


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _line(images: int, point: dict[str, float]) -> str:
    return f"{images:>8,} images  loss {point['train/loss']:.4f}  {point['train/images_per_s']:.1f} images/s"


def _losses(points: list[dict[str, float]]) -> list[float]:
    return [round(point["train/loss"], 5) for point in points]


def truths(count: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Single objects of combinations that no training row has: images (count, H, W, 3), entries with their truth."""
    images, entries = [], []
    for number in range(count):
        scene = heldout_scene(SEED, "single", number, SIDE, HELDOUT)
        text, told = caption(scene, random.Random(f"upsampler/{number}"), complete=True)
        images.append(np.asarray(draw(scene)))
        entries.append({"prompt": text, "suite": "single", "truth": told})
    return np.stack(images), entries


@torch.inference_mode()
def made(config: Config, goal: Any, images: np.ndarray, level: float, steps: int) -> np.ndarray:
    factor, unet = config.model.load().upsampler.factor, config.model.load().upsampler.unet
    low = shrunk(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, factor)
    tokens = torch.zeros(len(low), unet.context_length, unet.context_dim)
    told = Condition(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool))
    noise = ImageNoise([(0, index) for index in range(len(low))], tuple(low.shape[1:]))
    how = replace(sampling_of(config.generate), augmentation=level, upsampler_steps=steps, upsampler_guidance=1.0)
    upsampler = Upsampler(goal.unet, goal.schedule, goal.prediction, factor)
    return as_bytes(upsampler(low, Order(told, told.rows([0]), noise, how)))


def read_right(images: np.ndarray, entries: list[dict[str, Any]]) -> float:
    return mean(not wrong_attributes(entry, read_scene(image)) for image, entry in zip(images, entries, strict=True))


def measured(config: Config, goal: Any, count: int) -> list[dict[str, Any]]:
    images, entries = truths(count)
    low = shrunk(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, 2)
    plain = as_bytes(enlarged(low, 2))
    base = [psnr(image, true) for image, true in zip(plain, images, strict=True)]
    rows = [{"case": "drawn", "read_right": read_right(images, entries), "n": count}]
    rows.append({"case": "bilinear", "psnr": mean(base), "read_right": read_right(plain, entries), "n": count})
    for level, steps in POINTS:
        began, found = processor_s(), made(config, goal, images, level, steps)
        spent = (processor_s() - began) / count
        gains = [psnr(image, true) - one for image, true, one in zip(found, images, base, strict=True)]
        row = {"case": f"augmentation {level:g}, {steps} steps", "augmentation": level, "steps": steps}
        row |= {"psnr": mean(base) + mean(gains), "gain_db": mean(gains), "read_right": read_right(found, entries)}
        rows.append({**row, "processor_s_per_image": round(spent, 4), "n": count})
    return rows


def sheet(config: Config, goal: Any, file: Path, count: int = 8) -> None:
    """A picture, from top to bottom: drawn, its half, bilinear, the upsampler in 1 and 4 steps, and at level 0.1."""
    images, _ = truths(count)
    low = shrunk(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, 2)
    rows = [images, as_bytes(F.interpolate(low, scale_factor=2.0)), as_bytes(enlarged(low, 2))]
    rows += [made(config, goal, images, *point) for point in ((0.0, 1), (0.0, 4), (0.1, 4))]
    whole = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(whole).resize((2 * whole.shape[1], 2 * whole.shape[0]), Image.Resampling.NEAREST).save(file)


def linear(config: Config, count: int) -> list[dict[str, Any]]:
    """PSNR of enlarging by a formula, over all pixels of `count` scenes; and sqrt(mean((x_0 - mean)^2)) beside it."""
    images, _ = truths(count)
    true = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    low, rows = shrunk(true, 2), []
    for name in ("bilinear", "bicubic"):
        up, back = functools.partial(F.interpolate, scale_factor=2.0, mode=name), 0
        made = up(low)
        for back in range(4):
            error = (made - true).square().mean().item()
            case = f"{name}, back-projected {back} times" if back else name
            rows.append({"case": case, "psnr": round(-10 * math.log10(error / 4), 3), "deviation": error**0.5})
            made = made + up(low - shrunk(made, 2))
    eps = torch.randn(low.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kind = prediction_of(config.model.load().upsampler.diffusion)
    for level in (0.0, 0.05, 0.1, 0.2, 0.3, 0.6, 0.9, 1.0) if isinstance(kind, Residual) else ():
        at = torch.full((count,), level, dtype=torch.float64)
        known = about(kind, with_picture(Condition(), augmented(low, eps, at), at, 2, kind.num_steps))
        told, off = known.deviation.mean().item(), (true - known.mean).square().mean().sqrt().item()
        rows.append({"case": f"deviation at augmentation {level:g}", "told": told, "true": off})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 images of training, 4 scenes; keeps nothing")
    parser.add_argument("-n", type=int, default=96, help="scenes that are enlarged (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8000, help="seen in training (default: %(default)s)")
    parser.add_argument("--name", default="residual", help="of the result (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="a .png of drawn and enlarged scenes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, dotted")
    arguments = parser.parse_args()
    changes = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in arguments.set)}
    with tempfile.TemporaryDirectory() as folder:
        config = settings(changes, 32 if arguments.quick else arguments.images, Path(folder))
        goal, told = trained(config, Path(folder))
    if arguments.pictures:
        sheet(config, goal, arguments.pictures)
    rows = measured(config, goal, 4 if arguments.quick else arguments.n)
    rows += linear(config, 4 if arguments.quick else arguments.n)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if not arguments.quick:
        best = next(row for row in rows if (row.get("augmentation"), row.get("steps")) == (0.0, 4))
        summary = [judged("dB over bilinear, beside its floor", best["gain_db"], FLOOR_DB, "dB", ">= 1.0")]
        summary.append(judged("scenes read right, beside their floor", best["read_right"], FLOOR_READ, "share", ">= 1"))
        keep(f"upsampler_{arguments.name}", rows, summary, training=told, settings=changes)


if __name__ == "__main__":
    main()
