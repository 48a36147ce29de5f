"""Inpainting by a network that sees mask and picture, as GLIDE's (arXiv 2112.10741, section 2.4), and training-free.

The shipped model gains the input, which begins at zero, and is trained on with scenes that are drawn as they are asked
for, holes at random (raphael/objectives/holes.py). Then both draw the same holes from the same seeds:

    replace     one object, another in its place
    half        two objects, the right one another; the hole is half the picture and the prompt names both
    remove      two objects, the right one taken away; the prompt names the one that stays
    complete    one object, the hole is its right half
    gradient    one object on a gradient, another in its place

The seam is the mean step of colour across the hole's border, without feathering, in levels of 255, beside the same
step in the picture. `--out` keeps the model: raphael edit inpaint --checkpoint FOLDER.

Writes results/inpainting-<device>-<yyyymm>.json, unless --quick.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _edit_scenes import Subject, box, drawn, other, read, scene, step, subjects
from _machine import judged, keep
from edits import Found, rows_of

from data_pipeline.source.scene_captions import caption
from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import scene_of_row
from raphael.base.config.params import TrainConfig, load_config
from raphael.base.records import MOMENTS, TOKEN_IDS
from raphael.base.strict import to_dict
from raphael.edit.known import inpaint
from raphael.edit.run import How
from raphael.evaluate.scenes.reader import read_scene
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition
from raphael.net.inputs import widened
from raphael.net.moe.unet import RaphaelUNet
from raphael.objectives.denoising import DenoisingObjective, LatentScale
from raphael.objectives.denoising_settings import DenoisingSettings
from raphael.train.loop import Hooks, train

PROJECT = Path(__file__).resolve().parents[1]
ROWS, HELDOUT_SHARE = 50_000, 0.1
RATE = 1e-3  # half of what the shipped model was trained with


class Drawn:
    """Scenes as the training reads them, drawn and encoded when they are asked for: nothing is kept."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    def __len__(self) -> int:
        return ROWS

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images, texts = zip(*(self._row(int(index)) for index in indices), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            moments = self.pipeline.autoencoder.encode_moments(pixels)
        return {MOMENTS: moments.numpy(), TOKEN_IDS: self.pipeline.text_encoder.tokenize(list(texts)).numpy()}

    @staticmethod
    def _row(index: int) -> tuple[np.ndarray, str]:
        made = scene_of_row(7, index, (64, 64), HELDOUT_SHARE)
        text, _ = caption(made, random.Random(f"inpainting/{index}"))
        return np.asarray(draw(made)), text


def with_input(pipeline: Any) -> Any:
    """A copy of the pipeline whose network reads mask and picture, as yet with no weight."""
    config = pipeline.unet.config
    unet = RaphaelUNet(replace(config, inpainting=True, picture_channels=config.latent_channels + 1))
    unet.load_state_dict(widened(unet, pipeline.unet.state_dict()))
    wide = copy.copy(pipeline)
    wide.unet = unet.to(memory_format=torch.channels_last)
    wide.meta = {**pipeline.meta, "unet": to_dict(unet.config)}
    return wide


def fine_tuned(pipeline: Any, num_images: int, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The pipeline after num_images, with what the training says."""
    wide, (settings, losses) = with_input(pipeline), training_settings(num_images)
    text_encoder = wide.text_encoder

    def encode(token_ids: torch.Tensor) -> Condition:
        encoding = text_encoder.encode(token_ids)
        return Condition(encoding.context, encoding.mask)

    empty = text_encoder.tokenize([""])[0]
    scale = LatentScale(wide.autoencoder.scaling_factor, wide.autoencoder.shift)
    goal = DenoisingObjective(wide.unet, encode, empty, wide.diffusion, losses, scale)
    points: list[dict[str, float]] = []
    hooks = Hooks(on_log=lambda point, images: points.append(point) or print(_line(images, point), flush=True))
    began = time.monotonic()
    ended = train(goal, Drawn(pipeline), settings.loop, settings.seed, folder=folder, hooks=hooks)
    spent = time.monotonic() - began
    weights = {name.removeprefix("unet."): value for name, value in ended["ema"].items()}
    wide.unet.load_state_dict({**wide.unet.state_dict(), **weights})  # of the biases of gates there is no average
    wide.unet.eval()
    losses = [round(point["train/denoise"], 5) for point in points]
    return wide, {"images": ended["images"], "minutes": round(spent / 60, 1), "denoise": losses}


def training_settings(num_images: int) -> tuple[TrainConfig, DenoisingSettings]:
    """As the shipped model was trained (params.scenes.yaml), at a lower rate that falls to 0."""
    config = load_config(PROJECT / "params.yaml")
    warmup, log = min(640, num_images // 10), max(16, num_images // 20)
    loop = replace(
        config.train.loop,
        num_images=num_images,
        learning_rate=RATE,
        warmup_images=warmup,
        log_every_images=log,
        checkpoint_every_images=max(16, num_images // 20),
        sample_every_images=0,
        schedule="cosine",
    )
    losses = replace(config.training(), edge_weight=0.0, timestep_shift=3.0)
    return replace(config.train, num_workers=0, loop=loop), losses


def _line(images: int, point: dict[str, float]) -> str:
    return f"{images:>8,} images  denoise {point['train/denoise']:.4f}  {point['train/images_per_s']:.1f} images/s"


def holes(pipeline: Any, every: list[Subject]) -> Iterator[tuple[str, int, np.ndarray, np.ndarray, str, Any]]:
    """(case, seed, picture, mask, prompt, what the result has to show: its objects as (colour, shape), sorted)."""
    for seed, (c1, s1, c2, s2, b) in enumerate(every):
        one = drawn(pipeline, scene(c1, s1, b), seed)
        middle = box(10, 54, 10, 54)
        yield "replace", seed, one, middle, scene(c2, s2, b), [(c2, s2)]
        yield "complete", seed, one, box(0, 64, 32, 64), scene(c1, s1, b), [(c1, s1)]
        graded = f"on a {b} gradient background, flat style"
        picture = drawn(pipeline, f"a {c1} {s1} {graded}", seed)
        yield "gradient", seed, picture, middle, f"a {c2} {s2} {graded}", [(c2, s2)]
        beside = f"a {c1} {s1} left of a {{}} on a plain {b} background, flat style"
        two, new = drawn(pipeline, beside.format(f"{c2} {s2}"), seed), other(c1, s1, c2, s2, b)
        right = box(0, 64, 32, 64)
        yield "half", seed, two, right, beside.format(" ".join(new)), sorted([(c1, s1), new])
        yield "remove", seed, two, right, f"a {c1} {s1} on a plain {b} background, flat style", [(c1, s1)]


def measure(pipeline: Any, name: str, source: Any, every: list[Subject], found: Found) -> None:
    for case, seed, picture, mask, prompt, wanted in holes(source, every):
        got = inpaint(pipeline, picture, mask, prompt, How(1000 + seed), feather_px=0).result[0]
        seen = read_scene(got)
        objects = sorted((thing.colour, thing.shape) for thing in seen.objects)
        found[f"{case}: right, {name}"].append(objects == wanted)
        found[f"{case}: seam, {name}"].append(step(got, mask))
        if name == "training-free":
            found[f"{case}: seam, the picture's own"].append(step(picture, mask))


def unchanged(pipeline: Any, name: str, every: list[Subject], found: Found) -> None:
    """Text to image by the same weights: nothing is known."""
    for seed, (c1, s1, _, _, b) in enumerate(every):
        found[f"text to image: right, {name}"].append(read(drawn(pipeline, scene(c1, s1, b), seed)) == (c1, s1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 images of training, one prompt; keeps nothing")
    parser.add_argument("-n", type=int, default=24, help="prompts (default: %(default)s)")
    parser.add_argument("--images", type=int, default=19200, help="seen in training (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="a folder of checkpoints, from which the training resumes")
    parser.add_argument("--out", type=Path, help="keep the model there")
    arguments = parser.parse_args()
    pipeline = RaphaelPipeline.from_pretrained("scenes")
    with tempfile.TemporaryDirectory() as temporary:
        images = 32 if arguments.quick else arguments.images
        wide, told = fine_tuned(pipeline, images, arguments.work or Path(temporary))
    if arguments.out:
        wide.save_pretrained(arguments.out)
    if arguments.quick:
        pipeline.defaults = wide.defaults = replace(pipeline.defaults, steps=2)
    found: Found = defaultdict(list)
    every = subjects(1 if arguments.quick else arguments.n)
    for name, model in (("training-free", pipeline), ("fine-tuned", wide)):
        measure(model, name, pipeline, every, found)
        unchanged(model, name, every, found)
    rows = list(rows_of(found))
    for row in rows:
        ends = f"  ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
        print(f"{row['case']:<58}{row['value']:>8.3f}{ends}  n {row['n']}")
    if not arguments.quick:
        keep("inpainting", rows, summary({row["case"]: row["value"] for row in rows}), training=told)


def summary(mean: dict[str, float]) -> list[dict[str, Any]]:
    """The fine-tuned one beside the training-free one: shares that are wrong, and seams."""
    rows = []
    for case in ("replace", "half", "remove", "complete", "gradient"):
        wrong = [1 - mean[f"{case}: right, {name}"] for name in ("fine-tuned", "training-free")]
        seams = [mean[f"{case}: seam, {name}"] for name in ("fine-tuned", "training-free")]
        if wrong[1]:
            rows.append(judged(f"{case}: wrong", *wrong, "share", "<= 1.0"))
        rows.append(judged(f"{case}: seam", *seams, "levels", "<= 1.0"))
    return rows


if __name__ == "__main__":
    main()
