"""What a pipeline's call asks for, by diffusers' argument names, checked and spread to one row an image."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raphael.base.config.sampling import OWN, Sampling
from raphael.base.stage import StageError
from raphael.base.strict import load, to_dict
from raphael.diffusion.image_noise import BatchNoise, FromImage, GeneratorNoise, ImageNoise, ImageSeed, StartedFrom
from raphael.diffusion.noise import RectifiedFlow
from raphael.diffusion.samplers import Callback, Watch
from raphael.diffusion.sampling import Order, Parts, encode_texts
from raphael.diffusion.schedule import Noise
from raphael.diffusion.scheduler import Scheduled
from raphael.net.condition import Condition

Texts = str | Sequence[str]
Generators = torch.Generator | Sequence[torch.Generator]
Images = Any  # a PIL image or uint8 (H, W, 3), or a list of them
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROMPTS = "a text or a list of texts"


@dataclass(frozen=True)
class Embedded:
    """Prompts that were encoded already, in place of texts.

    tokens: (n, N, D), one row a prompt, or a Condition of n rows, which every system takes; mask (n, N) bool, True on
    tokens that count, None: all do.
    """

    tokens: Tensor | Condition | None = None
    mask: Tensor | None = None

    def rows(self, name: str, like: torch.nn.Module, each: int) -> Condition | None:
        """Every row `each` times, on the device and in the type of `like`'s weights; None where nothing was given."""
        if self.tokens is None:
            if self.mask is not None:
                raise ValueError(f"{name}: got a mask alone, expected the embeddings that it is of")
            return None
        cond = self.tokens if isinstance(self.tokens, Condition) else Condition(self.tokens, _bool(self.mask))
        if not isinstance(self.tokens, Condition) and (width := getattr(like.config, "context_dim", None)):
            want = (like.config.context_length, width)
            got = tuple(self.tokens.shape)
            if len(got) != 3 or got[2] != width or not got[1] or got[1] % like.config.context_length:
                raise ValueError(f"{name}: got shape {got}, expected {('n', *want)}, a row for each prompt")
        if not cond.num_rows:
            raise ValueError(f"{name}: got no rows, expected one for each prompt")
        return cond.rows([row for row in range(cond.num_rows) for _ in range(each)]).to(device_of(like))


@dataclass(frozen=True)
class Words:
    """prompts: one a picture, "" where it was encoded by the caller; negatives: one for all, or one a picture."""

    prompts: list[str]
    negatives: list[str]
    given: Condition | None = None
    given_null: Condition | None = None

    def conditions(self, part: slice, encode: Callable[[list[str]], Condition]) -> tuple[Condition, Condition]:
        """Of a batch: what each picture is of, and the unconditional row, one for all or one for each."""
        cond = encode(self.prompts[part]) if self.given is None else self.given.rows(part)
        if self.given_null is not None:
            return cond, self.given_null if self.given_null.num_rows == 1 else self.given_null.rows(part)
        return cond, encode(self.negatives if len(self.negatives) == 1 else self.negatives[part])


def read_words(
    prompt: Texts | None,
    negative: Texts | None,
    each: int,
    embedded: Embedded,
    embedded_null: Embedded,
    unet: torch.nn.Module,
) -> Words:
    """Every prompt `each` times, side by side. A list of negative prompts has one for each prompt; equal ones are one.

    Raises ValueError.
    """
    if not isinstance(each, int) or each < 1:
        raise ValueError(f"num_images_per_prompt: got {each}, expected at least 1")
    given = embedded.rows("prompt_embeds", unet, each)
    if (prompt is None) == (given is None):
        got = "both prompt and prompt_embeds" if given is not None else "nothing to generate"
        raise ValueError(f"prompt: got {got}, expected {PROMPTS}{', or prompt_embeds' if given is not None else ''}")
    prompts = [""] * given.num_rows if given is not None else _spread(_texts("prompt", prompt), each)
    count = len(prompts) // each
    given_null = embedded_null.rows("negative_prompt_embeds", unet, 1)
    if given_null is not None:
        if negative is not None:
            raise ValueError("negative_prompt: got it with negative_prompt_embeds, expected one of them")
        if given_null.num_rows not in (1, count):
            got = f"{given_null.num_rows} rows for {count} prompts"
            raise ValueError(f"negative_prompt_embeds: got {got}, expected one, or one for each")
        if given_null.num_rows == count:
            given_null = given_null.rows([row for row in range(count) for _ in range(each)])
    negatives = [""] if negative is None else _texts("negative_prompt", negative)
    if len(negatives) not in (1, count):
        raise ValueError(f"negative_prompt: got {len(negatives)} for {count} prompts, expected one, or one for each")
    # one row stands for all where all are equal: the same work and the same bytes as a single text
    negatives = negatives[:1] if len(set(negatives)) == 1 else _spread(negatives, each)
    return Words(prompts, negatives, given, given_null)


