"""The server of `raphael serve` with a painter of flat colours in the place of models: for tests of the page.

Whatever is asked goes through the real application, which refuses what it does not know. What is painted has values
that a test can name, and can be held at a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.config.sampling import Sampling
from raphael.edit.run import Edited
from raphael.serve import app, edits
from raphael.serve.images import b64, data_uri, png
from raphael.serve.info import Catalogue, ModelInfo
from raphael.serve.inside import scaled
from raphael.serve.work import IMAGES, INSIDE, Task, Watch

FOLDER: Path = app.PAGE
SIDE, STEPS = 64, 4
EDITS = tuple(edits.KINDS)
RED, GREEN, BLUE = (200, 30, 30), (30, 160, 60), (40, 60, 190)  # of an edit: source, result, without
EXAMPLES = ({"prompt": "a red circle on white", "seed": 3}, {"prompt": "a blue star on black", "seed": 5})
DEFAULTS = Sampling("dpmpp_2m", STEPS, 1.6)
OF_WORDS = {"examples": EXAMPLES, "long_prompts": ("cut", "chunks")}
WORDS = ModelInfo("scenes", "raphael", "0" * 16, (SIDE, SIDE), 8, 256, DEFAULTS, EDITS, True, None, 32, **OF_WORDS)
OF_CLASSES = {"inside": False, "labels": ("circle", "star"), "examples": (), "long_prompts": ("cut",)}
CLASSES = replace(WORDS, id="classes", system="ddpm", edits=("image", "vary"), **OF_CLASSES)


def colour_of(seed: int) -> tuple[int, int, int]:
    """The flat colour that stands for an image of this seed; never white, black or grey."""
    return (40 + seed * 37 % 180, 200 - seed * 53 % 160, 60 + seed * 91 % 150)


def flat(colour: tuple[int, ...], height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


@dataclass
class Double:
    """What tests set and read. pace_s: of a step; held: the seed whose work stays at its second step; warnings: of each
    answer; asked: all tasks; stopped: those that were cancelled on the way."""

    models: list[ModelInfo] = field(default_factory=lambda: [WORDS])
    token: str | None = None
    pace_s: float = 0.01
    held: int | None = None
    warnings: list[str] = field(default_factory=list)
    asked: list[Task] = field(default_factory=list)
    stopped: list[Task] = field(default_factory=list)

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue(tuple(self.models))

    def bodies(self, kind: str) -> list[Any]:
        """Of all tasks of a kind, in the order they came."""
        return [task.body for task in self.asked if task.kind == kind]

    def __call__(self, task: Task, watch: Watch) -> dict[str, Any]:
        self.asked.append(task)
        colour = np.array(colour_of(task.body.seed))
        steps = task.body.num_inference_steps or STEPS
        for step in range(1, steps + 1):
            time.sleep(self.pace_s)
            forming = flat(tuple((128 + (colour - 128) * step / steps).astype(int)))
            self.told(task, watch, step, forming)
            while self.held == task.body.seed and step == 2:
                time.sleep(0.01)
                self.told(task, watch, step, forming)
        made = {IMAGES: self.images, INSIDE: self.inside}.get(task.kind, self.edit)(task)
        told = {"settings": task.body.model_dump(), "warnings": self.warnings, "seconds": {"generate": 0.4}}
        return {"model": task.model, **made, **told}

    def told(self, task: Task, watch: Watch, step: int, forming: np.ndarray) -> None:
        try:
            watch.step(step, 1.0 / step, lambda: [data_uri(png(forming))])
        except Exception:
            self.stopped.append(task)
            raise

    def images(self, task: Task) -> dict[str, Any]:
        image = flat(colour_of(task.body.seed), task.body.height or SIDE, task.body.width or SIDE)
        return {"images": [{"index": 0, "seed": task.body.seed, "b64_png": b64(png(image))}]}

    def edit(self, task: Task) -> dict[str, Any]:
        rows = tuple(getattr(task.body, "styles", ()))
        n = len(rows) or task.body.n
        columns = [np.stack([flat(colour)] * n) for colour in (RED, GREEN, BLUE)]
        shown = {"the mask": np.stack([flat((255, 255, 255))] * n)}
        labels = ("the source", "the result", "without the edit")
        edited = Edited(*columns, labels, {"edit": task.kind, "seed": task.body.seed}, shown, rows)
        return edits.answer(task.kind.removeprefix("edits/"), edited)

    def inside(self, task: Task) -> dict[str, Any]:
        """Three steps and two blocks for a prompt of three words: word i is looked at in row i of block 1's map, and
        takes expert i mod 2 there; step s takes time expert s."""
        words, seed = task.body.prompt.split()[:3], task.body.seed
        cross = np.zeros((3, 5, 4, 4))
        for word in range(len(words)):
            cross[:, 1 + word, word, :] = 0.5
        block = {"name": "block 1", "height": 4, "width": 4, "cross": scaled(cross), "edges": scaled(cross[:, 1])}
        block |= {
            "masks": scaled(cross > 0),
            "space": [0, 0, 1, 0, 0],
            "time": [0, 1, 2],
            "num_space": 4,
            "num_time": 4,
        }
        sigmas = (None, 2.0, 0.5)
        return {
            "prompt": task.body.prompt,
            "tokens": ["<start>", *words, "<end>"],
            "words": [{"text": word, "first": at + 1, "last": at + 2} for at, word in enumerate(words)],
            "steps": [
                {"step": step, "sigma": sigma, "timestep": 1.0, "x0": b64(png(flat(colour_of(seed + step))))}
                for step, sigma in enumerate(sigmas)
            ],
            "image": b64(png(flat(colour_of(seed + 2)))),
            "blocks": [
                block,
                block
                | {"name": "block 2", "edges": None, "masks": None, "space": None, "time": None, "num_space": None},
            ],
        }
