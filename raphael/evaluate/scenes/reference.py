"""Whether a published model of scenes draws here what it drew where it was published, and as well as its card says.

<model>/check.json holds prompts with their truths, what was read in their images then, and the numbers of its whole
evaluation; <model>/reference/*.png are some of those images. data_pipeline/tools/publish_model.py writes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.images.fit import read_image
from raphael.base.stage import read_json
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.scenes.attributes import HEADLINE_SUITES, PICTURE, score
from raphael.evaluate.scenes.reader import SceneReading, judge, read_scene

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

CHECK, IMAGES = "check.json", "reference"
NUMBERS = (*(f"{attribute}_accuracy" for attribute in HEADLINE_SUITES), PICTURE)
Entry = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """Images of check.json's prompts, uint8 (n, H, W, 3), and what was read in them."""

    images: np.ndarray
    readings: list[SceneReading]


def read_check(folder: Path) -> dict[str, Any]:
    return read_json(folder / CHECK)


def draw(pipeline: RaphaelPipeline, entries: list[Entry], seed: int) -> Drawn:
    """One image a prompt, each of (seed, its index), in one batch, with the model's own settings."""
    from raphael.diffusion.sampling import generate_images

    seeds, prompts = [(seed, entry["index"]) for entry in entries], [entry["prompt"] for entry in entries]
    images = generate_images(pipeline.parts(), prompts, seeds, pipeline.defaults, batch_size=len(entries))
    return Drawn(images, [read_scene(image) for image in images])


def verdicts(entries: list[Entry], drawn: Drawn) -> list[dict[str, bool | None]]:
    """Of each image: attribute -> right or wrong, None where the prompt does not state it."""
    return [judge(reading, entry["truth"]) for entry, reading in zip(entries, drawn.readings, strict=True)]


def agreement(one: list[dict[str, bool | None]], other: list[dict[str, bool | None]]) -> float:
    """The share of stated attributes that are judged alike, 0 to 1."""
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a if a[name] is not None]
    return sum(a == b for a, b in pairs) / len(pairs)


def outside(entries: list[Entry], drawn: Drawn, numbers: dict[str, Any]) -> list[str]:
    """Numbers that these images do not reach: both 95 % intervals, theirs and that of `numbers`, are apart.

    numbers: <name>, <name>_low, <name>_high as evaluate.json has them. Each entry names the number, got and expected.
    """
    got, apart = score(entries, drawn.readings), []
    for name in NUMBERS:
        if got[name] is None or numbers.get(name) is None:
            continue
        low, high = wilson(round(got[name] * got[f"{name}_n"]), got[f"{name}_n"])
        expected = numbers[f"{name}_low"], numbers[f"{name}_high"]
        if high < expected[0] or low > expected[1]:
            apart.append(
                f"{name}: got {got[name]:.3f} of {got[f'{name}_n']} ({low:.3f} to {high:.3f}), expected "
                f"{numbers[name]:.3f} ({expected[0]:.3f} to {expected[1]:.3f})"
            )
    return apart


def difference(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each pair of images (n, H, W, 3), in levels of 0 to 255, (n,)."""
    return np.abs(images.astype(np.float64) - others.astype(np.float64)).mean(axis=(1, 2, 3))


def references(folder: Path, check: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """(places in check.json's prompts, images uint8 (n, H, W, 3)) of the stored reference images."""
    places = check["references"]
    files = [folder / IMAGES / f"{place:02d}.png" for place in places]
    return places, np.stack([read_image(file) for file in files])