def read_seeds(seed: Any) -> int | tuple[ImageSeed, ...]:
    """A whole number for all images, or for each a whole number or (seed, number). Raises ValueError."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        pairs = [tuple(one) if isinstance(one, Sequence) and not isinstance(one, str) else (one, 0) for one in seed]
        if all(len(pair) == 2 and all(_whole(number) for number in pair) for pair in pairs):
            return tuple((int(own), int(number)) for own, number in pairs)
    elif _whole(seed):
        return int(seed)
    raise ValueError(f"seed: got {seed!r}, expected a whole number, or one for each image")


def _whole(number: Any) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


@dataclass(frozen=True)
class Start:
    """Where the noise comes from: of (seed, number of the image), or of generators, and what it begins from.

    seed: of all images, or (seed, number) of each.
    """

    seed: int | tuple[ImageSeed, ...]
    generator: Generators | None
    latents: Tensor | None

    def check(self, count: int, shape: tuple[int, ...]) -> None:
        """Raises ValueError for seeds, generators or latents of another number or shape than the images'."""
        if not isinstance(self.seed, int) and len(self.seed) != count:
            raise ValueError(f"seed: got {len(self.seed)}, expected one, or one for each of {count} images")
        if isinstance(self.generator, (list, tuple)) and len(self.generator) != count:
            raise ValueError(f"generator: got {len(self.generator)}, expected one, or one for each of {count} images")
        if self.latents is not None and tuple(self.latents.shape) != (count, *shape):
            got = tuple(self.latents.shape)
            raise ValueError(f"latents: got shape {got}, expected {(count, *shape)}, standard normal")

    def seeds(self, count: int) -> list[ImageSeed]:
        return [(self.seed, index) for index in range(count)] if isinstance(self.seed, int) else list(self.seed)

    def of(self, part: range, shape: tuple[int, ...], device: torch.device) -> BatchNoise:
        """The noise of those images."""
        if self.generator is None:
            noise: BatchNoise = ImageNoise(self.seeds(part.stop)[part.start : part.stop], shape, device)
        else:
            noise = GeneratorNoise(self.generators(part), len(part), shape, device)
        if self.latents is None:
            return noise
        return StartedFrom(noise, self.latents[part.start : part.stop].to(device, torch.float32))

    def generators(self, part: range) -> Generators:
        """For a diffusers scheduler, which draws from nothing else."""
        if isinstance(self.generator, (list, tuple)):
            return list(self.generator[part.start : part.stop])
        if self.generator is not None:
            return self.generator
        return [torch.Generator().manual_seed(_number(*own)) for own in self.seeds(part.stop)[part.start : part.stop]]


