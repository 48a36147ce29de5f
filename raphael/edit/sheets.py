"""Many images at a glance: one prompt in every style, and grids over any two or three settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.config.sampling import Sampling, told
from raphael.base.files import written_whole
from raphael.base.images.fit import read_image
from raphael.base.images.grid import image_grid
from raphael.base.stage import write_json
from raphael.base.strict import load, to_dict
from raphael.edit.rewrite import Keep, refine
from raphael.edit.run import Edited, How
from raphael.generate.pipeline import Pipeline

OTHERS = ("seed", "prompt", "negative_prompt", "replace")  # axes beside the options of Sampling
PLACE = "{prompt}"


def style_sheet(
    pipeline: Pipeline,
    prompt: str,
    styles: Sequence[str],
    how: How = How(),  # noqa: B008
    keep: Keep = Keep(),  # noqa: B008
) -> Edited:
    """One prompt and one seed in every style, a row a style. source: the prompt without a style; result: refined by
    it, so that the layout stays (`refine`); without: the styled prompt's own image of the seed.

    styles: words that are put behind the prompt after a comma, or a text with {prompt} in it. Raises ValueError for
    none, and what `refine` refuses.
    """
    if not styles:
        raise ValueError("styles: got none, expected at least one, such as 'pixel art'")
    one = replace(how, num_images=1)
    styled = [style.replace(PLACE, prompt) if PLACE in style else f"{prompt}, {style}" for style in styles]
    made = [refine(pipeline, prompt, text, one, keep) for text in styled]
    columns = (np.concatenate([getattr(edited, name) for edited in made]) for name in ("source", "result", "without"))
    facts = made[0].facts | {"edit": "styles", "target": styled, "styles": list(styles)}
    return Edited(*columns, (prompt, "the style, layout kept", "the style alone"), facts, rows=tuple(styles))


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as `axis_of` reads them. name: a field of Sampling, or one of OTHERS."""

    name: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        return f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}"


def axis_of(text: str) -> Axis:
    """NAME=V,V,... -> Axis; with "|" between values these may hold commas; seed=0-3 is a range, both ends included.

    replace=red|blue|green draws the prompt as it is, then with its "red" exchanged for each of the others (what
    AUTOMATIC1111's users know as prompt S/R). Raises ValueError for an unknown name and values that do not fit.
    """
    name, equals, rest = text.partition("=")
    known = [field.name for field in fields(Sampling)]
    if not equals or name not in (*known, *OTHERS):
        raise ValueError(f"axis: got {text!r}, expected NAME=VALUES, NAME one of {', '.join((*OTHERS, *known))}")
    values = [value.strip() for value in rest.split("|" if "|" in rest else ",")]
    if name == "seed":
        return Axis(name, tuple(itertools.chain.from_iterable(_seeds(value) for value in values)))
    if not all(values) and name != "negative_prompt":
        raise ValueError(f"axis: got {text!r}, expected values with a comma or | between them")
    return Axis(name, tuple(values if name in OTHERS else map(_number, values)))


@dataclass(frozen=True)
class Grid:
    """Images of every combination of two or three axes: x to the right, y down, z a sheet each.

    how.num_images must be 1: seeds are an axis. Raises ValueError for axes that share a name or do not fit.
    """

    pipeline: Pipeline
    prompt: str
    axes: tuple[Axis, ...]
    how: How

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if not 1 <= len(names) <= 3 or len(set(names)) < len(names):
            raise ValueError(f"axes: got {', '.join(names) or 'none'}, expected one to three different ones")
        if self.how.num_images != 1:
            raise ValueError(f"num_images: got {self.how.num_images}, expected 1: make seed an axis")
        for axis in self.axes:
            if axis.name == "replace" and axis.values[0] not in self.prompt:
                raise ValueError(f"replace: got {axis.values[0]!r}, expected words of the prompt {self.prompt!r}")
        for values in itertools.product(*(axis.values for axis in self.axes)):
            self.cell(values)

    def cell(self, values: Sequence[Any]) -> tuple[str, How]:
        """(prompt, how) of one combination."""
        told = {axis.name: value for axis, value in zip(self.axes, values, strict=True)}
        prompt = told.pop("prompt", self.prompt)
        if "replace" in told:
            searched = next(axis.values[0] for axis in self.axes if axis.name == "replace")
            prompt = prompt.replace(searched, told.pop("replace"))
        seed, negative = told.pop("seed", self.how.seed), told.pop("negative_prompt", self.how.negative_prompt)
        sampling = self.how.sampling or self.pipeline.defaults
        if told:
            sampling = load(Sampling, to_dict(sampling) | told, "axis")
        return prompt, How(seed, 1, sampling, negative, self.how.size)

    def save(self, folder: Path, done: Callable[[bool], None] = lambda again: None) -> list[Path]:
        """cells/<digest>.png, a name that says all that decides the image: those that are there are not drawn again,
        after a kill as after a change of the axes; then grid-<z>.png and grid.json. done: told of each cell, whether
        it was there."""
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        combinations = list(itertools.product(*(axis.values for axis in self.axes)))
        cells = [self._cell_file(folder, values, done) for values in combinations]
        x, y, z = (*self.axes, *[Axis("", ("",))] * (3 - len(self.axes)))
        files = []
        for place, sheet in enumerate(z.values):
            rows = [(b, a) for b in y.values for a in x.values]
            shown = [cells[combinations.index((a, b, sheet)[: len(self.axes)])] for b, a in rows]
            names = [axis.label(value) for axis, value in [(z, sheet)] if axis.name]
            captions = [", ".join(filter(None, [x.label(a), y.label(b).strip(), *names])) for b, a in rows]
            images = [read_image(file) for file in shown]
            files.append(folder / f"grid-{place}.png")
            image_grid(images, len(x.values), captions).save(files[-1], optimize=True)
        axes = {axis.name: list(axis.values) for axis in self.axes}
        listed = [
            {"values": list(values), "file": f"cells/{file.name}"}
            for values, file in zip(combinations, cells, strict=True)
        ]
        write_json(folder / "grid.json", {"prompt": self.prompt, "axes": axes, "cells": listed})
        return [*files, folder / "grid.json"]

    def _cell_file(self, folder: Path, values: Sequence[Any], done: Callable[[bool], None]) -> Path:
        from PIL import Image

        prompt, how = self.cell(values)
        decides = [self.pipeline.identity, prompt, how.seed, how.negative_prompt, how.size, told(how.sampling)]
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        file = folder / "cells" / f"{name}.png"
        there = file.is_file()
        if not there:
            height, width = how.size or (None, None)
            negative = how.negative_prompt or None
            made = self.pipeline(
                prompt,
                negative_prompt=negative,
                sampling=how.sampling,
                seed=how.seed,
                height=height,
                width=width,
                output_type="np",
            ).images[0]
            with written_whole(file) as temporary:
                Image.fromarray(np.uint8(np.rint(made * 255))).save(temporary, format="PNG")
        done(there)
        return file


def _seeds(text: str) -> list[int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or (found[2] and int(found[2]) < int(found[1])):
        raise ValueError(f"seed: got {text!r}, expected whole numbers or a range such as 0-3")
    return list(range(int(found[1]), int(found[2] or found[1]) + 1))


def _number(text: str) -> Any:
    """What the text is in JSON; else itself, as the names of samplers are."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
