"""What all edits share: how they sample, and what they return.

One batch holds groups of equal length, each drawn from the same seeds: sources, results, results without the edit.
Row i of a group belongs to row i of the others and to nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.config.sampling import Sampling, told
from raphael.base.images.grid import image_grid
from raphael.base.precision import autocast
from raphael.base.stage import write_json
from raphael.diffusion.denoiser import Denoiser
from raphael.diffusion.samplers import Callback, sample
from raphael.diffusion.sampling import (
    ImageNoise,
    ImageSeed,
    Order,
    decode_images,
    encode_texts,
    evaluating,
    guided_denoiser,
)
from raphael.diffusion.schedule import Noise
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import Condition

if TYPE_CHECKING:
    from PIL import Image

Wrap = Callable[[Denoiser], Denoiser]
Onlooker = Callable[["Session", float, Tensor], None]  # (session, sigma, x_0 (rows, C, h, w)) after each step
ROUNDED = 1e-3  # timesteps are whole numbers: a step's progress is off by up to half of 1/T

_onlooker: ContextVar[Onlooker | None] = ContextVar("onlooker", default=None)


@contextlib.contextmanager
def looking_on(onlooker: Onlooker) -> Iterator[None]:
    """Inside, and in this thread alone, it is shown the estimates of whatever edit draws.

    Of a context and no argument, for edits draw several times and none of their functions has a use for it.
    """
    before = _onlooker.set(onlooker)
    try:
        yield
    finally:
        _onlooker.reset(before)


@dataclass(frozen=True)
class How:
    """How an edit samples. sampling: None is the model's own way. size: (height, width) px, None: its first."""

    seed: int = 0
    num_images: int = 1  # of (seed, 0), (seed, 1), ...
    sampling: Sampling | None = None
    negative_prompt: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images: got {self.num_images}, expected at least 1")


@dataclass
class Edited:
    """source, result, without (the result without the edit): uint8 (n, H, W, 3), row i from one seed.

    facts: the edit and its settings; shown: further images (n, H, W, 3) by name, such as a mask; rows: what a row of
    the sheet is, where rows differ in more than the seed.
    """

    source: np.ndarray
    result: np.ndarray
    without: np.ndarray
    labels: tuple[str, str, str]
    facts: dict[str, Any]
    shown: dict[str, np.ndarray] = field(default_factory=dict)
    rows: tuple[str, ...] = ()

    def sheet(self) -> Image.Image:
        """A row an image: source, result, result without the edit, then what else is shown."""
        columns = [self.source, self.result, self.without, *self.shown.values()]
        names = [*self.labels, *self.shown]
        images = [column[row] for row in range(len(self.source)) for column in columns]
        rows = self.rows or ("",) * len(self.source)
        captions = [f"{row}: {name}" if row else name for row in rows for name in names]
        return image_grid(images, len(columns), captions)

    def save(self, folder: Path) -> list[Path]:
        """sheet.png, <index>-{source,result,without}.png and edit.json; -> the files."""
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "sheet.png"]
        self.sheet().save(files[0])
        for name in ("source", "result", "without"):
            for index, image in enumerate(getattr(self, name)):
                files.append(folder / f"{index:05d}-{name}.png")
                Image.fromarray(image).save(files[-1])
        write_json(folder / "edit.json", self.facts)
        return [*files, folder / "edit.json"]