@dataclass(frozen=True)
class Origin:
    """What image to image (SDEdit, arXiv 2108.01073) begins from: x0 (1 for all, or B; C, h, w), and its share of the
    steps. Strength 0 is x0 itself, 1 the prompt's image of the same noise."""

    x0: Tensor
    strength: float

    def begun(self, noise: BatchNoise, levels: Tensor, rows: slice) -> tuple[BatchNoise, Tensor]:
        """The noise and the levels of the steps that are left of levels (steps + 1,), for those rows."""
        steps = len(levels) - 1
        first = steps - round(self.strength * steps)
        # from the first step on nothing of the picture is told, though some schedules end short of pure noise
        if first == 0:
            return noise, levels
        x0 = self.x0 if len(self.x0) == 1 else self.x0[rows]
        return FromImage(noise, x0, float(levels[first]), first), levels[first:]


def read_images(image: Images | None, strength: float, num_prompts: int) -> list[np.ndarray]:
    """One for all, or one for each prompt, uint8 (H, W, 3) each; [] where none was given. Raises ValueError."""
    if image is None:
        return []
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength:g}, expected a share from 0 to 1")
    given = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(given) not in (1, num_prompts):
        raise ValueError(f"image: got {len(given)} for {num_prompts} prompts, expected one, or one for each")
    return [_pixels(one) for one in given]


def size_of(height: int | None, width: int | None, pictures: list[np.ndarray]) -> tuple[int | None, int | None]:
    """(height, width) in px that are asked for; what was left out is the pictures'."""
    return (height or pictures[0].shape[0], width or pictures[0].shape[1]) if pictures else (height, width)


def _pixels(image: Any) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB")) if hasattr(image, "convert") else image
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        shape = tuple(getattr(pixels, "shape", ()))
        got = f"{pixels.dtype} {shape}" if shape else type(pixels).__name__
        raise ValueError(f"image: got {got}, expected a PIL image or uint8 (H, W, 3)")
    return pixels


