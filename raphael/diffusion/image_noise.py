"""Where the noise of a batch of images comes from: of each image's own seed, or of torch generators as in diffusers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from raphael.base.randomness import SampleRng

ImageSeed = tuple[int, int]  # (seed, index): all that the noise of an image depends on


class BatchNoise(Protocol):
    """Standard normal noise, float32 (B, C, h, w)."""

    def start(self) -> Tensor:
        """That sampling begins from; asked for once, before any step."""

    def __call__(self, step: int) -> Tensor:
        """That a step adds; asked for in the order of the steps, at most once each."""

    def another(self, name: str, shape: tuple[int, ...]) -> BatchNoise:
        """The same images' noise for a later network of a cascade, of the shape (C, h, w). name: of that network."""


class ImageNoise:
    """Each image's from its own seed, whatever stands beside it."""

    def __init__(
        self,
        seeds: list[ImageSeed],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        name: str = "picture",
    ):
        self.seeds = list(seeds)
        self.sources = [SampleRng(seed, 0, [index]) for seed, index in seeds]
        self.shape, self.device, self.name = shape, device, name

    def start(self) -> Tensor:
        return self._draw(self.name)

    def __call__(self, step: int) -> Tensor:
        return self._draw(f"{self.name} step {step}")

    def another(self, name: str, shape: tuple[int, ...]) -> ImageNoise:
        return ImageNoise(self.seeds, shape, self.device, name)

    def _draw(self, stream: str) -> Tensor:
        rows = [torch.as_tensor(source.normal(stream, self.shape)) for source in self.sources]
        return torch.cat(rows).to(self.device)


class GeneratorNoise:
    """From torch generators, whose states advance: the numbers that diffusers' randn_tensor draws.

    generators: one, whose next numbers are the whole batch's, or one for each image.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator],
        count: int,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
    ):
        single = isinstance(generators, torch.Generator)
        self.sources = [(generators, count)] if single else [(generator, 1) for generator in generators]
        self.shape, self.device = shape, device

    def start(self) -> Tensor:
        rows = [
            torch.randn(count, *self.shape, generator=generator, device=generator.device)
            for generator, count in self.sources
        ]
        return torch.cat([row.to(self.device) for row in rows])

    def __call__(self, step: int) -> Tensor:
        return self.start()

    def another(self, name: str, shape: tuple[int, ...]) -> GeneratorNoise:
        other = copy.copy(self)
        other.shape = shape
        return other


class StartedFrom:
    """Another noise, but for its start (B, C, h, w)."""

    def __init__(self, noise: BatchNoise, start: Tensor):
        self.noise, self._start = noise, start

    def start(self) -> Tensor:
        return self._start

    def __call__(self, step: int) -> Tensor:
        return self.noise(step)

    def another(self, name: str, shape: tuple[int, ...]) -> BatchNoise:
        return self.noise.another(name, shape)


class FromImage:
    """Of a run that begins at a picture (SDEdit, arXiv 2108.01073): x0 (B or 1, C, h, w) with noise of sigma on it.

    first: the step of the whole run that is its first, so that a step adds the same noise as in the whole run.
    """

    def __init__(self, noise: BatchNoise, x0: Tensor, sigma: float, first: int):
        self.noise, self.x0, self.sigma, self.first = noise, x0, sigma, first

    def start(self) -> Tensor:
        eps = self.noise.start()
        return noised(self.x0.expand_as(eps), eps, self.sigma)

    def __call__(self, step: int) -> Tensor:
        return self.noise(self.first + step)

    def another(self, name: str, shape: tuple[int, ...]) -> BatchNoise:
        return self.noise.another(name, shape)


def noised(x0: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """What `sample` starts from at sigma: (x_0 + sigma eps) / sqrt(1 + sigma^2); eps where sigma is infinite."""
    if math.isinf(sigma):
        return eps
    return x0 if sigma == 0 else (x0 + sigma * eps) / (1 + sigma**2) ** 0.5