class Session:
    """A pipeline, ready to sample as `how` says.

    seeds: one for each row of a group; sigmas: (steps + 1,), falling. Raises ValueError for a size that does not fit.
    """

    def __init__(self, pipeline: Pipeline, how: How):
        self.pipeline, self.how = pipeline, how
        self.settings = how.sampling or pipeline.defaults
        if self.settings.until != "end":
            raise ValueError(f"until: got {self.settings.until}, expected end: an edit goes through every network")
        reader = pipeline.reader(self.settings, weighted=False)
        self.parts = pipeline.parts(*(how.size or (None, None)), reader)
        self.seeds: list[ImageSeed] = [(how.seed, index) for index in range(how.num_images)]
        self.sigmas = self.parts.schedule.sampling_sigmas(self.settings.steps)

    @property
    def count(self) -> int:
        return len(self.seeds)

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def condition(self, *prompts: str) -> Condition:
        """A group of rows for each prompt, all told by it."""
        return encode_texts(self.parts, [prompt for prompt in prompts for _ in self.seeds])

    def noise(self, groups: int = 1) -> ImageNoise:
        """The groups' noise: the same for each."""
        return ImageNoise(self.seeds * groups, self.parts.latent_shape, self.device)

    @contextlib.contextmanager
    def asking(self):
        """Around every use of a denoiser: evaluation mode, texts remembered, the precision that is asked for."""
        remembering = getattr(self.parts.unet, "remembering", contextlib.nullcontext)
        autocasting = autocast(self.settings.precision, self.device)
        with torch.inference_mode(), evaluating(self.parts.unet), remembering(), autocasting:
            yield

    def denoiser(self, wrap: Wrap | None = None, negative_prompt: str | None = None) -> Denoiser:
        """The guided network; wrap acts on what guidance returns."""
        negative = self.how.negative_prompt if negative_prompt is None else negative_prompt
        guided = guided_denoiser(self.parts, self.settings, encode_texts(self.parts, [negative]))
        return wrap(guided) if wrap else guided

    def draw(
        self,
        cond: Condition,
        wrap: Wrap | None = None,
        *,
        start: Tensor | None = None,
        first: int = 0,
        negative_prompt: str | None = None,
        callback: Callback | None = None,
        aside: bool = False,
    ) -> Tensor:
        """Latents (rows of cond, C, h, w).

        start: what sampling starts from, of variance 1 (`sample`); None: the seeds' own noise. first: the step to
        start at; after the last one there is nothing to do and the start is returned. aside: it is not what the edit is
        about, so nobody is shown it while it is drawn (`looking_on`).
        """
        noise = self.noise(cond.num_rows // self.count)
        start = noise.start() if start is None else start
        if first >= self.settings.steps:
            return start
        with self.asking():
            denoiser = self.denoiser(wrap, negative_prompt)
            later = lambda step: noise(first + step)  # noqa: E731
            return sample(
                self.settings,
                denoiser,
                start,
                self.sigmas[first:],
                cond,
                later,
                callback if aside else self._shown(callback),
            )

    def _shown(self, callback: Callback | None) -> Callback | None:
        """The callback, the estimates shown before it to whoever looks on."""
        onlooker = _onlooker.get()
        if onlooker is None:
            return callback

        def both(step: int, sigma: float, x: Tensor, x0: Tensor) -> bool | None:
            onlooker(self, sigma, x0)
            return callback(step, sigma, x, x0) if callback else None

        return both

    def decode(self, latents: Tensor, cond: Condition | None = None) -> np.ndarray:
        """-> uint8 (n, H, W, 3). cond: what the rows are of, by which a cascade's second network enlarges them; without
        it a cascade's images stay as small as they were drawn."""
        if self.parts.then is not None and cond is not None and self.settings.until == "end":
            null, noise = encode_texts(self.parts, [self.how.negative_prompt]), self.noise(len(latents) // self.count)
            with torch.inference_mode():
                latents = self.parts.then(latents, Order(cond, null, noise, self.settings))
        return decode_images(self.parts, latents)

    def latents_of(self, image: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) -> the mean latents (1, C, h, w). Raises ValueError for an image of another size."""
        return self.pipeline.latents_of(image, self.parts)

    @property
    def size_px(self) -> tuple[int, int]:
        _, height, width = self.parts.latent_shape
        return height * self.pipeline.downsampling, width * self.pipeline.downsampling

    def facts(self, kind: str, **more: Any) -> dict[str, Any]:
        """What edit.json tells."""
        how = {"seed": self.how.seed, "num_images": self.how.num_images, "negative_prompt": self.how.negative_prompt}
        return {"edit": kind, "model": self.pipeline.identity, **more, **how, **told(self.settings)}


def progress_of(schedule: Noise, sigma: Tensor) -> float:
    """Of a step whose rows all are at sigma (B,): 0 at the last timestep, 1 at timestep 0."""
    return 1 - float(schedule.timestep(sigma[:1])) / (schedule.num_steps - 1)


def reached(progress: float, share: float) -> bool:
    """Whether sampling has come to that share of its steps."""
    return progress >= share - ROUNDED


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value:g}, expected a share from 0 to 1")


def split(images: np.ndarray, groups: int) -> list[np.ndarray]:
    """(groups * n, ...) -> the groups."""
    return list(images.reshape(groups, -1, *images.shape[1:]))


def with_sampling(pipeline: Pipeline, how: How, **changes: Any) -> How:
    """`how` with options of its sampling changed."""
    return replace(how, sampling=replace(how.sampling or pipeline.defaults, **changes))


def joined(conditions: Sequence[Condition]) -> Condition:
    """The rows of all, in order."""
    whole = conditions[0]
    for cond in conditions[1:]:
        whole = whole.concat(cond)
    return whole