def chosen_levels(noise: Noise, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Tensor | None:
    """The noise levels to step through, (steps + 1,) float64, ending in 0; None where neither was given.

    timesteps: falling, of the T that the model was trained with; sigmas: falling, of a rectified flow its times.
    Raises ValueError.
    """
    if timesteps is None and sigmas is None:
        return None
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps: got them with sigmas, expected one of the two")
    name = "timesteps" if sigmas is None else "sigmas"
    values = torch.as_tensor([float(value) for value in (timesteps if sigmas is None else sigmas)], dtype=torch.float64)
    if sigmas is None:
        low, high, levels = 0.0, float(noise.num_steps - 1), noise.sigma_at
    elif isinstance(noise, RectifiedFlow):
        low, high, levels = 0.0, 1.0, lambda time: time / (1 - time)
    else:
        ends = noise.sigma_at(torch.tensor([0.0, noise.num_steps - 1.0], dtype=torch.float64))
        low, high, levels = 0.0, float(ends[1]), lambda sigma: sigma
    if sigmas is not None and len(values) and values[-1] == 0:
        values = values[:-1]
    if not len(values) or bool((values.diff() >= 0).any()):
        raise ValueError(f"{name}: got {_listed(values)}, expected at least one, each less than the one before")
    if not (low <= values[-1] and values[0] <= high * (1 + 1e-6)):
        raise ValueError(f"{name}: got {_listed(values)}, expected numbers from {low:g} to {high:g}")
    return torch.cat([levels(values), torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class Job:
    """A call, read. options: of a diffusers scheduler's `step`. chosen: (timesteps, sigmas) that the caller named.
    origin: of image to image."""

    parts: Parts
    words: Words
    start: Start
    settings: Sampling
    options: dict[str, Any]
    chosen: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None)
    watch: Watch | Callback | None = None
    origin: Origin | None = None

    def check(self) -> None:
        """Raises ValueError for noise that does not fit the images."""
        self.start.check(len(self.words.prompts), self.parts.latent_shape)
        if self.parts.guide is not None and self.words.given is not None:
            raise ValueError("guidance: got it with prompt_embeds, expected prompts: the guide reads them")
        if self.parts.guide is not None:
            self.parts.guide(self.words.prompts)  # one that it cannot be asked for is said now

    def order(self, part: range, scheduler: Any) -> Order:
        """What is to be sampled for those images. scheduler: of diffusers, or None."""
        device = device_of(self.parts.unet)
        rows = slice(part.start, part.stop)
        cond, null = self.words.conditions(rows, lambda texts: encode_texts(self.parts, texts))
        noise, scheduled, levels = self.start.of(part, self.parts.latent_shape, device), None, None
        if scheduler is None:
            levels = chosen_levels(self.parts.schedule, *self.chosen)
            if self.origin is not None:
                levels = self.parts.schedule.sampling_sigmas(self.settings.steps) if levels is None else levels
                noise, levels = self.origin.begun(noise, levels, rows)
        elif self.origin is not None:
            raise ValueError("image: got one with a scheduler of diffusers, expected our own samplers")
        else:
            named = dict(zip(("timesteps", "sigmas"), self.chosen, strict=True))
            asked = {name: list(value) for name, value in named.items() if value is not None}
            asked = asked or {"num_inference_steps": self.settings.steps}
            scheduled = Scheduled(scheduler, asked, self.start.generators(part), self.options)
        wrap = self.parts.guide(self.words.prompts[rows]) if self.parts.guide else None
        return Order(cond, null, noise, self.settings, levels, scheduled, self.watch, wrap=wrap)


def chosen_sampling(meta: dict[str, Any]) -> Sampling:
    """How a model wants to be sampled: its meta.json's `sampling`, those options that are there, over the defaults.

    Raises ConfigError, a ValueError, for unknown names and wrong values.
    """
    own = meta.get("sampling", {})
    if unknown := own.keys() - set(OWN):
        raise ValueError(f"meta.json: sampling: got {', '.join(sorted(unknown))}, expected some of {', '.join(OWN)}")
    return load(Sampling, {**to_dict(Sampling()), **own}, "meta.json", "sampling")


def default_size(picture: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in px of images generated without asking for a size: the first that the model was trained at.

    picture: of a pipeline's meta.json. Those of models with one size only may name it by height_px and width_px.
    """
    height, width = picture["sizes_px"][0] if "sizes_px" in picture else (picture["height_px"], picture["width_px"])
    return height, width


LARGEST_SIDE_PX = 1 << 16


def expect_sizes(picture: Any, where: str) -> None:
    """That `default_size` has something to read: whole numbers of pixels. Raises StageError."""
    said = picture if isinstance(picture, dict) else {}
    one = [said.get("height_px"), said.get("width_px")]
    sizes = said.get("sizes_px", [one])
    pairs = isinstance(sizes, list) and all(isinstance(size, list) and len(size) == 2 for size in sizes)
    if not pairs or not sizes or any(type(n) is not int or not 0 < n <= LARGEST_SIDE_PX for n in sum(sizes, [])):
        raise StageError(f"{where}: picture: got {str(picture)[:80]}, expected sizes_px: [[height, width]] in px")


def refuse_unknown(unknown: dict[str, Any], call: Callable[..., Any]) -> None:
    """Raises TypeError that names the nearest argument that there is."""
    if not unknown:
        return
    name = next(iter(unknown))
    known = [item.name for item in inspect.signature(call).parameters.values() if item.kind != item.VAR_KEYWORD]
    known.remove("self")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    near = near or [item for item in known if item.endswith(f"_{name}") or name.endswith(f"_{item}")]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "docs/guides/generate.md lists what there is"
    if not near and name in OWN:
        hint = f"it is an option of sampling: sampling=Sampling({name}=...)"
    raise TypeError(f"{name}: no such argument; {hint}")


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else [value]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{name}: got {wrong[0]!r}, expected {PROMPTS}")
    if not texts:
        raise ValueError(f"{name}: got nothing to generate, expected {PROMPTS}")
    return texts


def _spread(texts: list[str], each: int) -> list[str]:
    return [text for text in texts for _ in range(each)]


def _bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()  # transformers' masks are 0 and 1


def _number(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}/picture {index} of a scheduler".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _listed(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values.tolist()[:8]) + (", ...]" if len(values) > 8 else "]")
